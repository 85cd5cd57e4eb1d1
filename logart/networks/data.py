"""Images in: data sets as a network sees them, evaluation batches streamed from `val`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from logart.errors import UserError
from logart.networks.digits import DIGITS, find_digits
from logart.networks.image_folder import (
    Files,
    all_numbers,
    balanced_choice,
    class_folders,
    classes_by_text_or_number,
    files_of_classes,
    files_of_folder,
    outputs,
    read_class_map,
)

PIL_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its images.

    Attributes:
        input_size: Channels, height and width.
        crop_pct: The part of the resized image that the centre crop keeps, in (0, 1].
        interpolation: How images are resized: nearest, bilinear, bicubic, ...
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
    """

    input_size: tuple[int, int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Split(Dataset[tuple[Tensor, int]]):
    """One half of a data set; items are (float32 [C, H, W], label), the same at every access.

    Args:
        names: A file name for every item, relative to the data set's folder, with '/' on every system.
        labels: A class for every item.
        load: From a name to the image.
        preprocessing: What the network expects.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int],
        load: Callable[[str], Image.Image],
        preprocessing: Preprocessing,
    ) -> None:
        p = preprocessing
        self.names = names
        self._labels = labels
        self._load = load
        self._transform = create_transform(
            p.input_size,
            is_training=False,
            crop_pct=p.crop_pct,
            interpolation=p.interpolation,
            mean=p.mean,
            std=p.std,
        )
        self.size = p.input_size[1:]
        mode = transforms.InterpolationMode(p.interpolation)
        self._augmentation = transforms.Compose(
            [
                transforms.RandomResizedCrop(p.input_size[1:], interpolation=mode),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(p.mean, p.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._load(self.names[index])), self._labels[index]

    def balanced(self, count: int) -> Split:
        """`count` of the items, in their order: of every class as many, the same at every call."""
        places = balanced_choice([str(label) for label in self._labels], count, 1)
        some = copy.copy(self)
        some.names, some._labels = [self.names[i] for i in places], [self._labels[i] for i in places]
        return some

    def cropped(self, index: int) -> Tensor:
        """The item [C, H, W] with the crop at another place of the resized image, by torch's global generator."""
        steps = self._transform.transforms
        at_random = transforms.Compose([transforms.RandomCrop(self.size) if _is_crop(step) else step for step in steps])
        return at_random(self._load(self.names[index]))  # type: ignore[no-any-return]

    def is_cut(self, index: int) -> bool:
        """Whether the centre crop cuts something off the resized item."""
        image = self._load(self.names[index])
        for step in self._transform.transforms:
            if _is_crop(step):
                return (image.height, image.width) != tuple(self.size)
            image = step(image)
        return False

    def augmented(self, index: int) -> Tensor:
        """The item [C, H, W] cropped and flipped at random, by torch's global generator."""
        return self._augmentation(self._load(self.names[index]))


def _is_crop(step: object) -> bool:
    return isinstance(step, transforms.CenterCrop)


@dataclass(frozen=True)
class ImageSource:
    """A data set as a network sees it.

    Attributes:
        name: For tables.
        class_names: The class folder of each output of the network, "" where there is none.
        train: Where calibration images are taken from.
        val: What accuracy is measured on.
        options: What else was asked of the data, by the results column that says it.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    options: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataChoice:
    """Which images a run shall have.

    Attributes:
        path: A folder in ImageNet layout (`train/<class>/*`, `val/<class>/*`), or 'digits'.
        class_map: A file that says which output each class folder is, see `image_folder.read_class_map`.
        class_order: One of `image_folder.ORDERS`, where both differ.
        calib_path: Any folder of images, in place of `train`.
        calib_from_val: So many images of `val` in place of `train`; accuracy is measured on the others.
        val_limit: Measure accuracy on so many images only, the same ones always, of every class as many.
        calibrates: Whether calibration images are needed; otherwise `train` may be missing.
    """

    path: str = DIGITS
    class_map: str | None = None
    class_order: str | None = None
    calib_path: str | None = None
    calib_from_val: int | None = None
    val_limit: int | None = None
    calibrates: bool = True


@dataclass(frozen=True)
class Images:
    """A data set that was found; nobody has said yet for which network.

    Attributes:
        choice: What was asked for.
        name: For tables.
        classes: Which output each class is, where that is known; else its names in the order of their text.
        train, val: The images.
        flag: What errors name.
    """

    choice: DataChoice
    name: str
    classes: Mapping[str, int] | tuple[str, ...]
    train: Files
    val: Files
    flag: str

    def open(
        self,
        preprocessing: Preprocessing,
        num_classes: int,
        *,
        published: bool = False,
        class_indices: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> ImageSource:
        """The data set for a network; no image is read yet.

        Args:
            preprocessing: What it expects.
            num_classes: Its outputs.
            published: Whether its weights are published ones: folders whose names are integers then are in the order
                of the numbers.
            class_indices: Gives the output of each class as the network's checkpoint has it, if it does; that decides
                where it names the folders and no flag says otherwise.

        Raises:
            UserError: The network has another number of classes or channels, or the order of the classes is not known.
        """
        channels, where = preprocessing.input_size[0], f"{self.flag}: {self.choice.path}"
        if self.choice.path == DIGITS and channels != 1:
            raise UserError(f"{self.flag}: '{DIGITS}' has 1 channel, the network {channels}")
        if channels not in PIL_MODES:
            raise UserError(f"{self.flag}: images have 1 or 3 channels, not {channels}")
        classes, order = self._classes(num_classes, where, published, class_indices)
        class_names = outputs(classes, num_classes, where)
        train, val = (
            Split(
                list(files.names),
                [classes.get(name, -1) for name in files.classes],
                partial(files.load, PIL_MODES[channels]),
                preprocessing,
            )
            for files in (self.train, self.val)
        )
        return ImageSource(self.name, class_names, train, val, _options(self.choice, order))

    def _classes(
        self,
        num_classes: int,
        where: str,
        published: bool,
        class_indices: Callable[[], Mapping[str, int] | None],
    ) -> tuple[Mapping[str, int], str]:
        if isinstance(self.classes, Mapping):
            content = json.dumps(sorted(self.classes.items())).encode("utf-8", "surrogateescape")
            return self.classes, "map:" + hashlib.sha256(content).hexdigest()[:16]
        if len(self.classes) != num_classes:
            hint = "; --class_map FILE says which outputs they are" if len(self.classes) < num_classes else ""
            raise UserError(f"{where} has {len(self.classes)} classes, but the network has {num_classes}{hint}")
        order = self.choice.class_order
        if order is None and published and all_numbers(self.classes):
            order = "number"
        known = class_indices() if order is None else None
        if known is not None and set(known) == set(self.classes) and sorted(known.values()) == list(range(num_classes)):
            return known, "checkpoint"
        names, order = classes_by_text_or_number(self.classes, order, where)
        return {name: index for index, name in enumerate(names)}, order


def _options(choice: DataChoice, order: str) -> dict[str, str | int]:
    options: dict[str, str | int] = {}
    if order:
        options["class_order"] = order
    if choice.calib_path is not None:
        options["calib_from"] = f"path:{Path(choice.calib_path).resolve().name}"
    elif choice.calib_from_val is not None:
        options["calib_from"] = f"val:{choice.calib_from_val}"
    if choice.val_limit is not None:
        options["val_limit"] = choice.val_limit
    return options


def find_images(choice: DataChoice, *, flag: str = "--data_path") -> Images:
    """Find a data set and check all that can be said without a network; no image is read.

    Args:
        choice: What is asked for.
        flag: The flag that errors about the path name.

    Raises:
        UserError: Not that layout, no images, fewer than asked for, or flags that exclude each other.
    """
    _check_choice(choice)
    classes: Mapping[str, int] | tuple[str, ...]
    train: Files | None
    if choice.path == DIGITS:
        name, (classes, train, val) = DIGITS, find_digits()
    else:
        name, classes, train, val = _find_folder(choice, flag)
    if choice.calib_path is not None:
        train = _calibration_folder(choice.calib_path)
    elif choice.calib_from_val is not None:
        taken = balanced_choice(val.classes, _count("--calib_from_val", choice.calib_from_val, len(val) - 1), 0)
        train, val = val.take(taken), val.take(sorted(set(range(len(val))) - set(taken)))
    elif train is None:
        train = val  # no stage looks at images; tracing needs the shape of some
    if choice.val_limit is not None:
        val = val.take(balanced_choice(val.classes, _count("--val_limit", choice.val_limit, len(val)), 1))
    return Images(choice, name, classes, train, val, flag)


def open_images(
    data_path: str,
    preprocessing: Preprocessing,
    num_classes: int,
    *,
    flag: str = "--data_path",
    class_names: Sequence[str] | None = None,
) -> ImageSource:
    """Open a data set and check that it fits the network; no image is read yet.

    Args:
        data_path: As for `DataChoice`.
        preprocessing: What the network expects.
        num_classes: The network's outputs.
        flag: The flag that errors name.
        class_names: The class folder of each output, where that is known.

    Raises:
        UserError: As `find_images` and `Images.open`.
    """
    images = find_images(DataChoice(data_path), flag=flag)
    if class_names is not None and set(class_names) >= set(images.classes):
        images = replace(images, classes={name: index for index, name in enumerate(class_names) if name})
    return images.open(preprocessing, num_classes)


def _check_choice(choice: DataChoice) -> None:
    if choice.class_map is not None and choice.class_order is not None:
        raise UserError("--class_order has no effect here: --class_map says which output each class is")
    if choice.calib_path is not None and choice.calib_from_val is not None:
        raise UserError("--calib_from_val has no effect here: calibration images come from --calib_path")
    if choice.path == DIGITS:
        for flag, value in (("--class_map", choice.class_map), ("--class_order", choice.class_order)):
            if value is not None:
                raise UserError(f"{flag} has no effect here: '{DIGITS}' has no class folders")


def _count(flag: str, count: int, most: int) -> int:
    if not 1 <= count <= most:
        raise UserError(f"{flag}: {count} images asked for; expected 1 to {most}")
    return count


def _calibration_folder(calib_path: str) -> Files:
    folder = Path(calib_path)
    if not folder.is_dir():
        raise UserError(f"--calib_path: no folder {folder}; expected one of images")
    files = files_of_folder(folder, "--calib_path")
    if not files:
        raise UserError(f"--calib_path: no images under {folder}")
    return files


def _find_folder(
    choice: DataChoice, flag: str
) -> tuple[str, Mapping[str, int] | tuple[str, ...], Files | None, Files]:  # fmt: skip
    path = Path(choice.path)
    layout = f"expected ImageNet layout {path}/train/<class>/* and {path}/val/<class>/*"
    if not path.is_dir():
        raise UserError(f"{flag}: no folder {path}; {layout}, or '{DIGITS}'")
    own = choice.calib_path is None and choice.calib_from_val is None and choice.calibrates
    for part in ("train", "val"):
        if not (path / part).is_dir() and (part == "val" or own):
            hint = "; without one, --calib_path FOLDER or --calib_from_val N" if part == "train" else ""
            raise UserError(f"{flag}: no folder '{part}' under {path}; {layout}{hint}")
    parts = {part: files_of_classes(path, part, flag) for part in ("train", "val") if (path / part).is_dir()}
    names = sorted({name for part in parts for name in class_folders(path / part)})
    for part, files in parts.items():
        if not files and (part == "val" or own):
            problem = "no images in the class folders" if class_folders(path / part) else "no class folders"
            raise UserError(f"{flag}: {problem} under {path / part}; {layout}")
    classes: Mapping[str, int] | tuple[str, ...] = tuple(names)
    if choice.class_map is not None:
        classes = read_class_map(choice.class_map)
        lost = [name for name in names if name not in classes]
        if lost:
            raise UserError(f"--class_map: {choice.class_map} lacks the class folder {lost[0]!r} of {path}")
    return path.resolve().name, classes, parts.get("train"), parts["val"]
