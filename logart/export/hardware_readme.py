"""What the hardware export says of itself: the README that defines its bits, and the counts as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from logart.export.hardware import ACTIVATION_BITS
from logart.grids.root2 import ROOT2_TEXT
from logart.text import shape_text, table


def cost_table(manifest: dict[str, Any]) -> str:
    """The counts of an export as a table of plain text, a line a layer and the total."""
    names = ("multiplications", "shifts", "adds", "storage_bits", "linear_storage_bits")
    head = ("layer", "shape", "bits", "mult. replaced", "shifts", "adds", "storage bits", "on a linear grid")
    rows: list[tuple[object, ...]] = []
    for layer in manifest["layers"]:
        cost = layer["cost"]
        counts = ["-"] * 5 if cost is None else [f"{cost[name]:,}" for name in names]
        rows.append((Path(layer["folder"]).name, shape_text(layer["shape"]), layer["bits"], *counts))
    if manifest["cost"] is not None:
        rows.append(("total", None, None, *(f"{manifest['cost'][name]:,}" for name in names)))
    return table(head, rows, text=head[:2])


def approximation(manifest: dict[str, Any]) -> str:
    """Which sum stands for √2, and since when."""
    terms = max((layer["root2_terms"] for layer in manifest["layers"]), default=0)
    if terms == 0:
        return "No level holds √2: every level is a power of two, or a sum of some."
    if any(layer["root2_approximated_by_export"] for layer in manifest["layers"]):
        return (
            f"The packed file holds an exact √2; this export has √2 ≈ {ROOT2_TEXT[terms]} (--terms {terms}).\n"
            "Its weights are not the file's, and accuracies that the file records are not of these weights."
        )
    return f"√2 ≈ {ROOT2_TEXT[terms]}, as in the packed file: these are its weights exactly."


def readme(manifest: dict[str, Any]) -> str:
    why = manifest["not_run"]
    golden = (
        f"Golden vectors: of {manifest['images']} images of {manifest['data']}; formats were chosen from "
        f"{manifest['calibration_images']}.\n"
        "`images.npy` (float32 [n, C, H, W], already normalised) is what the network is fed; the input of a first\n"
        "layer that has nothing in front of it is this, rounded to its `input` format."
        if manifest["images"]
        else "This export has no golden vectors."
    )
    if manifest["float_operations"]:
        each = ", ".join(f"{name} ({count})" for name, count in manifest["float_operations"].items())
        golden += f"\nOutside of these layers the network computes in floating point, which is not exported: {each}."
    run = f" The network was not run ({why}): strides, paddings and counts are unknown." if why else ""
    return _README.format(
        version=manifest["version"],
        bits=ACTIVATION_BITS,
        file=json.dumps(manifest["source"]["file"]),
        sha256=manifest["source"]["sha256"],
        approximation=approximation(manifest),
        golden=golden + run,
        codebook_bits=_codebook_bits(manifest),
        table=cost_table(manifest),
    )


def _codebook_bits(manifest: dict[str, Any]) -> str:
    """How many bits the packed integers of a codebook have, as far as layers were counted."""
    counted = [layer for layer in manifest["layers"] if layer["cost"] is not None]
    bits = {
        (layer["cost"]["storage_bits"] - math.prod(layer["shape"]) * layer["bits"]) // layer["codebooks"]
        for layer in counted
    }
    return f", {' or '.join(map(str, sorted(bits)))} bits a codebook" if bits else ""


_README = """\
# Weights of shifts and adds

Export version {version} of the packed network {file} (SHA-256 {sha256}).
{approximation}
{golden}

`manifest.json` lists the layers in the network's order: name, folder, kind, shape, bits, geometry, formats, counts.
Its `source`, `not_run`, `root2_terms` and `root2_approximated_by_export` say where all this is from; nothing is
computed from them. Arrays are `.npy` and, beside it, `.hex` for `$readmemh`: one number a line, lowercase, no prefix,
in row-major order (the last axis runs fastest), as many hex digits as the bits below need (4 bits: 1 digit; 5 to 8: 2).
Negative numbers are two's complement, sign-extended to whole digits. The most significant digit comes first.

## A layer's folder

| file | what | `.npy` | bits in `.hex` | shape |
|---|---|---|---|---|
| `codes` | code of each weight | uint8 | `bits`, unsigned | the weight's: [C, C_in/groups, kh, kw] or [C, K] |
| `codebook.npy` | sign, shift and A add-shifts k_j of each code | int16 | | [G, 2^bits, 2 + A] |
| `codebook.hex` | the same as words | | 16, unsigned | [G, 2^bits] |
| `add_shifts` | add-shifts of each code, where the manifest's are null | int8 | 8 | [G, 2^bits, A] |
| `scale` | numerator i of a channel's scale i/32, where the manifest's is not null | uint8 | 8, unsigned | [G] |
| `bias.npy` | bias, where the layer has one | float64 | | [C] |
| `golden/input` | activations | int16 | {bits} | in the manifest |
| `golden/output` | outputs | int64 | `bits` of the `output` format | in the manifest |
| `golden/bias` | bias in output format, where the layer has one | int64 | the same | [C] |

G is `codebooks` of the manifest; A is the length of its `add_shifts`, 1 where that is null.
The C rows of a weight share the G codebooks evenly, in order: row r has codebook r // (C / G).

## A level

    level = sign · 2^shift · (1 + Σ_j ±2^-|k_j|)

sign is -1, 0 or 1; a level of sign 0 is zero, and its weight adds nothing. k_j > 0 adds 2^-k_j, k_j < 0 subtracts
2^-|k_j|, k_j = 0 is no term. Levels of √2 in a layer have the same add-shifts, `add_shifts` of the manifest; on a grid
whose levels differ in them (sums of two powers of two) that is null, and the layer's folder has `add_shifts`.
A word of `codebook.hex`, bit 15 first: bit 15 zero level (all others are 0 then), bit 14 negative, bit 13 all of
`add_shifts` apply (where they are null: the code's own), bits 12 to 0 shift in two's complement.

A scale is no part of the level: the sum over a channel's inputs is multiplied by i/32 once per output, as shifts and
adds. `scale` of the manifest maps i to its terms [±1, e], i = Σ ±2^e. A weight is then level · i / 32, rounded to the
network's type (`dtype` of the manifest), which changes only levels at the very end of that type's range or precision.

## The integer reference

A number of a format (bits, fraction) is an integer of so many bits in two's complement times 2^-fraction.

1. Activations: `input` format, {bits} bits, the fraction chosen per layer so that the largest magnitude that it reads
   for the calibration images fits. A real number is rounded to the nearest, ties to even; one out of range saturates to
   the end of it; `saturated` counts those of the golden inputs that do. Each layer's input is what the floating-point
   network with these levels feeds it.
2. Products: each term ±2^e of a weight (e = shift, or shift - |k_j|) gives the activation shifted left by e + guard,
   added or subtracted. `guard` stands in the manifest's `golden`; where nothing is rounded it is minus the smallest e
   of the layer, and 0 where no e is negative. Left shifts are exact. Where `rounded_terms` is 0 there is nothing else.
   Else so many terms, counted over all weights of the layer, have a negative e + guard: they shift right, to nearest,
   ties up: (x + 2^(s-1)) >> s with s = -(e + guard), one by one.
3. The sum: `accumulator` format; its fraction is the input's plus guard. A linear layer, of inputs [..., K], has
   y[..., r] = Σ_k W[r, k] · x[..., k]. A convolution, of inputs [N, C, H, W] and with the kernel not flipped, has

       y[n, r, i, j] = Σ_c,u,v W[r, c, u, v] · padded[n, g · C_in/groups + c, i · stride + u · dilation,
                                                      j · stride + v · dilation]        g = r // (C / groups)

   Pairs are of height and width, padding is [[top, bottom], [left, right]]. `padding_mode` zeros pads with 0, reflect
   mirrors at the outermost elements without repeating them, replicate repeats them, circular goes on at the other end.
4. Scale, only where the layer has one: the sum times i by the terms of i. The fraction grows by 5, exactly.
5. Bias: rounded to `output` format (to nearest, ties to even) and added.

Overflow cannot happen: accumulator and output are as wide as the worst case over all inputs of the input format. In
between, two's complement may wrap without harm. The accumulator may be the narrower one: sign-extend it before scale
and bias. A fraction may be larger than its bits.
`error_bound` is the largest distance, over the outputs, to the layer in real numbers with the same levels and the
unrounded input, of inputs that do not saturate: Σ|weight| · half an input unit + rounded terms · scale · half an
accumulator unit + half an output unit for the bias, where a format's unit is 2^-fraction.

## Counts

For one image of the recorded size. They say nothing about silicon.

```
{table}
```

Replaced multiplications are those of a linear grid: one for each weight and output position, padding included; this
export has none. Shifts and adds: one of each for each term of a weight that is not zero, at each output position: 1 for
a power of two, 2 for √2 ≈ 1 + 1/2 or another sum of two powers, 3 or 4 with more; the first sum starts from zero and
counts. A scale adds one shift for each term of i and one add fewer. Adding the bias is not counted, nor is it for the
linear grid, which has as many adds as multiplications. Storage bits: codes and the codebooks' packed integers (as in
the packed file{codebook_bits}; the tables here are expanded). On a linear grid: codes of as many bits, and a 32-bit
scale and a zero point of `bits` bits a channel.
"""
