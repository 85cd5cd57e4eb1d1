"""A quantized network to a packed file and back, bit for bit the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from logart.errors import UserError, one_line
from logart.grids.activations import MAX_BITS_A
from logart.networks.builders import find_builder
from logart.networks.weights import COUNTER
from logart.packed.file import PackedFile, PackedFileError
from logart.packed.layer import PackedLayer
from logart.quantization import surgery
from logart.quantization.activation_quantizer import INPUT, ActivationQuantizer, attach, quantizers
from logart.quantization.baking import plain_layer
from logart.quantization.clone import clone_sharing
from logart.quantization.flow import memory_of
from logart.quantization.folding import drop_batch_norms, replace_module
from logart.quantization.layers import (
    find_parameter,
    is_quantized,
    quantize_parameter,
    quantized_weight,
    read_off,
    run_on_levels,
)
from logart.quantization.layout import Layout, WeightUse
from logart.quantization.products import operand_place
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.survey import is_plain
from logart.text import table

# Arguments of timm's that read files or the network; none of them changes which parameters a network has.
_FORBIDDEN = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_PLAIN = {"Conv2d": nn.Conv2d, "Conv2dSame": Conv2dSame, "Linear": nn.Linear}
DEQUANTIZE = ("once", "on-the-fly")


@dataclass(frozen=True)
class SizeTable:
    """Bytes of each part of a network, in float and packed.

    Attributes:
        parts: name of the part, bytes in float, bytes packed.
    """

    parts: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        total = ("file", sum(part[1] for part in self.parts), sum(part[2] for part in self.parts))
        rows = [
            (name, f"{before} B", f"{after} B", f"{before / after:.1f}×" if before and after else None)
            for name, before, after in (*self.parts, total)
        ]
        return table(("part", "float", "packed", "ratio"), rows, text=("part",))


def save_packed(model: nn.Module, path: str | Path, info: Mapping[str, Any] | None = None) -> SizeTable:
    """Write a quantized network to a packed file, atomically.

    Args:
        model: as `quantize_model` or `load_packed` gives it.
        path: the file, .safetensors; one that is there is replaced.
        info: what to keep beside the network, as JSON can say it; without it, what the model came with
            (`model.packed_info`).

    Returns:
        What takes how much.

    Raises:
        ValueError: nothing in it is quantized, a layer is not rounded yet or was moved to another type since, or the
            info is no JSON.
        OSError: the file cannot be written.
    """
    file = to_packed(model, info)
    size = file.write(path)
    weights = sum(layer.shape.numel() for layer in file.layers.values())
    codes, books = (sum(layer.n_bytes()[i] for layer in file.layers.values()) for i in (0, 1))
    rest = sum(t.nbytes for t in file.rest.values())
    parts = (
        ("quantized weights", 4 * weights, codes),
        ("codebooks", 0, books),
        ("everything else", rest, rest),
        ("names and settings", 0, size - codes - books - rest),
    )
    return SizeTable(parts)


def to_packed(model: nn.Module, info: Mapping[str, Any] | None = None) -> PackedFile:
    """What `save_packed` writes."""
    layers: dict[str, PackedLayer] = {}
    for name, layer in surgery.quantized_layers(model).items():
        try:
            layers[_entry_name(name, layer)] = packed_layer(layer)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer")
    info = getattr(model, "packed_info", {}) if info is None else info
    return PackedFile(layers, _rest(model), dict(info))


def _entry_name(name: str, layer: QuantizedWeight) -> str:
    """What a layer is called in a file: by its parameter's full name, where the module has tensors beside its bias."""
    own = layer.module
    beside = {*own._parameters, *own._buffers} - {"bias"}
    return f"{name}.weight" if beside and is_quantized(own) and quantized_weight(own) is layer else name


def packed_layer(layer: QuantizedWeight) -> PackedLayer:
    """A layer as a packed file holds it; ValueError while it is not rounded."""
    codes, spec = layer.packed()
    as_it_lies = layer.layout.is_plain and layer.shape == layer.parameter_shape
    kind, layout = type(layer.module).__name__, None if as_it_lies else layer.layout
    return PackedLayer(kind, layer.shape, layer.n_bits, layer.dtype, codes, spec, layout)


def load_packed(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dequantize: str = "once",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network of a packed file, in eval mode; its logits are bit for bit those of the network that was saved.

    Args:
        path: the file.
        model: for networks that were not built by the entry points, the float network that was quantized, with any
            weights; it is not changed.
        dequantize: "once" expands all weights now; "on-the-fly" keeps codes packed and expands each layer's weight
            when its forward reads it: slower, in about the file's size of memory.
        device: where the result is.

    Returns:
        The network; `packed_info` is what the file knows of it.

    Raises:
        PackedFileError: a file that cannot be read, that names no network where `model` is not given, or that does not
            fit the network.
        ValueError: another `dequantize`.
    """
    if dequantize not in DEQUANTIZE:
        raise ValueError(f"dequantize must be one of {', '.join(DEQUANTIZE)}, got {dequantize!r}")
    file = PackedFile.read(path)
    try:
        model = _build(file) if model is None else clone_sharing(model)
        _restore(model, file, dequantized_weight=dequantize == "once")
    except UserError as error:
        raise PackedFileError(f"{path}: {error}") from error
    model.packed_info = file.info  # type: ignore[assignment]
    return model.eval().requires_grad_(False).to(device)


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Everything in a network's state that is not a quantized weight."""
    modules = model.named_modules(remove_duplicate=False)
    quantized = {name for name, module in modules if isinstance(module, QuantizedWeight)}
    state = model.state_dict()
    rest = {}
    for name, value in state.items():
        if name.rpartition(".")[0].removesuffix(".soft") in quantized:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} of the network's state is no tensor")
        rest[name] = value
    return rest


def _restore(model: nn.Module, file: PackedFile, *, dequantized_weight: bool) -> None:
    """Make a float network the one that was saved: batch norms that were folded go, layers get their codes."""
    drop_batch_norms(model, keep=lambda name: f"{name}.running_mean" in file.rest)
    modules = dict(model.named_modules())
    for name, packed in file.layers.items():
        layer: Any = modules.get(name)
        if isinstance(layer, nn.Conv2d | nn.Linear) and not is_plain(layer) and packed.kind in _PLAIN:  # baked
            layer = plain_layer(layer, _PLAIN[packed.kind], layer.weight.detach(), layer.bias)
            replace_module(model, name, layer)
        owner = name if name in modules else name.rpartition(".")[0]
        bias = file.rest.get(f"{owner}.bias".lstrip("."))
        _restore_layer(model, name, packed, bias, dequantized_weight)
    _restore_quantizers(model, file)
    state = _rest(model)
    for name, tensor in state.items():
        given = file.rest.get(name)
        if given is None and name.endswith(COUNTER):
            continue
        if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
            seen = "nothing" if given is None else f"{list(given.shape)} {given.dtype}"
            raise PackedFileError(f"the file has {seen} for {name}, the network {list(tensor.shape)} {tensor.dtype}")
    stray = [name for name in file.rest if name not in state]
    if stray:
        raise PackedFileError(f"the network has no {stray[0]:.80}")
    rest = OrderedDict(file.rest)
    rest._metadata = model.state_dict()._metadata  # type: ignore[attr-defined] # torchvision's MNASNet insists on it
    model.load_state_dict(rest, strict=False, assign=True)  # the float network's own tensors stay as they are


def _restore_layer(model: nn.Module, name: str, packed: PackedLayer, bias: Tensor | None, dequantize: bool) -> None:
    """Let a layer read its weight off packed codes, and make room for its bias."""
    try:
        module, own = find_parameter(model, name)
    except AttributeError:
        module, own = model, ""
    if not own or type(module).__name__ != packed.kind or is_quantized(module, own):
        raise PackedFileError(f"the network has no {packed.kind} {name}")
    parameter = module._parameters[own]
    assert parameter is not None
    layout = packed.layout or Layout(tuple(packed.shape), tuple(range(len(packed.shape))))
    fits = parameter.shape == packed.shape if packed.layout is None else parameter.numel() == packed.shape.numel()
    if not fits or parameter.dtype != packed.dtype:
        seen, expected = (f"{list(t.shape)} {t.dtype}" for t in (parameter, packed))
        raise PackedFileError(f"layer {name} is {seen} in the network, {expected} in the file")
    if own == "weight" and "bias" in module._parameters:
        held = module._parameters["bias"]
        fits = held is None if bias is None else (bias.shape, bias.dtype) == (packed.shape[:1], packed.dtype)
        if not fits:
            seen = "no bias" if bias is None else f"a bias {list(bias.shape)} {bias.dtype}"
            raise PackedFileError(f"layer {name} has {seen} in the file, weights {list(packed.shape)} {packed.dtype}")
        module._parameters["bias"] = None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)
    same = surgery.holders(model)[memory_of(parameter)]
    use = replace(WeightUse.by_module(module, own), layout=layout)
    quantized = quantize_parameter(module, own, packed.n_bits, packed.spec.channels, use)
    quantized.set_packed(packed.codes, packed.spec, dequantized_weight=dequantize)
    for other, its in same:
        if (other, its) != (module, own):
            read_off(other, its, quantized)


def _restore_quantizers(model: nn.Module, file: PackedFile) -> None:
    """Put activation quantizers where the file has levels of one."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.rest.items():
        owner, _, kind = name.rpartition(".")
        own = owner.rpartition(".")[2]
        if own.endswith(INPUT) or operand_place(own) is not None:
            found.setdefault(owner, {})[kind] = tensor
    modules = dict(model.named_modules())
    for owner in found:
        name, _, own = owner.rpartition(".")
        module, parameter = modules.get(name), own.removesuffix(f"_{INPUT}")
        if module is not None and own == INPUT and is_quantized(module):
            attach(module, MAX_BITS_A)
        elif module is not None and (is_quantized(module, parameter) or operand_place(own) is not None):
            module.add_module(own, ActivationQuantizer(MAX_BITS_A, torch.device("cpu")).train(module.training))
            if operand_place(own) is not None:
                run_on_levels(module)
    known = quantizers(model)
    for name, tensors in found.items():
        if name not in known:
            raise PackedFileError(f"the network has nothing that {name:.80} belongs to")
        try:
            known[name].take(tensors)
        except ValueError as error:
            raise PackedFileError(f"{name:.80}: {error}") from error


def _build(file: PackedFile) -> nn.Module:
    """The network that a file names, without weights; built only once its size is known to be the file's."""
    recipe = file.info.get("network")
    if not isinstance(recipe, dict):
        raise PackedFileError("names no network; pass model=, the float network that was quantized")
    build = find_builder(str(recipe.get("track")))
    if build is None:
        raise PackedFileError(
            f"no builder of track {recipe.get('track')!r:.40}: install LogART (pip install -e .), import the module "
            "that calls logart.networks.builders.register_builder for it, or pass model=, the float network"
        )
    arch, kwargs = recipe.get("arch"), recipe.get("model_kwargs")
    counts = {name: recipe.get(name) for name in ("num_classes", "input_size")}
    if isinstance(size := counts["input_size"], list) and len(size) == 2:
        counts["input_size"] = tuple(size)
    if not (isinstance(arch, str) and isinstance(kwargs, dict) and can_be_loaded(kwargs)) or not all(
        value is None or (type(value) is int and 0 < value < 2**20)
        for count in counts.values()
        for value in (count if isinstance(count, tuple) else (count,))
    ):
        raise PackedFileError("has a damaged description of its network; pass model=, the float network")
    shapes = {f"{name}.weight": torch.empty(layer.shape, device="meta") for name, layer in file.layers.items()}
    try:
        with _bounded(file):
            model: nn.Module = build(arch, shapes=shapes, model_kwargs=kwargs, **counts)
    except Exception as error:  # whatever the network's own constructor raises
        raise PackedFileError(
            f"the network {arch:.80} cannot be built ({one_line(error):.160}); with another release of timm or "
            f"torchvision than the one it was saved with ({file.info.get('versions')!r:.120}) pass model="
        ) from error
    return model.eval().float()


def can_be_loaded(kwargs: Any, depth: int = 8) -> bool:
    """Whether `load_packed` builds a network with such arguments, as JSON says them: small, none that reads a file."""
    if isinstance(kwargs, dict):
        inside: list[Any] = list(kwargs.values())
        return not set(kwargs) & set(_FORBIDDEN) and depth > 0 and all(can_be_loaded(v, depth - 1) for v in inside)
    if isinstance(kwargs, list):
        return len(kwargs) <= 64 and depth > 0 and all(can_be_loaded(v, depth - 1) for v in kwargs)
    return kwargs is None or isinstance(kwargs, bool | float | str) or (type(kwargs) is int and abs(kwargs) < 2**20)


class _Bounded(TorchFunctionMode):
    """Stops a network from being built that is far larger than the file that claims to hold it."""

    def __init__(self, elements: int, calls: int) -> None:
        super().__init__()
        self._elements, self._calls = elements, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self._calls -= 1
            self._elements -= func(*args, **{**kwargs, "device": "meta"}).numel()
            if min(self._calls, self._elements) < 0:
                raise ValueError("it is larger than the file")
        return func(*args, **kwargs)


_FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace, torch.eye,
}  # fmt: skip


@contextmanager
def _bounded(file: PackedFile) -> Iterator[None]:
    sizes = [math.prod(layer.shape) for layer in file.layers.values()] + [t.numel() for t in file.rest.values()]
    # Batch norms, folded before saving, and buffers that are not saved come on top.
    with _Bounded(16 * sum(sizes) + 2**22, 64 * len(sizes) + 2**12):
        yield
