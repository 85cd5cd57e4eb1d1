"""The integer network of this folder, computed in plain NumPy: `python run.py` checks the golden vectors.

    python run.py                      compare with golden/, exit code 1 where a bit differs
    python run.py INPUT.npy OUT.npy    integers [n, C, H, W] in input format -> logits [n, classes] in output format
                                       (int64); exit code 2 where a file is not as it should be

Activations are only ever shifted, added, subtracted, compared and moved: never multiplied, never floating point.
What each operation does is said in its function; README.md says it in words. This file needs nothing but NumPy and
its own folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = Any  # an integer ndarray
Node = dict[str, Any]


def load(path: str | Path) -> Array:
    """The array of a file; OSError, which names it, where there is none."""
    try:
        array = np.load(path)
    except OSError:
        raise
    except Exception:  # of what is damaged, each part has an error of its own
        array = None
    if not isinstance(array, np.ndarray):
        raise OSError(f"{path}: expected an array in NumPy's .npy format")
    return array


def shifted(x: Array, places: int) -> Array:
    """x · 2^places: to the left exactly, to the right rounded to nearest, ties up."""
    if places >= 0:
        return x << places
    return (x + (1 << (-places - 1))) >> -places


def times(x: Array, terms: list[list[int]]) -> Array:
    """x times a constant in signed powers [[±1, exponent ≥ 0], …]: shifts, adds and subtractions."""
    result = x - x
    for sign, exponent in terms:
        result = result + (x << exponent) if sign > 0 else result - (x << exponent)
    return result


def saturated(x: Array, node: Node) -> Array:
    """x within the node's range, low and high included; the range holds what a ReLU or ReLU6 does, too."""
    return np.minimum(np.maximum(x, node["low"]), node["high"])


def accumulated(columns: Array, signs: Array, places: Array) -> Array:
    """Σ ± (x << places) of each row: columns [K, P], terms [T, C, K] -> [C, P]. A place below 0 is no term."""
    rows = []
    for sign, place in zip(np.moveaxis(signs, 1, 0), np.moveaxis(places, 1, 0), strict=True):
        row = columns[0] - columns[0]
        for s in np.unique(place[(sign != 0) & (place >= 0)]).tolist():
            plus, minus = (((sign == way) & (place == s)).any(0) for way in (1, -1))
            row = row + ((columns[plus].sum(0) - columns[minus].sum(0)) << s)
        rows.append(row)
    return np.stack(rows)


def weights(node: Node, folder: Path) -> tuple[Array, Array]:
    """The terms of a layer's weights: signs and places (relative to the channel's unit), each [T, C, K]."""
    where = folder / node["folder"]
    codes, codebook, unit = (load(where / f"{name}.npy") for name in ("codes", "codebook", "unit"))
    rows = codes.reshape(len(codes), -1)
    levels = codebook[np.arange(len(rows))[:, None] // (len(rows) // len(codebook)), rows]  # sign, shift, add-shifts
    sign, shift, adds = levels[..., 0], levels[..., 1], np.moveaxis(levels[..., 2:], -1, 0)
    signs = np.concatenate([sign[None], np.where(adds > 0, sign, np.where(adds < 0, -sign, 0))])
    places = np.concatenate([shift[None], shift - np.abs(adds)]) - unit[:, None]
    return signs, places


def layer(node: Node, x: Array, folder: Path) -> Array:
    """A convolution or linear layer: Σ, the channel's factor, bias, requantization, saturation."""
    where = folder / node["folder"]
    signs, places = weights(node, folder)
    bias, shift = load(where / "bias.npy"), load(where / "requantize.npy")
    if node["op"] == "linear":
        sums = accumulated(x.T, signs, places)
        shape: tuple[int, ...] = ()
    else:
        g = node["geometry"]
        (kh, kw), (dy, dx), (down, right) = g["kernel"], g["dilation"], g["stride"]
        x = np.pad(x, ((0, 0), (0, 0), *map(tuple, g["padding"])))
        seen = sliding_window_view(x, (dy * (kh - 1) + 1, dx * (kw - 1) + 1), axis=(2, 3))
        seen = seen[:, :, ::down, ::right, ::dy, ::dx].transpose(1, 4, 5, 0, 2, 3)  # [C, kh, kw, n, H', W']
        shape, groups, parts = seen.shape[3:], g["groups"], []
        for inputs, rows in zip(np.split(seen, groups), np.split(np.arange(signs.shape[1]), groups), strict=True):
            columns = inputs.reshape(signs.shape[2], -1)
            parts.append(accumulated(columns, signs[:, rows], places[:, rows]))
        sums = np.concatenate(parts)
    if node["factors"]:
        sums = np.stack([times(row, node["factors"][key]) for row, key in zip(sums, node["factor"], strict=True)])
    sums = sums + bias[:, None]
    sums = np.stack([shifted(row, -places) for row, places in zip(sums, shift.tolist(), strict=True)])
    y = saturated(sums, node)
    return y.T if node["op"] == "linear" else y.reshape(len(y), *shape).transpose(1, 0, 2, 3)


def add(node: Node, *terms: Array) -> Array:
    """A residual sum: each term shifted left by its `align`, added, requantized."""
    total = terms[0] << node["align"][0]
    for x, places in zip(terms[1:], node["align"][1:], strict=True):
        total = total + (x << places)
    return saturated(shifted(total, -node["requantize"]), node)


def windows(node: Node, x: Array, fill: int) -> Array:
    """What each output of a pooling sees, [n, C, H', W', kh, kw]; the padding is `fill`."""
    x = np.pad(x, ((0, 0), (0, 0), *map(tuple, node["padding"])), constant_values=fill)
    (down, right) = node["stride"]
    return sliding_window_view(x, node["kernel"], axis=(2, 3))[:, :, ::down, ::right]


def average_pool(node: Node, x: Array) -> Array:
    """The sum of each window times the constant for 1/count (signed powers of two), then requantized."""
    sums = windows(node, x, 0).sum((4, 5))
    return saturated(shifted(times(sums, node["factor"]), -node["requantize"]), node)


def concatenate(node: Node, *terms: Array) -> Array:
    """Channels one after the other, each term requantized to the common format."""
    each = [saturated(shifted(x, -places), node) for x, places in zip(terms, node["requantize"], strict=True)]
    return np.concatenate(each, axis=1)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": add,
    "average_pool": average_pool,
    "max_pool": lambda node, x: windows(node, x, node["fill"]).max((4, 5)),
    "requantize": lambda node, x: saturated(shifted(x, -node["requantize"]), node),
    "concatenate": concatenate,
    "flatten": lambda node, x: x.reshape(len(x), -1),
    "pad": lambda node, x: np.pad(x, [(0, 0), *map(tuple, node["padding"])]),
    "slice": lambda node, x: x[tuple([slice(None), *(slice(*part) for part in node["slices"])])],
}


def run(graph: dict[str, Any], x: Array, folder: Path) -> dict[str, Array]:
    """Every value of the network by name, from integers [n, C, H, W] in input format."""
    values = {graph["input"]["value"]: x}
    for node in graph["nodes"]:
        terms = [values[name] for name in node["inputs"]]
        operation = OPERATIONS.get(node["op"])
        values[node["output"]] = operation(node, *terms) if operation else layer(node, terms[0], folder)
    return values


def compute(graph: dict[str, Any], folder: Path, source: str, target: str) -> int:
    """Logits of a file of input integers into another; returns the exit code."""
    x, form = load(source), graph["values"][graph["input"]["value"]]
    low, high = (-1 << form["bits"] - 1, 1 << form["bits"] - 1) if form["signed"] else (0, 1 << form["bits"])
    right = x.dtype.kind in "iu" and x.shape[1:] == tuple(form["shape"]) and x.size > 0
    if not right or not low <= x.min() <= x.max() < high:
        line = f"integers [n, {str(form['shape'])[1:-1]}], n at least 1, from {low} to {high - 1}"
        print(f"{source}: {x.dtype} {list(x.shape)}; expected {line}", file=sys.stderr)
        return 2
    np.save(target, run(graph, x.astype(np.int64), folder)[graph["output"]["value"]])
    return 0


def check(graph: dict[str, Any], folder: Path) -> int:
    """Compare every computed value with golden/; returns the exit code."""
    golden = {name: load(folder / "golden" / f"{name}.npy") for name in graph["values"]}
    values = run(graph, golden.pop(graph["input"]["value"]).astype(np.int64), folder)
    wrong = [name for name, right in golden.items() if not np.array_equal(values[name], right)]
    equal = f"{len(golden) - len(wrong)} of {len(golden)} golden values equal"
    print(equal + f"; not: {', '.join(wrong)}" * bool(wrong))
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    """The entry point; returns the exit code."""
    folder = Path(__file__).parent
    if len(argv) not in (0, 2):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        try:
            graph = json.loads((folder / "graph.json").read_text("utf-8"))
        except ValueError as error:
            raise OSError(f"{folder / 'graph.json'}: expected JSON ({error})") from error
        return compute(graph, folder, *argv) if argv else check(graph, folder)
    except OSError as error:  # it names the file
        print(f"run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
