"""Images in: data sets as a network sees them, evaluation batches streamed from `val`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from logart.errors import UserError, one_line
from logart.interrupt import processes_without_interrupt

DIGITS = "digits"
DIGITS_VAL_IMAGES = 500
DIGITS_SPLIT_SEED = 0
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

    def augmented(self, index: int) -> Tensor:
        """The item [C, H, W] cropped and flipped at random, by torch's global generator."""
        return self._augmentation(self._load(self.names[index]))


@dataclass(frozen=True)
class ImageSource:
    """A data set: its name for tables, its classes, and its two halves."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split


def open_images(
    data_path: str, preprocessing: Preprocessing, num_classes: int, *, flag: str = "--data_path"
) -> ImageSource:
    """Open a data set and check that it fits the network; no image is read yet.

    Args:
        data_path: A folder in ImageNet layout (`train/<class>/*`, `val/<class>/*`), or 'digits'.
        preprocessing: What the network expects.
        num_classes: The network's classes.
        flag: The flag that errors name.

    Raises:
        UserError: Not that layout, no images, or another number of classes or channels than the network has.
    """
    open_source = _open_digits if data_path == DIGITS else _open_folder
    source = open_source(data_path, preprocessing, flag)
    seen = len(source.class_names)
    if seen != num_classes:
        raise UserError(f"{flag}: {data_path} has {seen} classes, but the network has {num_classes}")
    return source


def validation_batches(source: ImageSource, batch_size: int, workers: int) -> DataLoader:
    """Stream the validation images in order.

    Args:
        source: The data set.
        batch_size: Images a batch; the last batch may be smaller.
        workers: Processes that read images; 0 reads in this one.

    Returns:
        A loader of (float32 [b, C, H, W], int64 [b]); iterating raises UserError at an image that cannot be
        read, and leaves torch's global generator as it is.
    """
    generator = torch.Generator()  # without one, every pass would draw a seed from the global generator
    return _ValidationLoader(
        _ErrorsAsItems(source.val), batch_size, num_workers=workers, collate_fn=_collate, generator=generator
    )


def split_digits(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fixed split of the digits: 500 for validation, of every class its share; the others for training.

    Args:
        labels: [n], the classes of all digits.

    Returns:
        The indices of the training images and those of the validation images, ascending.
    """
    shuffled = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    quota = np.arange(len(labels) + 1) * DIGITS_VAL_IMAGES // len(labels)
    is_val = np.diff(quota) == 1  # evenly spaced over the classes
    return np.sort(by_class[~is_val]), np.sort(by_class[is_val])


def _open_digits(data_path: str, preprocessing: Preprocessing, flag: str) -> ImageSource:
    if preprocessing.input_size[0] != 1:
        raise UserError(f"{flag}: '{data_path}' has 1 channel, the network {preprocessing.input_size[0]}")
    from sklearn.datasets import load_digits  # slow to import, and only the built-in data needs it

    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)
    load = partial(_load_digit, pixels)
    train, val = (
        Split([f"{DIGITS}/{part}/{i}" for i in indices], digits.target[indices].tolist(), load, preprocessing)
        for part, indices in zip(("train", "val"), split_digits(digits.target), strict=True)
    )
    return ImageSource(DIGITS, tuple(map(str, digits.target_names)), train, val)


def _load_digit(pixels: np.ndarray, name: str) -> Image.Image:
    return Image.fromarray(pixels[int(name.rpartition("/")[2])])  # in mode F, which ToTensor does not rescale


def _open_folder(data_path: str, preprocessing: Preprocessing, flag: str) -> ImageSource:
    path = Path(data_path)
    layout = f"expected ImageNet layout {path}/train/<class>/* and {path}/val/<class>/*"
    if not path.is_dir():
        raise UserError(f"{flag}: no folder {path}; {layout}, or '{DIGITS}'")
    if preprocessing.input_size[0] not in PIL_MODES:
        raise UserError(f"{flag}: images have 1 or 3 channels, not {preprocessing.input_size[0]}")
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise UserError(f"{flag}: no folder '{part}' under {path}; {layout}")
    load = partial(_load_file, path, PIL_MODES[preprocessing.input_size[0]], flag)
    train_classes, train = _folder_split(path, "train", load, preprocessing, flag)
    val_classes, val = _folder_split(path, "val", load, preprocessing, flag)
    alone = sorted(set(train_classes) ^ set(val_classes))
    if alone:
        part = "train" if alone[0] in train_classes else "val"
        raise UserError(f"{flag}: under {path}, only '{part}' has the class '{alone[0]}'")
    return ImageSource(path.resolve().name, tuple(train_classes), train, val)


def _folder_split(
    path: Path, part: str, load: Callable[[str], Image.Image], preprocessing: Preprocessing, flag: str
) -> tuple[list[str], Split]:
    try:
        folder = ImageFolder(str(path / part))
    except FileNotFoundError as error:  # no class folders, or one without images
        reason = str(error).split("Supported")[0].strip()
        raise UserError(f"{flag}: no images under {path / part} ({reason})") from error
    start = len(str(path / part)) + 1
    names = [f"{part}/{file[start:].replace(os.sep, '/')}" for file, _ in folder.samples]
    return folder.classes, Split(names, folder.targets, load, preprocessing)


def _load_file(root: Path, mode: str, flag: str, name: str) -> Image.Image:
    try:
        with Image.open(root / name) as image:
            return image.convert(mode)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{flag}: cannot read the image {root / name} ({one_line(error)})") from error


class _ErrorsAsItems(Dataset):
    """Hands an unreadable image on as a value: torch would wrap what a worker raises in a long traceback."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        try:
            return self._split[index]
        except UserError as error:
            return error


def _collate(items: Sequence[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


class _ValidationLoader(DataLoader):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        with processes_without_interrupt():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
