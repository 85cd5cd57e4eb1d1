"""Checkpoints from elsewhere: read safely, fetched once, checked key by key before they enter a network."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from logart.errors import UserError, near_or_all, one_line, printable

# Where training scripts put the state dict, the likelier first, and what wrappers put before every key.
ENTRIES = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "params", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
AVERAGED = re.compile(r"ema|swa|averag", re.IGNORECASE)  # the running mean of the weights, by its usual names
NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loops", re.IGNORECASE)  # entries that hold other tensors
EXTRAS = ("n_averaged", "total_ops", "total_params")  # counters of torch's averaging and of profilers
COUNTER = "num_batches_tracked"  # inference never reads it, and checkpoints older than torch 0.4.1 lack it
SHOWN_KEYS = 3


def check_file(path: str | Path, *, flag: str = "--checkpoint") -> None:
    """Raise UserError where there is no file."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{flag}: {path} {problem}; expected a checkpoint file")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        source: The file's name, and behind a colon the entry that they are, where the file has entries.
        state: The tensors by key, on the CPU, without the prefixes that wrappers put before every key.
        sha256: Of the file.
        others: Entries that hold averaged weights (EMA, SWA) and were not taken.
    """

    source: str
    state: dict[str, Tensor]
    sha256: str
    others: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, key: str | None = None, *, flag: str = "--checkpoint") -> Checkpoint:
    """As `read_state_dict`, and which entry that was; averaged weights beside it are named in a line on stderr."""
    path = Path(path)
    entry, state, others = _read(path, key, flag)
    if others:
        taken = f"the entry {entry!r}" if entry else "the state dict"
        line = f"{path}: took {taken}; averaged weights are in {', '.join(map(repr, others))}"
        print(printable(f"{flag}: {line}: --checkpoint_key {others[0]} takes them"), file=sys.stderr)
    return Checkpoint(path.name + f":{entry}" * bool(entry), state, file_sha256(path), others)


def read_state_dict(path: str | Path, key: str | None = None, *, flag: str = "--checkpoint") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without running any code from it (`weights_only=True`).

    Args:
        path: A .safetensors file, or anything `torch.save` wrote (.pth, .pt, .th, .tar, .bin): a state dict, plain or
            in an entry, nested ones too, with or without the prefixes of `PREFIXES` on every key.
        key: The entry to take, with dots between nested ones; its last parts may be the beginning of keys, as in
            `state_dict.model`. None takes the likeliest, which is not one of averaged weights where there is another.
        flag: The flag that errors name.

    Returns:
        The tensors by key, on the CPU, without the prefixes.

    Raises:
        UserError: No such file, not a checkpoint of tensors, no such entry, or several of which none is likelier.
    """
    return _read(Path(path), key, flag)[1]


def _read(path: Path, key: str | None, flag: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The entry that was taken, its tensors, and the entries of averaged weights that were not."""
    check_file(path, flag=flag)
    return _tensors(_content(path, flag), key, f"{flag}: {path}")


def _content(path: Path, flag: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # hints to torch's developers; what matters is raised
                with torch.serialization.safe_globals(_HARMLESS):
                    return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise UserError(f"{flag}: {path} {_why_unreadable(error)}") from error


def class_indices(path: str | Path) -> dict[str, int] | None:
    """The output of each class by name, where a checkpoint says so in an entry `class_to_idx`, nested ones too."""
    if Path(path).suffix == ".safetensors":
        return None
    return _class_indices(_content(Path(path), "--checkpoint"))


def _class_indices(content: Any, depth: int = 4) -> dict[str, int] | None:
    if not isinstance(content, Mapping) or not depth:
        return None
    own = content.get("class_to_idx")
    if isinstance(own, Mapping) and own and all(type(index) is int for index in own.values()):
        return {str(name): index for name, index in own.items()}
    found = (_class_indices(value, depth - 1) for value in content.values())
    return next((indices for indices in found if indices is not None), None)


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
        with torch.serialization.safe_globals(_HARMLESS):
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
    return _tensors(content, None, f"{flag}: {path}")[1], file_sha256(path)


def _fitting_part(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first part of keys, such as `model` beside `loss`, behind which the network's own are."""
    needed = [key for key in expected if not key.endswith(COUNTER)]
    starts = dict.fromkeys(key.partition(".")[0] for key in state)
    return next((start for start in starts if all(f"{start}.{key}" in state for key in needed)), None)


# What training scripts keep beside the weights; making one of these runs no code of the file.
_SCALAR: Any = np.float64(0).__reduce__()[0]  # type: ignore[call-arg]
_HARMLESS: list[Any] = [
    (SimpleNamespace, "argparse.Namespace"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")},
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


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
        part = _fitting_part(state, expected)
        hint = f"; --checkpoint_key {part} takes those that fit" if part else ""
        raise UserError(f"{flag}: the keys of {source} do not fit the network: {'; '.join(differences)}{hint}")
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


def _tensors(content: object, key: str | None, where: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    found = dict(_entries(content, ""))
    if key is not None:
        state = _entry(found, key)
        if state is None:
            names = list(filter(None, found))
            hint = near_or_all(key, names) if names else "it holds a plain state dict"
            raise UserError(f"{where} has no entry {key!r}; {hint}")
        return key, _without_prefixes(state), ()
    if not found:
        raise UserError(f"{where} holds {_what(content)}; expected a dict of tensors, plain or in an entry")
    averaged = [entry for entry in found if AVERAGED.search(entry)]
    plain = [entry for entry in found if entry not in averaged] or averaged
    likely = [entry for name in ("", *ENTRIES) for entry in plain if entry.rpartition(".")[2] == name]
    if not likely and len(plain) > 1:
        raise UserError(f"{where} has several entries of tensors: {_some(plain)}; expected --checkpoint_key with one")
    taken = (likely or plain)[0]
    return taken, _without_prefixes(found[taken]), tuple(entry for entry in averaged if entry != taken)


def _entries(content: object, path: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every state dict of a checkpoint by where it is, with dots between the parts."""
    if not isinstance(content, Mapping) or NO_WEIGHTS.search(path):
        return
    tensors = {k: value for k, value in content.items() if isinstance(k, str) and isinstance(value, Tensor)}
    others = [k for k, value in content.items() if not isinstance(value, Tensor)]
    if tensors and not [k for k in others if not isinstance(content[k], Mapping)]:
        yield path, tensors
    for name in others:
        if isinstance(name, str):
            yield from _entries(content[name], f"{path}.{name}".removeprefix("."))


def _entry(found: Mapping[str, dict[str, Tensor]], key: str) -> dict[str, Tensor] | None:
    """The entry, or the part of one whose keys begin with the last parts of `key`."""
    key = key.rstrip(".")
    if key in found:
        return found[key]
    for entry, state in found.items():
        start = key.removeprefix(f"{entry}." if entry else "") + "."
        part = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        if part and (not entry or key.startswith(f"{entry}.")):
            return part
    return None


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what wrappers add: prefixes that all keys have, in any nesting, and counters."""
    state = {name: value for name, value in state.items() if name.rpartition(".")[2] not in EXTRAS}
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in state.items()}
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _what(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dict"
    return f"entries that are no tensors: {_some([k for k in content if not isinstance(content[k], Tensor)])}"


def _why_unreadable(error: Exception) -> str:
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"holds a {refused[1]}; only tensors are read (weights_only=True): save its state_dict() alone"
    if "TorchScript" in str(error):
        return "is a TorchScript archive; expected the state_dict() of the network"
    # The unpickler's message runs over many lines and advises to read the file unsafely.
    reason = "" if "weights_only" in str(error) else f" ({one_line(error)})"
    return f"is not a checkpoint, or is damaged{reason}"


def _some(keys: Sequence[object]) -> str:
    more = len(keys) - SHOWN_KEYS
    return ", ".join(map(str, keys[:SHOWN_KEYS])) + (f" and {more} more" if more > 0 else "")


def _shape_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], wrong: Sequence[str]) -> str:
    """A class count that differs shows in the rows of the network's last layer and nowhere else."""
    pairs = [(tuple(expected[key].shape), tuple(state[key].shape)) for key in wrong]
    target, seen = pairs[0]
    head = next(reversed([key for key in expected if not key.endswith(COUNTER)])).rpartition(".")[0]
    only_rows = all(a[:1] == target[:1] and b[:1] == seen[:1] and a[1:] == b[1:] for a, b in pairs)
    if only_rows and target and seen and all(key.rpartition(".")[0] == head for key in wrong):
        return (
            f"has {seen[0]} classes ({wrong[0]}), but the network was built for {target[0]}; "
            f"expected --num_classes {seen[0]}"
        )
    return (
        f"does not fit the network: {wrong[0]} has shape {list(seen)}, expected {list(target)} "
        f"({len(wrong)} tensors differ in shape)"
    )
