"""What the integer export says of itself: a README that defines every bit, and the widths per layer as a table."""

from __future__ import annotations

import math
from typing import Any

from logart.export.integer_formats import ACCUMULATOR_BITS


def table(graph: dict[str, Any]) -> str:
    """A line a value: format, accumulator, what saturates on the test images."""
    saturated = graph["measured"]["saturated"]
    nodes = {node["output"]: node for node in graph["nodes"]}
    rows = [("step", "operation", "shape", "bits", "fraction", "accumulator", "saturated %", "terms left out")]
    for name, value in graph["values"].items():
        node = nodes.get(name, {"op": "input"})
        rows.append(
            (
                name,
                node["op"],
                "×".join(map(str, value["shape"])),
                ("" if value["signed"] else "u") + str(value["bits"]),
                str(value["fraction"]),
                str(node.get("accumulator_bits", "")),
                f"{100 * saturated[name]:.3f}",
                _left_out(node),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    measured = graph["measured"]
    accuracy = f"Acc@1 {measured['top1']:.2f} %  Acc@5 {measured['top5']:.2f} %, {measured['images']} images"
    lines.append(f"integer network: {accuracy}")
    return "\n".join(lines)


def _left_out(node: dict[str, Any]) -> str:
    left = node.get("left_out", {})
    first = next(iter(left), "")
    return f"{sum(left.values())} in {len(left)} channels, first {first}" if left else ""


def readme(graph: dict[str, Any]) -> str:
    """The README of an export."""
    value, out = graph["input"], graph["output"]
    p = graph["info"]["preprocessing"]
    channels, height, width = p["input_size"]
    short = math.floor(height / p["crop_pct"])
    resized = f"short side resized to {short} ({p['interpolation']}), centre {height}×{width} taken; "
    return _README.format(
        file=graph["source"]["file"],
        sha256=graph["source"]["sha256"],
        a_bit=graph["activation_bits"],
        chosen="theirs are the packed network's own, other " if graph["own_activation_levels"] else "",
        n=graph["calibration_images"],
        data=graph["source"]["data"],
        accumulator=ACCUMULATOR_BITS,
        input=value["value"],
        fraction=value["fraction"],
        sign="signed" if value["signed"] else "unsigned",
        size=p["input_size"],
        colours="red, green, blue" if channels == 3 else f"{channels} channel" + "s" * (channels != 1),
        resized=resized,
        mean=p["mean"],
        std=p["std"],
        output=out["value"],
        out_fraction=out["fraction"],
        table=table(graph),
    )


_README = """\
# An integer network without multiplications

Made from the packed network {file} (SHA-256 {sha256}). Activations of convolutions and linear layers have {a_bit}
bits; {chosen}formats were chosen from {n} calibration images of {data}.

`python run.py` computes the network for the golden images with NumPy alone and compares every value with `golden/`;
`python run.py INPUT.npy OUTPUT.npy` computes it for other images. `run.py` is the definition in code; this page in
words.

## Numbers

Every value is an array of integers of the format in `graph.json`, `values`: `bits` wide, two's complement where
`signed` and from 0 to 2^bits - 1 where not, standing for integer · 2^-fraction. `shape` is of one image: channels,
height, width, or features alone. Values of `golden/VALUE.npy` have the images in front.

The input `{input}` is {sign} with fraction {fraction}. Its images are [channels, height, width] {size}, {colours};
{resized}pixels in 0..1 less mean {mean}, over std {std}; then floor(x · 2^{fraction} + 1/2), cut to the
format's range. `golden/` has the first images of `val` of the data set in the order of `golden_images` in `graph.json`.
The output `{output}` are the logits, with fraction {out_fraction}, in the order of `class_names`.

"Shift right by r, to nearest, ties up" is (x + 2^(r-1)) >> r with an arithmetic shift; r = 0 is nothing; r < 0 is x
<< -r. "Saturate" is to cut to `low` … `high` of the node, both included: the ends of the format, or of a ReLU (low
0) or ReLU6 in it.

## Operations, `nodes` of `graph.json` in the order they run

A node reads the values `inputs`, in order, and makes the value `output`.

| op | what |
|---|---|
| `conv`, `linear` | below |
| `add` | each input shifted left by its `align`; the sum shifted right by `requantize`, to nearest, ties up; saturate |
| `requantize` | shift right by `requantize`, to nearest, ties up; saturate |
| `average_pool` | the sum of each window, times Σ ±2^e over the pairs [±1, e] of `factor`; then as `requantize` |
| `max_pool` | the largest of each window; padding is `fill` |
| `concatenate` | each input as by `requantize`; then one after the other along the channels |
| `pad` | zeros, [before, after] of each dimension: channels, height, width |
| `slice` | [start, stop, step] of each dimension: channels, height, width; null is the first, the end, 1 |
| `flatten` | all dimensions but the images' in one, the last running fastest |

Windows have `kernel`, `stride` and `padding` [[top, bottom], [left, right]]; pairs are of height and width. Output
(y, x) sees rows y · stride + i of the padded input for i below the kernel's height, columns likewise; windows that
would reach past the padding are left out.

## A layer

`linear`: output c is Σ_k weight[c, k] · input[k]. `conv`, of `geometry`: output (c, y, x) is

    Σ weight[c, i, ky, kx] · padded[g · C_in/groups + i, y · stride + ky · dilation, x · stride + kx · dilation]

over i, ky and kx, with g = c // (C / groups), the weight's `shape` [C, C_in/groups, height, width], the first number of
`stride` and `dilation` for y and the second for x; `padding` is [[top, bottom], [left, right]], of zeros. In shifts and
adds this is:

In the node's `folder`: `codes` [the weight's shape], `codebook.npy` [G, 2^n, 2 + A], `unit.npy` [C], `bias.npy` [C],
`requantize.npy` [C]. Row c of the weight has codebook c // (C / G). An entry of a codebook is sign, shift and A
add-shifts; the weight is

    sign · 2^shift · (1 + Σ_j ±2^-|k_j|)        k_j > 0 adds, k_j < 0 subtracts, k_j = 0 is no term

So a weight is a few terms ±2^e. Channel c counts in units of 2^unit[c]: a term gives the activation shifted left by
e - unit[c], and none where that is negative. The table lists how many were left out so that the accumulator fits
{accumulator} bits.

1. Σ of all terms, added or subtracted: the accumulator.
2. Where `factor` is not empty: the sum times the integer `factor[c]`, which is Σ ±2^e over the pairs [±1, e] of
   `factors[factor[c]]`.
3. Plus `bias[c]`.
4. Shifted right by `requantize[c]`, to nearest, ties up.
5. Saturate.

`codes.hex` and `codebook.hex` are for `$readmemh`: a number a line, row-major, two's complement in whole hex
digits; a word of `codebook.hex`, bit 15 first: bit 15 zero level, bit 14 negative, bit 13 the add-shifts apply,
bits 12 to 0 shift. `accumulator_bits` of a node is the width of the worst case of steps 1 to 3 over all inputs of
the format: no input can make it overflow.

## Simulation

`rtl/` has the same in SystemVerilog: `make` there runs each layer and the whole network on the first golden images
with Icarus Verilog and compares every output. `layers/NAME/params.svh` and the `.hex` files are what the engines
read: `levels.hex` is the codebook as words of terms, the first in the lowest bits, each {{used, negative, 12-bit
exponent}}.

## Widths and what was measured

```
{table}
```

"saturated" is the share of a value's elements that were cut at an end of its format on the test images; what a ReLU
cuts does not count.
"""
