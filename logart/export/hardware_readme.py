"""What the hardware export says of itself: the README that defines its bits, and the counts as a table."""

from __future__ import annotations

import json
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
        f"Golden vectors: of {manifest['images']} images of {manifest['data']}, `images.npy`; formats were chosen from "
        f"{manifest['calibration_images']}."
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
        table=cost_table(manifest),
    )


_README = """\
# Weights of shifts and adds

Export version {version} of the packed network {file} (SHA-256 {sha256}).
{approximation}
{golden}

`manifest.json` lists the layers in the network's order: name, folder, kind, shape, bits, geometry, formats, counts.
Arrays are `.npy` and, beside it, `.hex` for `$readmemh`: one number a line, lowercase, no prefix, in row-major order
(the last axis runs fastest), as many hex digits as the bits need (4 bits: 1 digit; 5 to 8 bits: 2; 16 bits: 4).
Negative numbers are two's complement, sign-extended to whole digits. The most significant digit comes first.

## A layer's folder

| file | what | type | shape |
|---|---|---|---|
| `codes` | code of each weight, `bits` bits, unsigned | uint8 | the weight's: [C, C_in/groups, kh, kw] or [C, K] |
| `codebook.npy` | sign, shift, add-shifts of each code | int16 | [G, 2^bits, 2 + A] |
| `codebook.hex` | the same as 16-bit words, G·2^bits of them | | [G, 2^bits] |
| `add_shifts` | add-shifts of each code; only where `add_shifts` of the manifest is null | int8 | [G, 2^bits, A] |
| `scale` | numerator i of a channel's scale i/32; only where `scale` of the manifest is not null | uint8 | [G] |
| `bias.npy` | bias, only where the layer has one | float64 | [C] |
| `golden/input`, `golden/output` | activations and outputs, integers | int16, int64 | in the manifest |
| `golden/bias` | bias in output format | int64 | [C] |

The C rows of a weight share the G codebooks evenly, in order: row r has codebook r // (C / G).

## A level

    level = sign · 2^shift · (1 + Σ_j ±2^-|k_j|)

sign is -1, 0 or 1; a level of sign 0 is zero, and its weight adds nothing. k_j > 0 adds 2^-k_j, k_j < 0 subtracts
2^-|k_j|, k_j = 0 is no term. Levels of √2 in a layer have the same add-shifts, `add_shifts` of the manifest; on a grid
whose levels differ in them (sums of two powers of two) that is null, and the layer's folder has `add_shifts`.
A word of `codebook.hex`, bit 15 first: bit 15 zero level, bit 14 negative, bit 13 add-shifts apply, bits 12 to 0 shift
in two's complement.

A scale is no part of the level: the sum over a channel's inputs is multiplied by i/32 once per output, as shifts and
adds. `scale` of the manifest maps i to its terms [±1, e], i = Σ ±2^e. A weight is then level · i / 32, rounded to the
network's type (`dtype` of the manifest), which changes only levels at the very end of that type's range or precision.

## The integer reference

A number of a format (bits, fraction) is an integer of so many bits in two's complement times 2^-fraction.

1. Activations: `input` format, {bits} bits, the fraction chosen per layer so that the largest magnitude that it reads
   for the calibration images fits. A real number is rounded to the nearest, ties to even; one out of range saturates to
   the end of it; `saturated` of the golden inputs are. Each layer's input is what the floating-point network with these
   levels feeds it.
2. Products: each term ±2^e of a weight (e = shift, or shift - |k_j|) gives the activation shifted left by e + guard,
   added or subtracted. Left shifts are exact. Where `rounded_terms` is 0 there is nothing else. Else so many terms have
   a negative e + guard: they shift right, to nearest, ties up: (x + 2^(s-1)) >> s with s = -(e + guard), one by one.
3. The sum: `accumulator` format; its fraction is the input's plus guard. Padding of a convolution is zero, or as
   `padding_mode` says; padding is given as [[top, bottom], [left, right]].
4. Scale, only where the layer has one: the sum times i by the terms of i. The fraction grows by 5, exactly.
5. Bias: rounded to `output` format (to nearest, ties to even) and added.

Overflow cannot happen: accumulator and output are as wide as the worst case over all inputs of the input format. In
between, two's complement may wrap without harm.
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
the packed file; the tables here are expanded). On a linear grid: codes of as many bits, and a 32-bit scale and a zero
point of `bits` bits a channel.
"""
