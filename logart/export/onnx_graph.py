"""Pieces of an ONNX graph: nodes in order, constants each once, the table of levels. Needs the extra [onnx]."""

from __future__ import annotations

from typing import Any

import numpy as np
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

    def node(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = name or f"expand/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def cast(self, value: str, dtype: int) -> str:
        return self.node("Cast", value, to=dtype)

    def reshape(self, value: str, shape: Any, name: str | None = None) -> str:
        return self.node("Reshape", value, self.constant(shape, np.int64), name=name)


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
