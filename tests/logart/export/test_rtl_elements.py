"""The elements that `benchmarks/rtl_cost.py` weighs compute what they should: Icarus Verilog, `scripts/test_rtl.sh`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from logart.grids.logarithmic import DYNAMIC

pytestmark = pytest.mark.rtl
SOURCES = Path(__file__).parents[3] / "benchmarks" / "rtl"
STEPS = 4000

BENCH = """
module bench;
  localparam int STEPS = {steps};
  logic [63:0] vectors[0:STEPS-1];
  logic clk = 0, clear;
  logic signed [8:0] x;
  logic [{n}-1:0] code, n_base2, offset;
  logic [{n}:0] weight;
  logic signed [31:0] sum;
  int i;
  {element}
  initial begin
    $readmemh("vectors.hex", vectors);
    for (i = 0; i < STEPS; i++) begin
      {{clear, x, offset, n_base2, code}} = vectors[i][{width}-1:0];
      #1 clk = 1;
      #1 clk = 0;
      $display("%0d", sum);
    end
    $finish;
  end
endmodule
"""


def simulated(folder: Path, n: int, element: str, fields: list[np.ndarray], sources: list[str]) -> np.ndarray:
    """Sums after every step; `fields` are clear, x, offset, n_base2 and code."""
    assert shutil.which("iverilog"), "needs Icarus Verilog: scripts/test_rtl.sh says how to install it"
    widths = (1, 9, n, n, n)
    words = [0] * STEPS
    for field, width in zip(fields, widths, strict=True):
        words = [word << width | int(value) & ((1 << width) - 1) for word, value in zip(words, field, strict=True)]
    (folder / "vectors.hex").write_text("".join(f"{word:016x}\n" for word in words), "ascii")
    (folder / "bench.sv").write_text(BENCH.format(steps=STEPS, n=n, element=element, width=sum(widths)), "utf-8")
    files = [str(SOURCES / f"{name}.sv") for name in sources]
    subprocess.run(["iverilog", "-g2012", "-o", "bench.vvp", "bench.sv", *files], cwd=folder, check=True)
    done = subprocess.run(["vvp", "-n", "bench.vvp"], cwd=folder, check=True, capture_output=True, text=True)
    return np.array([int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()])


def summed(products: np.ndarray, clear: np.ndarray) -> np.ndarray:
    total, sums = 0, []
    for product, anew in zip(products.tolist(), clear.tolist(), strict=True):
        total = product if anew else total + product
        sums.append(total)
    return np.array(sums)


@pytest.mark.parametrize("terms", [2, 3, 4])
@pytest.mark.parametrize("n", [3, 4])
def test_codes_of_a_dynamic_grid_times_activations(n: int, terms: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n + terms)
    levels_of, channel = 2 ** (n - 1), rng.integers(0, 4 * (2 ** (n - 1) + 1), STEPS)
    k, top = channel // 4, channel % 4
    top = np.where(k == levels_of, top // 2 * 2, top)
    code, x, clear = rng.integers(0, 2**n, STEPS), rng.integers(-256, 256, STEPS), rng.random(STEPS) < 0.02
    clear[0] = True
    columns = {"top_half_step": torch.from_numpy(top), "n_base2": torch.from_numpy(k)}
    levels = DYNAMIC.codebook(columns, n, terms, torch.float64).levels.double().numpy()
    lowest = top - (levels_of - k) + 1  # half-step of the smallest √2-spaced level
    offset = np.where(k == 0, lowest % 2, k - lowest % 2) % 2**n
    unit = np.where(k == 0, lowest // 2, (lowest - 1) // 2 - k + 1)
    unit = np.where(k == levels_of, top // 2 - levels_of + 1, unit)
    fraction = {2: 1, 3: 4, 4: 6}[terms]
    products = levels[np.arange(STEPS), code] * np.ldexp(1.0, fraction - unit) * x
    assert np.array_equal(products, np.rint(products))
    element = (
        f"root2_decoder #(.N_BITS({n})) d (.code(code), .n_base2(n_base2), .offset(offset), .weight(weight));\n"
        f"  root2_element #(.TERMS({terms}), .PLACE_BITS({n - 1})) e (.clk(clk), .clear(clear), .valid(1'b1), .x(x), "
        ".weight(weight), .sum(sum));"
    )
    sums = simulated(tmp_path, n, element, [clear, x, offset, k, code], ["root2_decoder", "root2_element"])
    assert np.array_equal(sums, summed(products.astype(np.int64), clear))


@pytest.mark.parametrize("n", [3, 4])
def test_a_linear_multiply_accumulate(n: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n)
    code, x, clear = rng.integers(0, 2**n, STEPS), rng.integers(-256, 256, STEPS), rng.random(STEPS) < 0.02
    clear[0] = True
    element = (
        f"linear_mac #(.W_BITS({n})) e (.clk(clk), .clear(clear), .valid(1'b1), .x(x), .weight(code), .sum(sum));"
    )
    weight = np.where(code >= 2 ** (n - 1), code - 2**n, code)
    nothing = np.zeros(STEPS, np.int64)
    sums = simulated(tmp_path, n, element, [clear, x, nothing, nothing, code], ["linear_mac"])
    assert np.array_equal(sums, summed(weight * x, clear))
