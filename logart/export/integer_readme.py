"""What the integer export says of itself: a README that defines every bit, and the widths per layer as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from logart.export.integer_formats import ACCUMULATOR_BITS
from logart.export.integer_graph import RECIPROCAL_BITS, IntegerNetwork, Layers, limits, shifts
from logart.export.integer_rtl import SIMULATED_IMAGES

_SHOWN = 6  # weights of the example
SECONDS_PER_MILLION = 40  # weights, each in its layer (10) and in the network (20 to 35): digits_resnet and ResNet-20


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


def _measured(graph: dict[str, Any]) -> str:
    """What the integer network gets, and what the packed one gets of the same images."""
    m = graph["measured"]
    return (
        f"On {m['images']} test images it is right on {m['top1']:.2f} %, the packed network in floating point on "
        f"{m['packed_top1']:.2f} % of the same."
    )


def input_bits(graph: dict[str, Any]) -> str:
    """Of convolutions and linear layers: "8", or "4 to 8" where they differ."""
    read = {name for node in graph["nodes"] if "folder" in node for name in node["inputs"]}
    bits = sorted({graph["values"][name]["bits"] for name in read})
    return " to ".join(map(str, dict.fromkeys((bits[0], bits[-1]))))


def readme(graph: dict[str, Any], example: str) -> str:
    """The README of an export; `example` is by the function of this name."""
    value, out = graph["input"], graph["output"]
    p = graph["info"]["preprocessing"]
    channels, height, width = p["input_size"]
    short = math.floor(height / p["crop_pct"])
    nodes = [node for node in graph["nodes"] if "folder" in node]
    positions = {node["output"]: math.prod(graph["values"][node["output"]]["shape"][1:]) for node in nodes}
    macs = sum(math.prod(node["shape"]) * positions[node["output"]] for node in nodes) / 1e6
    simulated = min(SIMULATED_IMAGES, len(graph["golden_images"]))
    seconds = simulated * macs * SECONDS_PER_MILLION
    resized = f"short side resized to {short} ({p['interpolation']}), centre {height}×{width} taken; "
    time = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    time = "a few seconds" if seconds < 10 else time
    return _README.format(
        measured=_measured(graph),
        example=example,
        simulated="golden image" if simulated == 1 else f"{simulated} golden images",
        mmacs=f"{macs:.2g} million" if macs < 10 else f"{macs:.0f} million",
        time=time,
        input_bits=value["bits"],
        file=graph["source"]["file"],
        sha256=graph["source"]["sha256"],
        average_bits=RECIPROCAL_BITS + 1,
        a_bit=input_bits(graph),
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


def example(network: IntegerNetwork, layers: Layers, values: Mapping[str, Tensor]) -> str:
    """One output of the first layer, computed by hand for the first golden image."""
    step = next(step for step in network.steps if step.module)
    levels, codes, _ = layers[step.module]
    weights, out = network.weights[step.name], values[step.name][0]
    x = values[step.inputs[0]][:1].numpy().astype(np.int64)
    at = tuple(size // 2 for size in out.shape[1:])
    if step.geometry is None:
        seen = x[0]
    else:
        windows = step.geometry.windows(x)[: step.weight_shape[1], :, :, 0]
        seen = windows[:, :, :, at[0], at[1]].ravel()
    unit, row = int(weights.unit[0]), codes[0].ravel()
    lines = ["| k | activation | code | sign, shift, add-shifts | terms | gives |", "|---|---|---|---|---|---|"]
    products = weights.integers[0].numpy().astype(np.int64) * seen
    powers = levels.powers(codes.reshape(len(codes), -1)).rows(slice(1))
    for k in range(min(_SHOWN, len(seen))):
        entry = [levels.signs[0, row[k]], levels.shifts[0, row[k]], *levels.adds[0, row[k]]]
        used = [(s, e) for s, e in zip(powers.signs[:, 0, k], powers.exponents[:, 0, k], strict=True) if s]
        terms = " ".join(f"{'+' if s > 0 else '-'}({seen[k]} << {e - unit})" for s, e in used if e >= unit)
        lines.append(f"| {k} | {seen[k]} | {row[k]} | {', '.join(map(str, entry))} | {terms} | {products[k]} |")
    if len(seen) > _SHOWN:
        lines.append(f"| … | {len(seen) - _SHOWN} more | | | | {products[_SHOWN:].sum()} |")
    total, bias, right = int(products.sum()), int(weights.bias[0]), int(shifts(step, network)[0])
    factor = f", times factor {weights.factor[0]}" if weights.factor else ""
    place = "" if step.geometry is None else f", row {at[0]}, column {at[1]}"
    low, high = limits(step, network.formats[step.name])
    head = f"`{step.name}`, first golden image, channel 0{place}, whose unit is {unit}; k counts its weights row-major:"
    end = f"The accumulator comes to {total}{factor}, plus bias {bias}, shifted right by {right}, saturated to {low} …"
    result = int(out[0][at])
    return "\n".join([head, "", *lines, "", f"{end} {high}: {result}, as in `golden/{step.name}.npy`."])


_README = """\
# An integer network without multiplications

Made from the packed network {file} (SHA-256 {sha256}). Inputs of convolutions and linear layers have {a_bit} bits;
{chosen}formats were chosen from {n} calibration images of {data}.

| in this folder | what |
|---|---|
| `graph.json` | formats of all values, operations in order, names of classes and golden images, what was measured |
| `layers/NAME/` | codes, codebook, bias and shifts of a layer, as `.npy` for software and `.hex` for `$readmemh` |
| `golden/VALUE.npy` | the integers of every value of the network for the golden images |
| `run.py` | the network in NumPy alone, without a multiplication |
| `rtl/` | the network in SystemVerilog: engines, test benches, a Makefile |

`python run.py` computes the network for the golden images, compares every value but the input with `golden/` and exits
with 1 where one differs. `python run.py INPUT.npy OUTPUT.npy` computes it for other images, integers [n, channels,
height, width] in input format, and writes the logits as int64 [n, classes]; NumPy appends `.npy` to a name without
it. `run.py` is the definition in code; this page in words. {measured}

## Numbers

Every value is an array of integers of the format in `graph.json`, `values`: `bits` wide, two's complement where
`signed` and from 0 to 2^bits - 1 where not, standing for integer · 2^-fraction. `shape` is of one image: channels,
height, width, or features alone. Values of `golden/VALUE.npy` have the images in front. Names of values, steps and
folders are the same: the value `NAME` is what the node with `output` NAME makes, and a layer's folder is
`layers/NAME`.

The input `{input}` is {sign}, {input_bits} bits, with fraction {fraction}. Its images are [channels, height, width]
{size}, {colours}; {resized}pixels in 0..1 (bytes over 255) less mean {mean}, over std {std}: p; then floor(p ·
2^{fraction} + 1/2), cut to the format's range. Resizing is Pillow's. `golden/` has images of `val` of the data set, of
every class as many, in the order of `golden_images` in `graph.json`; its arrays are int16 or int32, to be made int64
before anything is computed. The output `{output}` are the logits, with fraction {out_fraction}, in the order of
`class_names`: the network's answer is the class of the largest, the first of equal ones.

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
| `average_pool` | each window's sum, zeros around, times Σ ±2^e (e ≥ 0) of pairs [±1, e] in `factor`; as `requantize` |
| `max_pool` | the largest of each window; padding is `fill` |
| `concatenate` | each input as `requantize`, here a list of one for each; then one after the other along the channels |
| `pad` | zeros, `padding` [before, after] of each dimension: channels, height, width |
| `slice` | `slices` [start, stop, step] of each dimension: channels, height, width; null is the first, the end, 1 |
| `flatten` | all dimensions but the images' in one, the last running fastest |

Windows have `kernel`, `stride` and `padding` [[top, bottom], [left, right]]; pairs are of height and width. Output
(y, x) sees rows y · stride + i of the padded input for i below the kernel's height, columns likewise; windows that
would reach past the padding are left out. The total of an average over n elements may need floor(log2 n) +
{average_bits} bits more than the input, log2 n + 1 where n is a power of two.

## A layer

`linear`: output c is Σ_k weight[c, k] · input[k]. `conv`, of `geometry`: output (c, y, x) is

    Σ weight[c, i, ky, kx] · padded[g · C_in/groups + i, y · stride + ky · dilation, x · stride + kx · dilation]

over i, ky and kx, with g = c // (C / groups), the weight's `shape` [C, C_in/groups, height, width], the first
number of `stride` and `dilation` for y and the second for x; `padding` is [[top, bottom], [left, right]], of zeros.
In shifts and adds this is:

In the node's `folder`: `codes.npy` [the weight's shape] uint8, for codes of n bits `codebook.npy` [G, 2^n, 2 + A],
`unit.npy` [C], `bias.npy` [C], `requantize.npy` [C], signed integers. Row c of the weight has codebook c // (C / G),
in which a code is the index of an entry. An entry is sign (-1, 0 or 1), shift and A add-shifts k_j; the weight is

    sign · 2^shift · (1 + Σ_j ±2^-|k_j|)        k_j > 0 adds, k_j < 0 subtracts, k_j = 0 is no term

So a weight is a few terms ±2^e: sign · 2^shift, and ±sign · 2^(shift - |k_j|) for each k_j that is not 0. Channel c
counts in units of 2^unit[c]: a term gives the activation shifted left by e - unit[c], and none where that is
negative. The table at the end lists how many were left out so that the accumulator fits {accumulator} bits.

1. Σ of all terms, added or subtracted: the accumulator.
2. Where `factor` is not empty: the sum times Σ ±2^e (e ≥ 0) over the pairs [±1, e] of `factors[factor[c]]`;
   `factor[c]` is the integer that they come to, as text, as JSON's keys are.
3. Plus `bias[c]`.
4. Shifted right by `requantize[c]`, to nearest, ties up.
5. Saturate.

For inputs of fraction f a layer's sum has fraction f - unit[c], 5 more behind a factor, which counts in 1/32; the bias
has the same, and `requantize[c]` brings that to the output's. `accumulator_bits` of a node is the signed width that
holds max|input| · Σ|weight| (times the factor) + |bias|, max|input| that of the input's format: 128 for 8 bits signed,
255 for 8 unsigned. No finished sum overflows it; in between, two's complement may wrap without harm. Rounding in
step 4, or a shift to the left, may need a bit or more beyond.

## One output by hand

{example}

## Simulation

`rtl/` has the same in SystemVerilog. There `make layer-NAME` runs a layer (NAME is the `output` of its node, without
dots), `make network` the whole network, `make` all of them, on the first {simulated}, with Icarus Verilog
(11 or later; `iverilog` on the path), and compares every output: "NAME: 0 mismatches of N", else make fails. `make
network IMAGES=1` takes one image; a layer always takes all of them. The engines take one weight a clock, of which an
image has {mmacs}. Icarus needs some 10 s for a million in a layer and 20 to 35 s in the network, so that
`make` takes about {time}. `make verilated` is `make network` with Verilator (5 or later), several times as fast;
`make lint` checks the engines with it.

| file | what |
|---|---|
| `processing_element.sv` | one weight a clock: shifted copies of the activation are added or subtracted |
| `requantizer.sv` | steps 2 to 5 above, combinational |
| `layer_engine.sv` | a layer, of these two and memories; `layers/NAME/params.svh` has its parameters |
| `pool_engine.sv` | `average_pool` and `max_pool` |
| `move_engine.sv` | every other operation, by `rtl/golden/VALUE_mapN.hex` for input N, from 0 |
| `layer_tb.sv`, `network_tb.sv` | the test benches |

An engine starts with a clock of `start`, asks for the value at `x_address` (channel · height · width + y · width +
x) and needs `x_data` in the same clock, signed, as it reads its own memories: of a layer X_BITS wide, one more than an
unsigned input has, of `pool_engine` 32. `move_engine` asks by `a_address` and `b_address` for `a_data` and `b_data` of
32 bits; an `add` reads input 1 by b, and a concatenation is an engine for each input. Where `y_valid` is high,
`y_data` is the output at `y_address`; `done` is high for one clock, behind the last of these. There is no reset:
`start` begins anew. A map has a line an output, row-major: which element of the input it is, -1 for zero.

A `.hex` file has a number a line, row-major, in whole hex digits: `codes` (n bits), `factor` (8 bits) and
`levels` unsigned, others two's complement, `unit` and `requantize` of 12 bits, `bias`, values and maps of 32.
`codes`, `unit`, `bias`, `requantize` are as above, `factor` is 1 where there is none; a line of `levels.hex` is an
entry of a codebook (codebook by codebook), as words of 14 bits for the terms, the first in the lowest bits, each
with "used" in bit 13, "negative" in bit 12 and the exponent e, before unit[c] is taken off, in bits 11 to 0, two's
complement.

## Widths and what was measured

```
{table}
```

"bits" has a u for unsigned; "saturated" is the share of a value's elements that were cut at an end of its format on
the test images; what a ReLU cuts does not count. "terms left out" is empty where there are none.
"""
