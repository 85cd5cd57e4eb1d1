"""Folders of images: which files count, which output of the network each class folder is, and how a file is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from logart.errors import UserError, one_line

PASSED_OVER = ("__MACOSX", "@eaDir")  # what other systems leave beside images, and all that begins with a dot
ORDERS = ("number", "text")


@dataclass(frozen=True)
class Files:
    """Images that are known by name; none has been read.

    Attributes:
        names: Relative to the data set's folder, with '/' on every system.
        classes: The name of the class of each.
        load: From a mode of PIL's and a name to the image.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    load: Callable[[str, str], Image.Image]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int]) -> Files:
        """Those at the indices."""
        return Files(tuple(self.names[i] for i in indices), tuple(self.classes[i] for i in indices), self.load)


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders, empty ones too, in the order of their text."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _passed_over(entry.name))


def files_of_classes(root: Path, part: str, flag: str) -> Files:
    """The images under `root/part/<class>/`, by class and by name."""
    names, classes = [], []
    for name in class_folders(root / part):
        found = _images_under(root / part / name, f"{part}/{name}")
        names += found
        classes += [name] * len(found)
    return Files(tuple(names), tuple(classes), _loader(root, flag))


def files_of_folder(root: Path, flag: str) -> Files:
    """All images under a folder, without classes."""
    names = _images_under(root, "")
    return Files(tuple(names), ("",) * len(names), _loader(root, flag))


def _images_under(folder: Path, start: str) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _passed_over(name)]
        inside = Path(place).relative_to(folder).as_posix()
        for file in files:
            if file.lower().endswith(IMG_EXTENSIONS) and not _passed_over(file):
                found.append((inside, "/".join(filter(None, (start, inside.removeprefix("."), file)))))
    return [name for _, name in sorted(found)]


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name in PASSED_OVER


def classes_by_text_or_number(names: Sequence[str], order: str | None, where: str) -> tuple[list[str], str]:
    """The class folders in the order of the network's outputs, and the order that had to be chosen, if any.

    Args:
        names: Of the folders.
        order: `number` (2 before 10), `text` (10 before 2), or None where nobody said.
        where: The flag and the folder, for the error.

    Raises:
        UserError: Both orders differ, and nobody said which it is.
    """
    by_text, by_number = sorted(names), sorted(names, key=_natural)
    if by_text == by_number:
        return by_text, ""
    if order is None:
        first = next(index for index, name in enumerate(by_text) if name != by_number[index])
        raise UserError(
            f"{where}: class {first} is {by_number[first]!r} if folders are ordered as numbers, {by_text[first]!r} as "
            "text; expected --class_order number (timm's readers) or text (torchvision's), or --class_map FILE"
        )
    return (by_number, order) if order == "number" else (by_text, order)


def all_numbers(names: Sequence[str]) -> bool:
    """Whether every class folder's name is an integer."""
    return all(name.isascii() and name.isdigit() for name in names)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts if part]


def read_class_map(path: str | Path, *, flag: str = "--class_map") -> dict[str, int]:
    """Which output of the network each class folder is.

    Args:
        path: A .json file with `{folder: output}` or ImageNet's `{output: [folder, …]}`; or a text file with a folder
            a line in the order of the outputs, or `folder output` on every line.
        flag: The flag that errors name.

    Raises:
        UserError: The file cannot be read, is of another form, or names a folder twice.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        pairs = _pairs_of_json(json.loads(text)) if path.suffix == ".json" else _pairs_of_lines(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{flag}: cannot read {path} ({reason})") from error
    result: dict[str, int] = {}
    for name, index in pairs:
        if name in result:
            raise UserError(f"{flag}: {path} names {name!r} twice; expected every class folder once")
        result[name] = index
    if not result:
        raise UserError(f"{flag}: {path} names no class folder")
    return result


def _pairs_of_json(content: object) -> list[tuple[str, int]]:
    if isinstance(content, list):
        return [(str(name), index) for index, name in enumerate(content)]
    if isinstance(content, dict) and all(type(value) is int for value in content.values()):
        return list(content.items())
    if isinstance(content, dict) and all(key.isdigit() for key in content):
        return [(value[0] if isinstance(value, list) else value, int(key)) for key, value in content.items()]
    raise ValueError("expected {folder: output}, {output: [folder, ...]} or [folder, ...]")


def _pairs_of_lines(text: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [re.fullmatch(r"(.*\S)[\s,]+(\d+)", line) for line in lines]
    if all(matches):
        return [(match[1].rstrip(", \t"), int(match[2])) for match in matches if match]
    return [(line, index) for index, line in enumerate(lines)]


def balanced_choice(classes: Sequence[str], count: int, seed: int) -> list[int]:
    """Indices of `count` images, ascending: of every class as many, one more of some where that does not come out even.

    A smaller count gives a part of a larger one's.
    """
    shuffled = np.random.RandomState(seed).permutation(len(classes)).tolist()
    seen: dict[str, int] = {}
    ranked = []
    for place, index in enumerate(shuffled):
        rank = seen.get(classes[index], 0)
        seen[classes[index]] = rank + 1
        ranked.append((rank, place, index))
    return sorted(index for _, _, index in sorted(ranked)[:count])


def _loader(root: Path, flag: str) -> Callable[[str, str], Image.Image]:
    return _Loader(root, flag)


@dataclass(frozen=True)
class _Loader:
    root: Path
    flag: str

    def __call__(self, mode: str, name: str) -> Image.Image:
        path = self.root / name
        try:
            with Image.open(path) as image:
                return _in_8_bits(image, f"{self.flag}: {path}").convert(mode)
        except UserError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise UserError(f"{self.flag}: cannot read the image {path} ({one_line(error)})") from error


def _in_8_bits(image: Image.Image, where: str) -> Image.Image:
    """The image, of 16 bits scaled to 8; PIL itself would clip them.

    Raises:
        UserError: Its pixels are floats, or integers of 32 bits, whose range nobody can know.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode == "F" or (image.mode.startswith("I") and not sixteen):
        kind = "a float image" if image.mode == "F" else "an image of 32-bit integers"
        raise UserError(f"{where} is {kind}; expected 8 or 16 bits a channel")
    if not sixteen:
        return image
    pixels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def outputs(classes: Mapping[str, int], num_classes: int, where: str) -> tuple[str, ...]:
    """The class folder of each output of the network, "" where there is none.

    Raises:
        UserError: A class is no output of the network.
    """
    names = [""] * num_classes
    for name, index in classes.items():
        if not 0 <= index < num_classes:
            raise UserError(f"{where}: class {name!r} is output {index}, but the network has {num_classes}")
        names[index] = names[index] or name
    return tuple(names)
