"""A packed network as an ONNX file about as small: codes stay packed, standard operators expand them in the graph.

Each quantized layer's weight is the output `network.LAYER.weight` of a few nodes on two constants and a shared table:

    network.LAYER.weight.codes   [groups, n] uint8   8 codes of n bits in n bytes, at every width from 2 to 8 bits
    network.LAYER.weight.row     [C]                 which row of the table a channel's levels are
    network.LAYER.weight.factor  [C]                 what that row is multiplied by
    rows.nBIT, values.nBIT       [R, 2^n], [U]       the table: rows of unit levels, as places in a list of values

Units times factor are computed in float64 and cast to float32 once, as the codebooks' own levels are, so weights equal
the packed file's bit for bit. A unit level is a level over the power of two (and the scale) of its channel, or, on
linear grids, how many steps it is from zero: few rows serve all channels.

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
from logart.networks.image_info import input_size_of
from logart.packed.checkpoint import SizeTable, load_packed, to_packed
from logart.packed.layer import PackedLayer
from logart.quantization.surgery import quantized_layers

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    from logart.export.onnx_graph import Graph, Tables, smallest_type
except ImportError as error:
    _MISSING = str(error)
else:
    _MISSING = ""

OPSET = 18  # the first with BitwiseAnd
METADATA = "logart"  # the property that holds the packed file's info, as JSON
_LARGEST = torch.finfo(torch.float32).max


def export_onnx(source: str | Path, out: str | Path, *, model: nn.Module | None = None) -> SizeTable:
    """Write a packed network as ONNX: input `images` [batch, C, H, W] float32, output `logits`; any batch size.

    The file is run by onnxruntime and compared with torch before it is kept; it is written atomically.

    Args:
        source: the packed file.
        out: the file to write, .onnx; one that is there is replaced.
        model: as for `load_packed`.

    Returns:
        What takes how much.

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
    try:
        size = input_size_of(packed.info)
    except ValueError as error:
        raise UserError(
            f"--onnx: {source} {error}; expected a file that a run saved with --save, or "
            'info={"preprocessing": {"input_size": [channels, height, width]}} given to save_packed'
        ) from None
    try:
        traced = _trace(network, size)
    except Exception as error:  # whatever the network's forward or the exporter raises
        raise UserError(f"--onnx: {source}: torch cannot export the network ({one_line(error):.200})") from error
    exported = _with_expansion(traced, packed.layers)
    helper.set_model_props(exported, {METADATA: json.dumps(packed.info, ensure_ascii=False, separators=(",", ":"))})
    onnx.checker.check_model(exported, full_check=True)
    data = exported.SerializeToString()
    _compare(data, network, size, source)
    try:
        write_atomically(out, data)
    except OSError as error:
        raise UserError(f"--onnx: {str(out)!r} cannot be written ({one_line(error)})") from error
    return _sizes(packed.layers, exported, len(data))


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
def _trace(network: nn.Module, size: tuple[int, ...]) -> Any:
    """The network as an ONNX model whose quantized weights are inputs."""
    layers = quantized_layers(network)
    weights = [layer.weight for layer in layers.values()]
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tracing could get wrong; `_compare` sees whether it did
            torch.onnx.export(
                _Opened(network).eval(),  # the exporter leaves all of it in the mode of the outermost module
                (torch.zeros(2, *size), *weights),
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
    return onnx.load_from_string(file.getvalue())


def _with_expansion(traced: Any, layers: Mapping[str, PackedLayer]) -> Any:
    """The traced model with its weights made from packed codes in place of stored."""
    tables, channels = Tables(), {}
    for name, layer in layers.items():
        units, factor = layer.spec.grid.units(layer.spec, layer.n_bits, torch.float32)
        channels[name] = (tables.places(units, layer.n_bits), factor)
    graph = Graph()
    table_names = tables.add_to(graph)
    for name, layer in layers.items():
        output = _weight_name(name)
        levels = _levels(graph, output, table_names[layer.n_bits], *channels[name])
        codes = _unpacked(graph, output, layer)
        every = graph.node("GatherElements", levels, graph.cast(codes, TensorProto.INT32), axis=1)
        graph.reshape(every, layer.shape, output)
    old = traced.graph
    nodes, constants = [*graph.nodes, *old.node], [*graph.constants, *old.initializer]
    traced.graph.CopyFrom(helper.make_graph(nodes, "network", old.input[:1], old.output, constants))
    return traced


def _levels(graph: Graph, weight: str, table: str, places: np.ndarray, factor: Tensor) -> str:
    """Nodes for the levels [C, 2^n] float32."""
    exact = torch.equal(factor.float().double(), factor)
    stored = graph.constant(factor[:, None], np.float32 if exact else np.float64, f"{weight}.factor")
    row = graph.constant(places, smallest_type(int(places.max()) + 1), f"{weight}.row")
    units = graph.node("Gather", table, graph.cast(row, TensorProto.INT32))
    levels = graph.node("Mul", units, graph.cast(stored, TensorProto.DOUBLE))
    limits = [graph.constant(limit, np.float64) for limit in (-_LARGEST, _LARGEST)]
    return graph.cast(graph.node("Clip", levels, *limits), TensorProto.FLOAT)


def _unpacked(graph: Graph, weight: str, layer: PackedLayer) -> str:
    """Nodes for the codes [C, K] uint8: each is cut out of the two bytes that it may straddle."""
    n_bits, count = layer.n_bits, layer.shape.numel()
    packed = np.pad(layer.codes.numpy(), (0, -len(layer.codes) % n_bits)).reshape(-1, n_bits)
    codes = graph.constant(packed, np.uint8, f"{weight}.codes")
    if n_bits < 8:
        start = n_bits * np.arange(8)
        codes = _shifted(graph, codes, start // 8, start % 8, "RIGHT")
        if 8 % n_bits:
            # What the next byte adds to a code that does not reach it lies above n bits.
            following, left = (start // 8 + 1).clip(max=n_bits - 1), (8 - start % 8).clip(max=7)
            following_bits = _shifted(graph, f"{weight}.codes", following, left, "LEFT")
            codes = graph.node("BitwiseOr", codes, following_bits)
        codes = graph.node("BitwiseAnd", codes, graph.constant(2**n_bits - 1, np.uint8))
    if packed.size * 8 // n_bits != count:
        ends = [graph.constant([place], np.int64) for place in (0, count)]
        codes = graph.node("Slice", graph.reshape(codes, [-1]), *ends)
    return graph.reshape(codes, [layer.spec.channels, count // layer.spec.channels])


def _shifted(graph: Graph, packed: str, place: np.ndarray, shift: np.ndarray, direction: str) -> str:
    chosen = graph.node("Gather", packed, graph.constant(place, np.int64), axis=1)
    return graph.node("BitShift", chosen, graph.constant(shift, np.uint8), direction=direction)


@torch.no_grad()
def _compare(data: bytes, network: nn.Module, size: tuple[int, ...], source: str | Path) -> None:
    """Raise UserError unless onnxruntime's logits of some noise are torch's, in a batch of another size than traced."""
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    expected = network(images.clone())  # some networks normalise in place
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        # Float rounding stays far below; a graph in which tracing froze something is off by far more.
        same = logits.shape == expected.shape and torch.allclose(
            logits, expected, rtol=0.0, atol=1e-4 * max(1.0, float(expected.abs().max()))
        )
        problem = "it gives other logits"
    except Exception as error:  # onnxruntime's own kinds of error share no base but this
        same, problem = False, one_line(error)
    if not same:
        raise UserError(f"--onnx: {source}: torch's export of the network does not run as it should ({problem:.200})")


def _sizes(layers: Mapping[str, PackedLayer], exported: Any, total: int) -> SizeTable:
    """Bytes by part; constants that are neither codes nor tables are the network's own parameters."""
    sizes = {c.name: len(c.raw_data) for c in exported.graph.initializer}
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
