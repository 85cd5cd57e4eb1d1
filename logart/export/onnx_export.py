"""A packed network as an ONNX file about as small: codes stay packed, operators expand them in the graph.

Each quantized layer's weight is the output `network.LAYER.weight` of one node, called LAYER. On grids that are not
linear it is a `logart.Decode`, a function that the file itself defines by standard operators (`onnx_graph`), of

    network.LAYER.weight.codes   [groups, n] uint8   8 codes of n bits in n bytes, at every width from 2 to 8 bits
    network.LAYER.weight.row     [C]                 which row of the table a channel's levels are
    network.LAYER.weight.factor  [C]                 what that row is multiplied by
    rows.nBIT, values.nBIT       [R, 2^n], [U]       the table: rows of unit levels, as places in a list of values

Units times factor are computed in float64 and cast to float32 once, as the codebooks' own levels are, so weights equal
the packed file's bit for bit. A unit level is a level over the power of two (and the scale) of its channel: few rows
serve all channels. On linear grids the node is a `DequantizeLinear` of codes in uint4 (2 to 4 bits) or uint8, with
a float32 scale and a zero point a channel, which runtimes with integer kernels know; its weights are off by a rounding,
and quantized activations are pairs of nodes that such kernels need, too (`onnx_activations`).

The graph around the weights comes from torch's TorchScript exporter: the other one cannot export on all supported
versions of torch. The weights are inputs of the network it sees, so no float weight ever enters a file.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logart.errors import UserError, one_line
from logart.files import write_atomically
from logart.grids.linear import LinearGrid
from logart.networks.image_info import input_size_of
from logart.packed.checkpoint import SizeTable, load_packed, to_packed
from logart.packed.layer import PackedLayer
from logart.quantization.activation_quantizer import quantizers
from logart.quantization.surgery import quantized_layers

try:
    import onnx
    from onnx import TensorProto, helper, version_converter

    from logart.export.onnx_activations import OPSET_INT16, add_pair, count_ties, even_quantizers, is_marked, mark
    from logart.export.onnx_file import OnnxFile, compare
    from logart.export.onnx_graph import (
        DECODE,
        DOMAIN,
        Graph,
        Tables,
        decode_attributes,
        decode_function,
        smallest_type,
    )
except ImportError as error:
    _MISSING = str(error)
else:
    _MISSING = ""

OPSETS = range(18, 24)  # 18 is the first with BitwiseAnd
OPSET, OPSET_INT4 = 18, 21  # what it takes without and with 4-bit integers
METADATA = "logart"  # the property that holds the packed file's info, as JSON


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    opset: int | None = None,
    half: bool = False,
) -> OnnxFile:
    """Write a packed network as ONNX: input `images` [batch, C, H, W], output `logits`; any batch size.

    The file is run by onnxruntime and compared with torch before it is kept; it is written atomically.

    Args:
        source: the packed file.
        out: the file to write, .onnx; one that is there is replaced.
        model: as for `load_packed`.
        opset: of the standard operators, one of `OPSETS`; None is 18, or 21 where linear grids have 4 bits or fewer,
            whose codes are whole bytes below 21, or activations more than 8.
        half: compute in float16, images and logits too, in place of float32.

    Raises:
        UserError: the extra [onnx] is not installed, `out` cannot be written, the file cannot be read, does not say
            how large its images are, has weights that are not float32, or holds a network that torch cannot export.
    """
    check_target(out)
    out = Path(out)
    network = load_packed(source, model)
    packed = to_packed(network)
    for name, layer in packed.layers.items():
        if layer.dtype is not torch.float32:
            raise UserError(f"--onnx: {source}: layer {name} has weights of {layer.dtype}; expected torch.float32")
        if layer.layout is not None or name not in quantized_layers(network):
            why = "beside other tensors of its module"
            why = why if layer.layout is None else "whose channels do not come first"
            raise UserError(f"--onnx: {source}: {name} is a weight {why}, which is not exported yet")
    try:
        size = input_size_of(packed.info)
    except ValueError as error:
        raise UserError(
            f"--onnx: {source} {error}; expected a file that a run saved with --save, or "
            'info={"preprocessing": {"input_size": [channels, height, width]}} given to save_packed'
        ) from None
    # Where weights are not linear onnxruntime would put them on 8-bit linear grids behind such a pair.
    pairs = all(is_affine(layer, half) for layer in packed.layers.values())
    wide = max((quantizer.n_bits for quantizer in even_quantizers(network).values() if pairs), default=0)
    opset = _opset(opset, packed.layers, wide, half)
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected = network(images.clone())  # some networks normalise in place
        quantized, ties, values = bool(quantizers(network)), 0, 0
        if pairs:
            ties, values = count_ties(network, images)
            mark(network)
        traced = _trace(network.half() if half else network, size, opset)
    except Exception as error:  # whatever the network's forward or the exporter raises
        raise UserError(f"--onnx: {source}: torch cannot export the network ({one_line(error):.200})") from error
    exported = _with_weights(traced, packed.layers, opset, half)
    helper.set_model_props(exported, {METADATA: json.dumps(packed.info, ensure_ascii=False, separators=(",", ":"))})
    onnx.checker.check_model(exported, full_check=True)
    data = exported.SerializeToString()
    # Float rounding stays far below; a graph in which tracing froze something is off by far more. Of quantized
    # activations, one at a border goes to the other level by the last bit of a float sum, in float16 many do.
    tolerance = (0.5 if quantized else 3e-2) if half else (0.1 if quantized else 1e-4)
    differences = compare(data, images, expected, half, tolerance, source)
    try:
        write_atomically(out, data)
    except OSError as error:
        raise UserError(f"--onnx: {str(out)!r} cannot be written ({one_line(error)})") from error
    sizes = _sizes(packed.layers, exported, len(data))
    return OnnxFile(sizes, *differences, float(expected.abs().max()), opset, ties, values)


def _opset(asked: int | None, layers: Mapping[str, PackedLayer], wide: int, half: bool) -> int:
    """The opset asked for, or the least that does; `wide` is the bits of the widest activations that get a pair."""
    if wide > 8 and asked is not None and asked < OPSET_INT16:
        raise UserError(f"--opset: activations of {wide} bits need {OPSET_INT16} or more, got {asked}")
    if asked is not None:
        return asked
    short = any(is_affine(layer, half) and layer.n_bits <= 4 for layer in layers.values())
    return OPSET_INT4 if short or wide > 8 else OPSET


def is_affine(layer: PackedLayer, half: bool) -> bool:
    """Whether `DequantizeLinear` gives a layer's levels, but for a rounding: a linear grid whose steps are normal."""
    if not isinstance(layer.spec.grid, LinearGrid):
        return False
    step, limits = layer.spec.columns["step"], torch.finfo(torch.float16 if half else torch.float32)
    return bool(((step == 0) | (step >= limits.tiny) & (step * 2**layer.n_bits <= limits.max)).all())


def check_target(out: str | Path) -> None:
    """Raise UserError where the extra is missing or `out` is no place for the file."""
    if _MISSING:
        raise UserError(f"--onnx: needs the extra [onnx] ({_MISSING}); install logart[onnx]")
    out = Path(out)
    if out.suffix != ".onnx" or out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--onnx: {str(out)!r}; expected a file that ends in .onnx, in a folder that exists")


class _Opened(nn.Module):
    """A network whose quantized weights are arguments, in the order of its layers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._layers = tuple(quantized_layers(network).values())  # a tuple: known to torch under one name only

    def forward(self, images: Tensor, *weights: Tensor) -> Tensor:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.dequantized_weight = weight
        return self.network(images)  # type: ignore[no-any-return]


def _weight_name(layer: str) -> str:
    return f"network.{layer}.weight"  # as the exporter calls biases in `_Opened`


@torch.no_grad()
def _trace(network: nn.Module, size: tuple[int, ...], opset: int) -> Any:
    """The network as an ONNX model whose quantized weights are inputs."""
    layers = quantized_layers(network)
    weights = [layer.weight for layer in layers.values()]
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tracing could get wrong; `_compare` sees whether it did
            torch.onnx.export(
                _Opened(network).eval(),  # the exporter leaves all of it in the mode of the outermost module
                (torch.zeros(2, *size, dtype=weights[0].dtype), *weights),
                file,  # type: ignore[arg-type] # a path, says its signature, but this exporter writes to any file
                dynamo=False,
                opset_version=OPSET,
                input_names=["images", *map(_weight_name, layers)],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
    finally:
        for layer, weight in zip(layers.values(), weights, strict=True):
            layer.dequantized_weight = weight
    traced = onnx.load_from_string(file.getvalue())
    return traced if opset == OPSET else version_converter.convert_version(traced, opset)


def _with_weights(traced: Any, layers: Mapping[str, PackedLayer], opset: int, half: bool) -> Any:
    """The traced model with its weights made from codes in place of stored."""
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    tables, channels, graph = Tables(), {}, Graph()
    decoded = {name: layer for name, layer in layers.items() if not is_affine(layer, half)}
    for name, layer in decoded.items():
        units, factor = layer.spec.grid.units(layer.spec, layer.n_bits, torch.float32)
        channels[name] = (tables.places(units, layer.n_bits), factor)
    table_names = tables.add_to(graph)
    for name, layer in layers.items():
        if name in decoded:
            _decode(graph, name, layer, table_names[layer.n_bits], *channels[name])
        else:
            _dequantize_linear(graph, name, layer, opset, to, wide=any(map(is_marked, traced.graph.node)))
    old = traced.graph
    for node in old.node:
        if is_marked(node):
            add_pair(graph, node, to)
        else:
            graph.nodes.append(node)
    nodes, constants = graph.nodes, [*graph.constants, *old.initializer]
    shapes = [helper.make_tensor_value_info(_weight_name(name), to, layer.shape) for name, layer in layers.items()]
    shapes += old.value_info
    made = helper.make_graph(nodes, "network", old.input[:1], old.output, constants, value_info=shapes)
    imports = [helper.make_opsetid("", opset)]
    functions = []
    if decoded:
        imports.append(helper.make_opsetid(DOMAIN, 1))
        functions.append(decode_function(opset, to))
    ir_version = max(traced.ir_version, 10 if opset >= OPSET_INT4 else 8)
    return helper.make_model(
        made, opset_imports=imports, functions=functions, ir_version=ir_version, producer_name="logart"
    )


def _decode(graph: Graph, name: str, layer: PackedLayer, table: str, places: np.ndarray, factor: Tensor) -> None:
    """The node for a layer whose levels come from a table."""
    weight, n_bits, count = _weight_name(name), layer.n_bits, layer.shape.numel()
    packed = np.pad(layer.codes.numpy(), (0, -len(layer.codes) % n_bits)).reshape(-1, n_bits)
    exact = torch.equal(factor.float().double(), factor)
    graph.node(
        DECODE,
        graph.constant(packed, np.uint8, f"{weight}.codes"),
        graph.constant(places, smallest_type(int(places.max()) + 1), f"{weight}.row"),
        graph.constant(factor[:, None], np.float32 if exact else np.float64, f"{weight}.factor"),
        table,
        output=weight,
        name=name,
        domain=DOMAIN,
        **decode_attributes(n_bits, count, [layer.spec.channels, count // layer.spec.channels], list(layer.shape)),
    )


def _dequantize_linear(graph: Graph, name: str, layer: PackedLayer, opset: int, to: int, wide: bool) -> None:
    """The node for a layer on a linear grid; `wide` has it read 4-bit codes as 8-bit ones, as integer kernels do."""
    weight, rows = _weight_name(name), layer.shape[0] // layer.spec.channels
    kind = TensorProto.UINT4 if layer.n_bits <= 4 and opset >= OPSET_INT4 else TensorProto.UINT8
    step, zero_point = (layer.spec.columns[key].repeat_interleave(rows) for key in ("step", "zero_point"))
    scale = step.numpy().astype(np.float16 if to == TensorProto.FLOAT16 else np.float32)
    codes, zero = (
        graph.integers(values.numpy(), kind, f"{weight}.{part}")
        for values, part in ((layer.unpacked(), "codes"), (zero_point, "row"))
    )
    if wide and kind == TensorProto.UINT4:
        codes, zero = (graph.cast(tensor, TensorProto.UINT8) for tensor in (codes, zero))
    scale_name = graph.constant(scale, scale.dtype, f"{weight}.factor")
    graph.node("DequantizeLinear", codes, scale_name, zero, output=weight, name=name, axis=0)


def _sizes(layers: Mapping[str, PackedLayer], exported: Any, total: int) -> SizeTable:
    """Bytes by part; constants that are neither codes nor tables are the network's own parameters."""
    sizes = {c.name: len(c.raw_data) or len(c.SerializeToString()) for c in exported.graph.initializer}
    own = {_weight_name(name) for name in layers}
    codes = sum(sizes.pop(f"{name}.codes") for name in own)
    books = sum(sizes.pop(f"{name}.{part}") for name in own for part in ("row", "factor"))
    books += sum(size for name, size in sizes.items() if name.startswith(("rows.", "values.")))
    rest = sum(size for name, size in sizes.items() if name.startswith("network."))
    weights = sum(layer.shape.numel() for layer in layers.values())
    return SizeTable(
        (
            ("quantized weights", 4 * weights, codes),
            ("codebooks", 0, books),
            ("everything else", rest, rest),
            ("graph and settings", 0, total - codes - books - rest),
        )
    )
