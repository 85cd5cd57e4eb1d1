"""A network traced into the few operations that have an integer form; anything else is refused by name.

torch.fx follows the forward once, with layers and torch's own modules as leaves, and one example gives every shape.
ReLU and ReLU6 behind a layer or a residual sum become the range that this step saturates to.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from logart.errors import NetworkError
from logart.export.hardware_run import geometry_of
from logart.export.integer_formats import Format
from logart.export.integer_layer import Geometry
from logart.quantization.activation_quantizer import INPUT, ActivationQuantizer
from logart.quantization.layers import is_quantized, quantized_weight

Pairs = tuple[tuple[int, int], ...]
_ZERO: Pairs = ((0, 0), (0, 0))
_INFINITE = math.inf


@dataclass
class Step:
    """An operation of the integer network.

    Attributes:
        op: input, conv, linear, add, relu, requantize, max_pool, average_pool, concatenate, flatten, pad or slice.
        name: of the value it makes, and of the node in the trace.
        inputs: names of the values it reads.
        module: the layer's name in the network.
        geometry, weight_shape: of a layer.
        clamp: (low, high) in real numbers of the ReLU or ReLU6 in it; empty without one.
        kernel, stride, padding: of a pooling; paddings are (before, after) for height and width.
        slices: (start, stop, step) of each dimension but the images'.
        format: the levels that the network's own activation quantizer has there.
    """

    op: str
    name: str
    inputs: list[str] = field(default_factory=list)
    module: str = ""
    geometry: Geometry | None = None
    weight_shape: tuple[int, ...] = ()
    clamp: tuple[float, ...] = ()
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Pairs = _ZERO
    slices: tuple[tuple[int | None, int | None, int | None], ...] = ()
    format: Format | None = None

    @property
    def same_format(self) -> bool:
        """Whether its integers are its input's, moved."""
        return self.op in ("max_pool", "flatten", "pad", "slice")

    @property
    def count(self) -> int:
        """Elements of a pooling's window."""
        return math.prod(self.kernel)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_quantized(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example: Tensor) -> list[Step]:
    """The steps of a quantized network in the order they run.

    Args:
        model: in eval mode, as `load_packed` gives it.
        example: images [n, C, H, W].

    Raises:
        NetworkError: an operation that has no integer form, named with its layer, or a forward that depends on
        values.
    """
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise NetworkError(f"--integer: the forward cannot be traced ({' '.join(str(error).split()):.160})") from error
    shapes = _shapes(model, graph, example)
    build = _Builder(dict(model.named_modules()), shapes)
    for node in graph.nodes:
        build.take(node)
    return _requantized_once(build.steps)


def _requantized_once(steps: list[Step]) -> list[Step]:
    """The steps without a `requantize` where it alone reads a value: what makes the value takes its format at once."""
    by_name = {step.name: step for step in steps}
    readers = Counter(name for step in steps for name in step.inputs)
    for step in steps:
        before = by_name[step.inputs[0]] if step.inputs else step
        if step.op != "requantize" or readers[before.name] > 1 or before.same_format or before.format is not None:
            continue
        before.format = step.format
        del by_name[step.name]
        for reader in steps:
            reader.inputs = [before.name if name == step.name else name for name in reader.inputs]
    return list(by_name.values())


@torch.no_grad()
def _shapes(model: nn.Module, graph: fx.Graph, example: Tensor) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n.name] = result.shape
            return result

    Shapes(fx.GraphModule(model, graph)).run(example)
    return shapes


class _Builder:
    def __init__(self, modules: Mapping[str, nn.Module], shapes: Mapping[str, torch.Size]) -> None:
        self._modules, self._shapes = modules, shapes
        self._alias: dict[str, str] = {}
        self._by_name: dict[str, Step] = {}
        self.steps: list[Step] = []

    def take(self, node: fx.Node) -> None:
        """Add what a node of the trace does."""
        if node.op == "output":
            return
        if node.op == "placeholder":
            self._add(node, Step("input", node.name))
        elif node.op == "call_module":
            self._module(node, str(node.target), self._modules[str(node.target)])
        elif node.op in ("call_function", "call_method") and node.target in _CALLS:
            _CALLS[node.target](self, node)
        elif node.name in self._shapes:
            raise self._refusal(node)
        # what is left are numbers: shapes and sizes, which one example has given already

    def _refusal(self, node: fx.Node, why: str = "") -> NetworkError:
        what = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            what = f"{type(self._modules[str(node.target)]).__name__} {node.target}"
        return NetworkError(
            f"--integer: {what}{why} (step {node.name}) has no integer form; --out exports the layers one by one"
        )

    def _inputs(self, *nodes: Any) -> list[str]:
        return [self._alias.get(node.name, node.name) for node in nodes]

    def _add(self, node: fx.Node, step: Step) -> None:
        self.steps.append(step)
        self._by_name[step.name] = step

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        source = node.args[0]
        if is_quantized(module) and isinstance(module, nn.Conv2d | nn.Linear):
            assert isinstance(source, fx.Node)
            shape = tuple(quantized_weight(module).shape)
            inputs = self._requantized(node, module, self._inputs(source))
            if isinstance(module, nn.Conv2d):
                geometry = geometry_of(module, torch.empty(self._shapes[source.name], device="meta"))
                if geometry.padding_mode != "zeros":
                    raise self._refusal(node, f" with padding_mode {geometry.padding_mode}")
                self._add(node, Step("conv", node.name, inputs, name, geometry, shape))
            else:
                if len(self._shapes[source.name]) != 2:
                    raise self._refusal(node, f" on {len(self._shapes[source.name])} dimensions")
                self._add(node, Step("linear", node.name, inputs, name, None, shape))
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            self.relu(node, 6.0 if isinstance(module, nn.ReLU6) else _INFINITE)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self.identity(node)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self.flatten(node)
        elif isinstance(module, nn.MaxPool2d) and not module.ceil_mode and _pair(module.dilation) == (1, 1):
            self._pool(node, "max_pool", module.kernel_size, module.stride, module.padding)
        elif isinstance(module, nn.AvgPool2d) and not module.ceil_mode and _pair(module.padding) == (0, 0):
            self._pool(node, "average_pool", module.kernel_size, module.stride, 0)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._global(node)
        else:
            raise self._refusal(node)

    def _requantized(self, node: fx.Node, layer: nn.Module, inputs: list[str]) -> list[str]:
        """What a layer reads: the input on the levels of its own quantizer, where it has one."""
        quantizer = getattr(layer, INPUT, None)
        if not isinstance(quantizer, ActivationQuantizer) or not quantizer.tensors():
            return inputs
        grid = quantizer.even_grid
        mantissa, exponent = math.frexp(grid.step if grid else 0.0)
        if mantissa != 0.5:
            seen = f"steps of {grid.step:.6g}" if grid else "a log grid"
            raise NetworkError(
                f"--integer: layer {node.target} reads activations with {seen}; "
                "expected steps that are powers of two (--act_scale pow2)"
            )
        assert grid is not None
        step = Step("requantize", f"{node.name}_input", inputs)
        step.format = Format(quantizer.n_bits, 1 - exponent, grid.low < 0)
        self._add(node, step)
        return [step.name]

    def identity(self, node: fx.Node) -> None:
        (self._alias[node.name],) = self._inputs(node.args[0])

    def relu(self, node: fx.Node, high: float = _INFINITE) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = self._by_name[self._inputs(source)[0]]
        if before.op in ("conv", "linear", "add") and not before.clamp and len(source.users) == 1:
            before.clamp = (0.0, high)
            self.identity(node)
        else:
            self._add(node, Step("relu", node.name, [before.name], clamp=(0.0, high)))

    def relu6(self, node: fx.Node) -> None:
        self.relu(node, 6.0)

    def add(self, node: fx.Node) -> None:
        if not all(isinstance(arg, fx.Node) and arg.name in self._shapes for arg in node.args) or node.kwargs:
            raise self._refusal(node, " with a constant")
        a, b = (self._shapes[name] for name in map(str, node.args))
        if a != b:
            raise self._refusal(node, f" of shapes {list(a[1:])} and {list(b[1:])}")
        self._add(node, Step("add", node.name, self._inputs(*node.args)))

    def concatenate(self, node: fx.Node) -> None:
        tensors = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim not in (1, 1 - len(self._shapes[node.name])):
            raise self._refusal(node, f" along dimension {dim}")
        self._add(node, Step("concatenate", node.name, self._inputs(*tensors)))  # type: ignore[misc]

    def flatten(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        n, *rest = self._shapes[source.name]
        if self._shapes[node.name] == (n, math.prod(rest)):
            self._add(node, Step("flatten", node.name, self._inputs(source)))
        elif self._shapes[node.name] == self._shapes[source.name]:
            self.identity(node)
        else:
            raise self._refusal(node, f" to {list(self._shapes[node.name])}")

    def pad(self, node: fx.Node) -> None:
        source, widths, *rest = node.args
        assert isinstance(source, fx.Node)
        mode = rest[0] if rest else node.kwargs.get("mode", "constant")
        value = rest[1] if len(rest) > 1 else node.kwargs.get("value", 0)
        dimensions = len(self._shapes[source.name]) - 1
        pairs = [(int(a), int(b)) for a, b in zip(widths[::2], widths[1::2], strict=True)]  # type: ignore[index,arg-type]
        pairs = [(0, 0)] * (dimensions - len(pairs)) + pairs[::-1]
        if mode != "constant" or value not in (0, None) or len(pairs) > dimensions or min(map(min, pairs)) < 0:
            raise self._refusal(node, f" of {mode} {value} and {widths}")
        if self._shapes[node.name] == self._shapes[source.name]:
            return self.identity(node)
        self._add(node, Step("pad", node.name, self._inputs(source), padding=tuple(pairs)))

    def slice(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source.name not in self._shapes:
            return  # of a size
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in parts) or parts[0] != slice(None):
            raise self._refusal(node, f" [{index}]")
        if self._shapes[node.name] == self._shapes[source.name]:
            return self.identity(node)
        slices = tuple((part.start, part.stop, part.step) for part in parts[1:])  # type: ignore[union-attr]
        self._add(node, Step("slice", node.name, self._inputs(source), slices=slices))

    def mean(self, node: fx.Node) -> None:
        source = node.args[0]
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        shape = self._shapes[str(source)]
        if len(shape) != 4 or sorted(d % 4 for d in dims) != [2, 3]:
            raise self._refusal(node, f" over {dims}")
        self._global(node)

    def _global(self, node: fx.Node) -> None:
        """The mean over all positions, kept as 1×1 or dropped."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        height, width = self._shapes[source.name][2:]
        size = (height, width)
        if len(self._shapes[node.name]) == 4:
            self._pool(node, "average_pool", size, size, 0)
            return
        self._add(node, Step("average_pool", f"{node.name}_pool", self._inputs(source), kernel=size, stride=size))
        self._add(node, Step("flatten", node.name, [f"{node.name}_pool"]))

    def adaptive(self, node: fx.Node) -> None:
        if node.args[1] not in (1, (1, 1)):
            raise self._refusal(node, f" to {node.args[1]}")
        self._global(node)

    def max_pool(self, node: fx.Node) -> None:
        k = node.kwargs
        self._pool(node, "max_pool", node.args[1], *(list(node.args[2:4]) or [k.get("stride"), k.get("padding", 0)]))

    def average_pool(self, node: fx.Node) -> None:
        self._pool(
            node, "average_pool", node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("stride"), 0
        )

    def _pool(self, node: fx.Node, op: str, kernel: Any, stride: Any, padding: Any = 0) -> None:
        size, (down, across) = _pair(kernel), _pair(padding)
        step = _pair(stride) if stride is not None else size
        pads = ((down, down), (across, across))
        self._add(node, Step(op, node.name, self._inputs(node.args[0]), kernel=size, stride=step, padding=pads))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


_CALLS: dict[Any, Callable[[_Builder, fx.Node], None]] = {
    operator.add: _Builder.add, operator.iadd: _Builder.add, torch.add: _Builder.add, "add": _Builder.add,
    "add_": _Builder.add, F.relu: _Builder.relu, torch.relu: _Builder.relu, "relu": _Builder.relu,
    "relu_": _Builder.relu, F.relu6: _Builder.relu6, torch.cat: _Builder.concatenate, F.pad: _Builder.pad,
    operator.getitem: _Builder.slice, "mean": _Builder.mean, torch.mean: _Builder.mean, torch.flatten:
    _Builder.flatten,
    "flatten": _Builder.flatten, "view": _Builder.flatten, "reshape": _Builder.flatten, "squeeze": _Builder.flatten,
    F.adaptive_avg_pool2d: _Builder.adaptive, F.max_pool2d: _Builder.max_pool, F.avg_pool2d: _Builder.average_pool,
    F.dropout: _Builder.identity, "contiguous": _Builder.identity,
}  # fmt: skip
