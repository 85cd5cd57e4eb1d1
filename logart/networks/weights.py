"""Checkpoints from elsewhere: read safely, fetched once, checked key by key before they enter a network."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from logart.errors import UserError, one_line

WRAPPERS = ("state_dict", "model", "model_state")  # where training scripts put the state dict
COUNTER = "num_batches_tracked"  # inference never reads it, and checkpoints older than torch 0.4.1 lack it
SHOWN_KEYS = 3


def check_file(path: str | Path, *, flag: str = "--checkpoint") -> None:
    """Raise UserError where there is no file."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{flag}: {path} {problem}; expected a checkpoint file")


def read_state_dict(path: str | Path, *, flag: str = "--checkpoint") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without running any code from it (`weights_only=True`).

    Args:
        path: A .safetensors file, or anything `torch.save` wrote (.pth, .pt, .th, .tar, .bin): a plain state
            dict, or one under `state_dict` or `model`, with or without the prefix `module.` on every key.
        flag: The flag that errors name.

    Returns:
        The tensors by key, on the CPU, without the prefix.

    Raises:
        UserError: No such file, or not a checkpoint of tensors.
    """
    path = Path(path)
    check_file(path, flag=flag)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # hints to torch's developers; what matters is raised
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise UserError(f"{flag}: {path} {_why_unreadable(error)}") from error
    return _tensors(content, f"{flag}: {path}")


def fetch_state_dict(url: str, *, flag: str = "--checkpoint") -> tuple[dict[str, Tensor], str]:
    """Load a checkpoint from the hub's folder, where it is downloaded to first unless it already lies there.

    Args:
        url: Where the file is published; the last part of its path is the file's name in the hub's folder.
        flag: The flag that errors name.

    Returns:
        The tensors as `read_state_dict` gives them, and the SHA-256 of the file.

    Raises:
        UserError: The download failed (the message says which file to put where), or the file is damaged.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    try:
        content = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True, progress=sys.stderr.isatty()
        )
    except Exception as error:  # network, disk and reader, each with its own errors
        if path.is_file():
            raise UserError(f"{flag}: {path} {_why_unreadable(error)}; delete it to download {url} again") from error
        raise UserError(
            f"{flag}: could not download {url} ({one_line(error)}); "
            f"put the file {path.name} into the folder {path.parent}, or name one with {flag}"
        ) from error
    return _tensors(content, f"{flag}: {path}"), file_sha256(path)


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, flag: str, source: str) -> None:
    """Copy a state dict into a network; every key and every shape must fit.

    Args:
        model: The network; it keeps its dtype and device.
        state: Tensors by the network's own keys. Only batch norm's step counters may be missing.
        flag: The flag that errors name.
        source: What errors call the checkpoint.

    Raises:
        UserError: Keys or shapes differ; the message names the first ones, or the right class count.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        differences = [
            f"{word} {_some(keys)}" for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        raise UserError(f"{flag}: the keys of {source} do not fit the network: {'; '.join(differences)}")
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if wrong:
        raise UserError(f"{flag}: {source} {_shape_difference(expected, state, wrong)}")
    complete = OrderedDict({**expected, **state})
    # torchvision's MNASNet insists on its layout's version; the shapes, checked above, say it is this one.
    complete._metadata = expected._metadata  # type: ignore[attr-defined]
    model.load_state_dict(complete)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row-major order, as hashes take them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of keys and tensors' bytes, ordered by key: for weights that come without a file."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(tensor_bytes(state[key]))
    return digest.hexdigest()


def _tensors(content: object, where: str) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    expected = "expected a dict of tensors, plain or under 'state_dict' or 'model'"
    if not isinstance(content, Mapping) or not content:
        what = "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{where} holds {what}; {expected}")
    alien = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if alien:
        raise UserError(f"{where} holds entries that are no tensors: {_some(alien)}; {expected}")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    return {str(key).removeprefix(prefix): value for key, value in content.items()}


def _why_unreadable(error: Exception) -> str:
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"holds a {refused[1]}; only tensors are read (weights_only=True): save its state_dict() alone"
    # The unpickler's message runs over many lines and advises to read the file unsafely.
    reason = "" if "weights_only" in str(error) else f" ({one_line(error)})"
    return f"is not a checkpoint, or is damaged{reason}"


def _some(keys: Sequence[object]) -> str:
    more = len(keys) - SHOWN_KEYS
    return ", ".join(map(str, keys[:SHOWN_KEYS])) + (f" and {more} more" if more > 0 else "")


def _shape_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], wrong: Sequence[str]) -> str:
    """A class count that differs shows in the rows of the network's last layer and nowhere else."""
    pairs = [(tuple(expected[key].shape), tuple(state[key].shape)) for key in wrong]
    wanted, seen = pairs[0]
    head = next(reversed([key for key in expected if not key.endswith(COUNTER)])).rpartition(".")[0]
    only_rows = all(a[:1] == wanted[:1] and b[:1] == seen[:1] and a[1:] == b[1:] for a, b in pairs)
    if only_rows and wanted and seen and all(key.rpartition(".")[0] == head for key in wrong):
        return (
            f"has {seen[0]} classes ({wrong[0]}), but the network was built for {wanted[0]}; "
            f"expected --num_classes {seen[0]}"
        )
    return (
        f"does not fit the network: {wrong[0]} has shape {list(seen)}, expected {list(wanted)} "
        f"({len(wrong)} tensors differ in shape)"
    )
