"""Pieces of an ONNX graph: nodes in order, constants each once, the table of levels, and the function that decodes a
layer. Needs the extra [onnx]."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


class Graph:
    """ONNX nodes, in the order they run, and constants; what adds one gives the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}

    def constant(self, values: Any, dtype: Any, name: str | None = None) -> str:
        """Equal constants without a name are one."""
        array = np.asarray(values, dtype)
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = name or f"constant/{len(self._known)}"
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, values: np.ndarray, kind: int, name: str) -> str:
        """A constant of a type that NumPy may lack, uint4 among them: two in a byte, the first in the low bits."""
        wide = kind in (TensorProto.INT16, TensorProto.UINT16)
        flat: Any = values.astype(np.int64).astype("<u2" if wide else np.uint8).ravel()
        if kind == TensorProto.UINT4:
            even = np.pad(flat, (0, len(flat) % 2))
            flat = even[::2] | even[1::2] << 4
        self.constants.append(helper.make_tensor(name, kind, values.shape, flat.tobytes(), raw=True))
        return name

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"expand/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def cast(self, value: str, dtype: int) -> str:
        return self.node("Cast", value, to=dtype)


class Tables:
    """The unit levels of all channels of all layers, each row once."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[bytes, int]] = {}

    def places(self, units: Tensor, n_bits: int) -> np.ndarray:
        """The places [C] in the table of `n_bits` of rows [C, 2^n] float64."""
        table = self._rows.setdefault(n_bits, {})
        return np.array([table.setdefault(row.tobytes(), len(table)) for row in units.numpy()], np.uint32)

    def add_to(self, graph: Graph) -> dict[int, str]:
        """The tables [R, 2^n] float64 by bit width; constants are the distinct values, and their places."""
        names = {}
        for n_bits, table in self._rows.items():
            rows = np.frombuffer(b"".join(table), np.float64).reshape(-1, 2**n_bits)
            values, index = np.unique(rows, return_inverse=True)
            places = graph.constant(index.reshape(rows.shape), smallest_type(len(values)), f"rows.{n_bits}bit")
            every = graph.constant(values, np.float64, f"values.{n_bits}bit")
            names[n_bits] = graph.node("Gather", every, graph.cast(places, TensorProto.INT32))
        return names


def smallest_type(count: int) -> type:
    return next(t for t in (np.uint8, np.uint16, np.int32) if count <= np.iinfo(t).max + 1)


DOMAIN, DECODE = "logart", "Decode"
_ATTRIBUTES = ("byte", "right", "following", "left", "rest", "mask", "count", "matrix", "shape")
_LARGEST = float(np.finfo(np.float32).max)


def decode_function(opset: int, to: int) -> Any:
    """`logart.Decode(codes, row, factor, table) -> weight`: a layer's weight from its packed codes.

    Inputs:
        codes: [groups, n] uint8, 8 codes of n bits in n bytes.
        row: [G] integers, which row of the table each codebook is.
        factor: [G, 1] float, what that row is multiplied by.
        table: [R, 2^n] float64, unit levels.
    Attributes:
        byte, right: [8], in which byte each of 8 codes begins, and at which bit.
        following, left, rest: [8], the byte after it, where its bits belong, and 255 if the code reaches it, else 0.
        mask: 2^n - 1; count: of the codes; matrix: [G, weights of each]; shape: the weight's.
    """
    body = Graph()

    def attribute(name: str) -> str:
        node = helper.make_node("Constant", [], [name])
        reference = node.attribute.add()
        reference.name, reference.ref_attr_name, reference.type = "value_ints", name, onnx.AttributeProto.INTS
        body.nodes.append(node)
        return name

    known = {name: attribute(name) for name in _ATTRIBUTES}

    def number(value: Any, dtype: int, *dims: int) -> str:
        return body.node("Constant", value=helper.make_tensor("value", dtype, dims, [value]))

    # a code may straddle two bytes; all of it in uint8, since runtimes keep what they needed for it
    byte = {name: body.cast(known[name], TensorProto.UINT8) for name in ("right", "left", "rest", "mask")}
    low = body.node("BitShift", body.node("Gather", "codes", "byte", axis=1), byte["right"], direction="RIGHT")
    after = body.node("BitwiseAnd", body.node("Gather", "codes", "following", axis=1), byte["rest"])
    high = body.node("BitShift", after, byte["left"], direction="LEFT")
    codes = body.node("BitwiseAnd", body.node("BitwiseOr", low, high), byte["mask"])
    flat = body.node("Reshape", codes, number(-1, TensorProto.INT64, 1))
    all_codes = body.node("Slice", flat, number(0, TensorProto.INT64, 1), known["count"])
    index = body.cast(body.node("Reshape", all_codes, known["matrix"]), TensorProto.INT32)
    units = body.node("Gather", "table", body.cast("row", TensorProto.INT32))
    levels = body.node("Mul", units, body.cast("factor", TensorProto.DOUBLE))
    limits = [number(limit, TensorProto.DOUBLE) for limit in (-_LARGEST, _LARGEST)]
    levels = body.cast(body.node("Clip", levels, *limits), TensorProto.FLOAT)
    weight = body.node("Reshape", body.node("GatherElements", levels, index, axis=1), known["shape"])
    body.node("Cast", weight, to=to, output="weight")
    imports = [helper.make_opsetid("", opset)]
    inputs = ["codes", "row", "factor", "table"]
    return helper.make_function(DOMAIN, DECODE, inputs, ["weight"], body.nodes, imports, list(_ATTRIBUTES))


def decode_attributes(n_bits: int, count: int, matrix: list[int], shape: list[int]) -> dict[str, list[int]]:
    """The attributes of a layer's `Decode`."""
    start = n_bits * np.arange(8)
    return {
        "byte": (start // 8).tolist(),
        "right": (start % 8).tolist(),
        "following": (start // 8 + 1).clip(max=n_bits - 1).tolist(),
        "left": (8 - start % 8).clip(max=7).tolist(),
        "rest": np.where(start % 8 + n_bits > 8, 255, 0).tolist(),
        "mask": [2**n_bits - 1],
        "count": [count],
        "matrix": matrix,
        "shape": shape,
    }
