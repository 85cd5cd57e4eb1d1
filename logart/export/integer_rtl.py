"""The integer network for simulation and synthesis: engines in SystemVerilog, memories, self-checking test benches.

The engines are the same for every network (`rtl/*.sv`); what is written here are their parameters, their memories for
`$readmemh`, the test bench of the whole network and a Makefile for Icarus Verilog.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logart.export.hardware import Array, HardwareLevels
from logart.export.hardware_export import write_hex
from logart.export.integer_graph import IntegerNetwork, Layers, limits, reciprocal, shifts
from logart.export.integer_trace import Step

EXP_BITS, FACTOR_BITS, SHIFT_BITS, VALUE_BITS = 12, 8, 12, 32
SIMULATED_IMAGES = 2
ENGINES = ("processing_element", "requantizer", "layer_engine", "move_engine", "pool_engine", "layer_tb")


def write_rtl(
    network: IntegerNetwork,
    layers: Layers,
    values: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Write the folder `rtl` of an export.

    Args:
        network: the integer network.
        layers: by module name: levels, codes of the weight's shape, bias.
        values: integers of every value for the golden images, by step.
        folder: the export's; its `layers/STEP` are there.
    """
    rtl = folder / "rtl"
    (rtl / "golden").mkdir(parents=True)
    for name in ENGINES:
        text = resources.files("logart.export").joinpath("rtl").joinpath(f"{name}.sv").read_text("utf-8")
        (rtl / f"{name}.sv").write_text(text, "utf-8")
    images = min(SIMULATED_IMAGES, len(next(iter(values.values()))))
    for step in network.steps:
        write_hex(rtl / "golden" / f"{step.name}.hex", values[step.name][:images].numpy().astype(np.int64), VALUE_BITS)
        if step.module:
            levels, codes, _ = layers[step.module]
            _write_layer(step, network, levels, codes, images, folder / "layers" / step.name)
    (rtl / "network_tb.sv").write_text(_network(network, layers, images, rtl), "utf-8")
    names = " ".join(step.name for step in network.steps if step.module)
    counts = [str(count + 1) for count in range(images)]
    texts = {"LAYERS": names, "IMAGES": str(images), "COUNTS": " ".join(counts), "EXPECTED": " or ".join(counts)}
    (rtl / "Makefile").write_text(_filled(_MAKEFILE, texts), "utf-8")


def _write_layer(
    step: Step, network: IntegerNetwork, levels: HardwareLevels, codes: Array, images: int, folder: Path
) -> None:
    """Memories and parameters of a layer."""
    weights = network.weights[step.name]
    sign = levels.signs.astype(np.int64)
    exponents = np.concatenate([levels.shifts[..., None], levels.shifts[..., None] - np.abs(levels.adds)], -1)
    negative = np.concatenate([sign[..., None] < 0, (np.sign(levels.adds) * sign[..., None]) < 0], -1)
    used = np.concatenate([sign[..., None] != 0, (levels.adds != 0) & (sign[..., None] != 0)], -1)
    word = used.astype(np.int64) << (EXP_BITS + 1) | negative.astype(np.int64) << EXP_BITS
    word |= exponents.astype(np.int64) & ((1 << EXP_BITS) - 1)
    terms = word.shape[-1]
    packed = [sum(int(w) << t * (EXP_BITS + 2) for t, w in enumerate(row)) for row in word.reshape(-1, terms).tolist()]
    digits = -(-terms * (EXP_BITS + 2) // 4)
    (folder / "levels.hex").write_text("".join(f"{w:0{digits}x}\n" for w in packed), "ascii")
    write_hex(folder / "unit.hex", weights.unit, EXP_BITS)
    write_hex(folder / "factor.hex", np.array(weights.factor or [1] * len(codes)), FACTOR_BITS)
    write_hex(folder / "bias.hex", weights.bias.numpy().astype(np.int64), VALUE_BITS)
    write_hex(folder / "requantize.hex", shifts(step, network), SHIFT_BITS)
    numbers = _layer_numbers(step, network, levels, codes)
    texts = {"NAME": step.name, "FOLDER": f"../layers/{step.name}", "OUTPUT": f"golden/{step.name}.hex"}
    texts["INPUT"] = f"golden/{step.inputs[0]}.hex"
    lines = [f"localparam int {name} = {value};" for name, value in {**numbers, "IMAGES": images}.items()]
    lines += [f'localparam {name} = "{value}";' for name, value in texts.items()]
    (folder / "params.svh").write_text("\n".join(lines) + "\n", "utf-8")


def _layer_numbers(step: Step, network: IntegerNetwork, levels: HardwareLevels, codes: Array) -> dict[str, int]:
    input_format, g = network.formats[step.inputs[0]], step.geometry
    low, high = limits(step, network.formats[step.name])
    shape = (*network.shapes[step.inputs[0]], 1, 1)[:3], (*network.shapes[step.name], 1, 1)[:3]
    (c_in, h_in, w_in), (c_out, h_out, w_out) = shape
    return {
        "C_IN": c_in, "H_IN": h_in, "W_IN": w_in, "C_OUT": c_out, "H_OUT": h_out, "W_OUT": w_out,
        "KH": g.kernel[0] if g else 1, "KW": g.kernel[1] if g else 1,
        "STRIDE_Y": g.stride[0] if g else 1, "STRIDE_X": g.stride[1] if g else 1,
        "PAD_TOP": g.padding[0][0] if g else 0, "PAD_LEFT": g.padding[1][0] if g else 0,
        "DILATION_Y": g.dilation[0] if g else 1, "DILATION_X": g.dilation[1] if g else 1,
        "GROUPS": g.groups if g else 1, "CODEBOOKS": len(levels.signs),
        "CODE_BITS": (levels.signs.shape[1] - 1).bit_length(), "TERMS": 1 + levels.adds.shape[2],
        "X_BITS": input_format.bits + (not input_format.signed), "LOW": low, "HIGH": high,
    }  # fmt: skip


def _map(step: Step, network: IntegerNetwork, index: int) -> Array:
    """Where each output of a step that moves values comes from, in the flat input; -1 is zero."""
    shape = network.shapes[step.inputs[index]]
    at = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    if step.op == "pad":
        at = np.pad(at, step.padding, constant_values=-1)
    elif step.op == "slice":
        at = at[tuple(slice(*part) for part in step.slices)]
    return at.ravel()


def _moves(step: Step, network: IntegerNetwork, rtl: Path) -> list[tuple[str, dict[str, Any], list[str]]]:
    """The engines of a step: kind, parameters and sources; a concatenation has one for each input."""
    to, formats = network.formats[step.name], [network.formats[name] for name in step.inputs]
    low, high = limits(step, to)
    numbers: dict[str, Any] = {"LOW": low, "HIGH": high}
    if step.op in ("max_pool", "average_pool"):
        factor, exponent = reciprocal(step.count)
        channels, h_in, w_in = network.shapes[step.inputs[0]]
        _, h_out, w_out = network.shapes[step.name]
        numbers |= {
            "CHANNELS": channels, "H_IN": h_in, "W_IN": w_in, "H_OUT": h_out, "W_OUT": w_out,
            "KH": step.kernel[0], "KW": step.kernel[1], "STRIDE_Y": step.stride[0], "STRIDE_X": step.stride[1],
            "PAD_TOP": step.padding[0][0], "PAD_LEFT": step.padding[1][0], "MAXIMUM": int(step.op == "max_pool"),
            "FILL": formats[0].low, "FACTOR": factor, "RIGHT": formats[0].fraction + exponent - to.fraction,
        }  # fmt: skip
        return [("pool_engine", numbers, step.inputs)]
    maps = [_map(step, network, index) for index in range(len(step.inputs))]
    paths = [f"golden/{step.name}_map{index}.hex" for index in range(len(maps))]
    for path, at in zip(paths, maps, strict=True):
        write_hex(rtl / path, at, VALUE_BITS)
    if step.op == "add":
        most = max(f.fraction for f in formats)
        numbers |= {"COUNT": len(maps[0]), "RIGHT": most - to.fraction, "ALIGN_A": most - formats[0].fraction}
        numbers |= {"ALIGN_B": most - formats[1].fraction, "MAP_A": paths[0], "MAP_B": paths[1]}
        return [("move_engine", numbers, step.inputs)]
    engines, before = [], 0
    for path, at, source, f in zip(paths, maps, step.inputs, formats, strict=True):
        right = f.fraction - to.fraction
        engines.append(
            ("move_engine", {**numbers, "COUNT": len(at), "TO": before, "RIGHT": right, "MAP_A": path}, [source])
        )
        before += len(at)
    return engines


def _network(network: IntegerNetwork, layers: Layers, images: int, rtl: Path) -> str:
    """The test bench of the whole network: one engine a step, each value a memory, every value compared."""
    memories, engines, run = [], [], []
    first = network.steps[0].name
    for step in network.steps:
        size = int(np.prod(network.shapes[step.name]))
        memories.append(f"  logic signed [31:0] v_{step.name}[0:{size - 1}], g_{step.name}[0:{images * size - 1}];")
        run.append((step.name, size))
    body = [f"    for (i = 0; i < {run[0][1]}; i++) v_{first}[i] = g_{first}[image*{run[0][1]}+i];"]
    for step in network.steps[1:]:
        if step.module:
            levels, codes, _ = layers[step.module]
            numbers: dict[str, Any] = _layer_numbers(step, network, levels, codes)
            each = [("layer_engine", numbers | {"FOLDER": f"../layers/{step.name}"}, step.inputs)]
        else:
            each = _moves(step, network, rtl)
        for index, (kind, parameters, sources) in enumerate(each):
            engines.append(_instance(f"{step.name}_{index}", step.name, kind, parameters, sources))
            body.append(f"    @(negedge clk) start_{step.name}_{index} = 1;")
            body.append(f"    @(negedge clk) start_{step.name}_{index} = 0;")
            body.append(f"    @(posedge done_{step.name}_{index});\n    @(negedge clk);")
        size = dict(run)[step.name]
        differs = f"v_{step.name}[i] !== g_{step.name}[image*{size}+i]"
        body.append(f"    for (i = 0; i < {size}; i++) begin\n      seen = seen + 1;")
        body.append(f"      if ({differs}) wrong = wrong + 1;\n    end")
        show = f'$display("image %0d, {step.name}: %0d mismatches", image, wrong - earlier);'
        body.append(f"    if (wrong != earlier) {show}\n    earlier = wrong;")
    load = [f'    $readmemh("golden/{name}.hex", g_{name});' for name, _ in run]
    parts = {"MEMORIES": memories, "ENGINES": engines, "LOAD": load, "BODY": body, "IMAGES": [str(images)]}
    return _filled(_NETWORK, {name: "\n".join(lines) for name, lines in parts.items()})


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """A template with its @NAME@ filled in."""
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _instance(name: str, value: str, kind: str, parameters: Mapping[str, Any], sources: list[str]) -> str:
    settings = ", ".join(
        f".{key}({v})" if isinstance(v, int) else f'.{key}("{v}")'
        for key, v in parameters.items()
    )
    lines = [
        f"  logic start_{name} = 0, done_{name}, valid_{name};",
        f"  logic [31:0] address_{name};",
        f"  logic signed [31:0] data_{name};",
    ]
    ports = [f".clk(clk), .start(start_{name}), .done(done_{name}), .y_valid(valid_{name})"]
    ports.append(f".y_address(address_{name}), .y_data(data_{name})")
    letters = "x" if kind != "move_engine" else "ab"
    for index, letter in enumerate(letters):
        lines.append(f"  logic [31:0] {letter}_{name};")
        source = sources[index] if index < len(sources) else sources[0]
        bits = f"{parameters['X_BITS']}'" if kind == "layer_engine" else "32'"
        ports.append(f".{letter}_address({letter}_{name}), .{letter}_data({bits}(v_{source}[{letter}_{name}]))")
    lines.append(f"  {kind} #({settings}) e_{name} ({', '.join(ports)});")
    lines.append(f"  always @(posedge clk) if (valid_{name}) v_{value}[address_{name}] <= data_{name};")
    return "\n".join(lines)


_NETWORK = """\
// The whole network on its golden images: one engine a step, one step after the other; every value is compared.
`timescale 1ns / 1ps
module network_tb #(parameter int IMAGES = @IMAGES@);
  logic clk = 0;
  int image, i;
  int wrong = 0, earlier = 0, seen = 0;
@MEMORIES@
@ENGINES@

  always #1 clk = ~clk;
  initial begin
@LOAD@
    for (image = 0; image < IMAGES; image = image + 1) begin
@BODY@
    end
    $display("network: %0d mismatches of %0d", wrong, seen);
    $finish;
  end
endmodule
"""

_MAKEFILE = """\
# make: simulate every layer and the whole network with Icarus Verilog; make layer-NAME: a layer; make network IMAGES=1:
# on one image; make verilated: the network with Verilator, several times as fast; make lint: check the engines with it.
LAYERS = @LAYERS@
ENGINES = processing_element.sv requantizer.sv layer_engine.sv move_engine.sv pool_engine.sv
IMAGES = @IMAGES@
ifneq ($(filter @COUNTS@,$(firstword $(IMAGES))),$(or $(IMAGES),none))
$(error IMAGES: expected @EXPECTED@, got $(IMAGES))
endif

all: $(LAYERS:%=layer-%) network

$(LAYERS:%=layer-%): layer-%: ; @mkdir -p build
\tiverilog -g2012 -I ../layers/$* -s layer_tb -o build/$*.vvp layer_tb.sv $(ENGINES)
\tvvp -n build/$*.vvp | tee build/$*.txt
\t@grep -q ": 0 mismatches of [1-9]" build/$*.txt

network: ; @mkdir -p build
\tiverilog -g2012 -s network_tb -Pnetwork_tb.IMAGES=$(IMAGES) -o build/network.vvp network_tb.sv $(ENGINES)
\tvvp -n build/network.vvp | tee build/network.txt
\t@grep -q ": 0 mismatches of [1-9]" build/network.txt

verilated: ; @mkdir -p build
\tverilator --binary --timing -Wno-fatal --top-module network_tb -GIMAGES=$(IMAGES) -Mdir build/verilated \\
\t  network_tb.sv $(ENGINES) > build/verilator.log
\tbuild/verilated/Vnetwork_tb | tee build/network.txt
\t@grep -q ": 0 mismatches of [1-9]" build/network.txt

lint:
\tfor top in layer_engine move_engine pool_engine; do \\
\t  verilator --lint-only -Wall --top-module $$top $(ENGINES) || exit 1; done

clean: ; rm -rf build
.PHONY: all network verilated lint clean
"""
