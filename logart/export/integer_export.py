"""The integer network of a packed file as a folder: graph, arrays, golden vectors, and the program that computes
it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logart.errors import UserError
from logart.export.hardware import Array, signed_powers
from logart.export.hardware_export import ExportLayer, exportable_layers, new_folder, write_codes
from logart.export.inputs import CALIBRATION_IMAGES, open_source
from logart.export.integer_formats import Format
from logart.export.integer_graph import (
    IntegerNetwork,
    limits,
    reciprocal,
    shifts,
)
from logart.export.integer_readme import example, readme, table
from logart.export.integer_rtl import write_rtl
from logart.export.integer_trace import Step, trace
from logart.networks.calibration import calibration_images
from logart.networks.data import ImageSource, Split
from logart.networks.evaluate import accuracy
from logart.networks.loader import validation_batches
from logart.networks.weights import file_sha256
from logart.packed.checkpoint import load_packed
from logart.packed.file import PackedFile
from logart.runtime import progress_bar

FORMAT, VERSION = "logart-integer", 1
BATCH_SIZE = 32
TEST_IMAGES = 500  # that accuracy is measured on: of CIFAR-10 some 5 s, where all 10,000 take 100


def export_integer(
    path: str | Path,
    out: str | Path,
    data: str,
    *,
    a_bit: int | None = None,
    images: int = 8,
    terms: int | None = None,
    test_images: int = TEST_IMAGES,
    seed: int = 0,
    model: nn.Module | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write the integer network of a packed CNN, a folder, atomically.

    Args:
        path: the packed file.
        out: the folder; it must not be there yet, or be empty.
        data: a folder in ImageNet layout or 'digits': `train` gives the formats, `val` golden vectors and accuracy.
        a_bit: bits of what convolutions and linear layers read, 2 to 16; None is 8, or what the file's own activation
            quantizers say, whose levels are taken as they are.
        images: how many of `val` are golden vectors, of every class as many.
        terms: 2, 3 or 4, what stands for an exact √2.
        test_images: how many of `val` to measure on, of every class as many; all where there are fewer.
        seed: chooses the calibration images.
        model: as for `load_packed`.
        quiet: no progress bar.

    Returns:
        The graph, as `graph.json` holds it.

    Raises:
        UserError: a grid without shifts, an exact √2 without `terms`, images that do not fit, or a folder that cannot
            be written.
        NetworkError: as `integer_trace.trace`.
    """
    file = PackedFile.read(path)
    layers = {layer.name: layer for layer in exportable_layers(file, terms)}
    source = open_source(file.info, data)
    network = load_packed(path, model)
    calibration, _ = calibration_images(source, min(CALIBRATION_IMAGES, len(source.train)), seed, quiet=quiet)
    steps = trace(network, calibration[:2])
    own = any(step.format is not None for step in steps)
    if own and a_bit is not None:
        raise UserError("--a_bit has no effect here: the file's activations are quantized, and their levels are taken")
    a_bit = max(step.format.bits for step in steps if step.format) if own else (8 if a_bit is None else a_bit)
    biases = {name: file.rest.get(f"{name}.bias") for name in layers}
    known = {name: (layer.levels, layer.codes, biases[name]) for name, layer in layers.items()}
    try:
        integers = IntegerNetwork.calibrate(steps, known, calibration, a_bit)
    except ValueError as error:
        raise UserError(f"--inputs: {error}") from error
    count, golden = min(test_images, len(source.val)), source.val.balanced(images)
    with new_folder(Path(out), "--integer") as folder:
        _write_layers(integers, layers, folder)
        graph = {
            "format": FORMAT,
            "version": VERSION,
            "source": {"file": Path(path).name, "sha256": file_sha256(path), "data": source.name},
            "info": {name: file.info.get(name) for name in ("network", "preprocessing", "settings", "accuracy")},
            "activation_bits": a_bit,
            "own_activation_levels": own,
            "calibration_images": len(calibration),
            "class_names": list(source.class_names),
            "golden_images": list(golden.names),
            "measured": _measure(integers, network, source, count, quiet),
            **_graph(integers),
        }
        values = _write_golden(integers, golden, folder / "golden")
        _write_texts(graph, example(integers, known, values), folder)
        write_rtl(integers, known, values, folder)
    if not quiet:
        print(table(graph))
    return graph


def _write_layers(network: IntegerNetwork, layers: Mapping[str, ExportLayer], folder: Path) -> None:
    """The arrays of every layer, in `layers/STEP`."""
    for step in network.steps:
        if step.module:
            where, weights = folder / "layers" / step.name, network.weights[step.name]
            write_codes(layers[step.module], where)
            np.save(where / "unit.npy", weights.unit.astype(np.int16))
            np.save(where / "bias.npy", weights.bias.numpy().astype(np.int64))
            np.save(where / "requantize.npy", shifts(step, network).astype(np.int16))


def _graph(network: IntegerNetwork) -> dict[str, Any]:
    """What `run.py` computes, as JSON says it."""
    first, *others = network.steps
    graph = {
        "input": _value(first, network),
        "output": _value(network.steps[-1], network),
        "values": {step.name: _value(step, network) for step in network.steps},
        "nodes": [_node(step, network) for step in others],
    }
    return json.loads(json.dumps(graph))  # type: ignore[no-any-return]


def _write_texts(graph: Mapping[str, Any], shown: str, folder: Path) -> None:
    """The graph, the program that computes it, and the page that defines both."""
    (folder / "graph.json").write_text(json.dumps(graph, indent=1) + "\n", "utf-8")
    reference = resources.files("logart.export").joinpath("integer_reference.py").read_text("utf-8")
    (folder / "run.py").write_text(reference, "utf-8")
    (folder / "README.md").write_text(readme(dict(graph), shown), "utf-8")


def _value(step: Step, network: IntegerNetwork) -> dict[str, Any]:
    f = network.formats[step.name]
    return {
        "value": step.name,
        "bits": f.bits,
        "fraction": f.fraction,
        "signed": f.signed,
        "shape": list(network.shapes[step.name]),
    }


def _node(step: Step, network: IntegerNetwork) -> dict[str, Any]:
    """What `integer_reference` reads of a step; every bit follows from it and the arrays of its folder."""
    to = network.formats[step.name]
    formats = [network.formats[name] for name in step.inputs]
    low, high = limits(step, to)
    node: dict[str, Any] = {"op": step.op, "output": step.name, "inputs": step.inputs, "low": low, "high": high}
    if step.op in ("conv", "linear"):
        weights = network.weights[step.name]
        node |= {"layer": step.module, "folder": f"layers/{step.name}", "shape": list(step.weight_shape)}
        node["factors"] = {str(i): signed_powers(i) for i in sorted(set(weights.factor))}
        node["factor"] = [str(i) for i in weights.factor]
        node["accumulator_bits"] = int(weights.bits.max(initial=1))
        node["left_out"] = {str(c): int(n) for c, n in enumerate(weights.left_out) if n}
        if step.geometry is not None:
            g = step.geometry
            node["geometry"] = {
                "kernel": g.kernel, "stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups":
                g.groups,
            }  # fmt: skip
    elif step.op == "add":
        most = max(f.fraction for f in formats)
        node |= {"align": [most - f.fraction for f in formats], "requantize": most - to.fraction}
    elif step.op in ("relu", "requantize"):
        node |= {"op": "requantize", "requantize": formats[0].fraction - to.fraction}
    elif step.op == "average_pool":
        integer, exponent = reciprocal(step.count)
        node |= {"factor": signed_powers(integer), "requantize": formats[0].fraction + exponent - to.fraction}
    elif step.op == "concatenate":
        node["requantize"] = [f.fraction - to.fraction for f in formats]
    if step.op in ("max_pool", "average_pool"):
        node |= {"kernel": step.kernel, "stride": step.stride, "padding": step.padding, "fill": formats[0].low}
    if step.op == "pad":
        node["padding"] = step.padding
    if step.op == "slice":
        node["slices"] = step.slices
    return node


class _Logits(nn.Module):
    """The integer network as a classifier, counting how many values of each step saturate."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self._network, self.saturated = network, dict.fromkeys((step.name for step in network.steps), 0.0)

    def forward(self, images: Tensor) -> Tensor:
        last = self._network.steps[-1].name
        saturated: dict[str, int] = {}
        logits = self._network.run(images, saturated)[last]
        for name, count in saturated.items():
            self.saturated[name] += count
        return self._network.formats[last].real(logits)


def _measure(
    network: IntegerNetwork, packed: nn.Module, source: ImageSource, count: int, quiet: bool
) -> dict[str, Any]:
    """Accuracy on `count` test images, of every class as many, also of the packed network in floating point, and the
    share of each step's values that saturate."""
    logits = _Logits(network)
    some = replace(source, val=source.val.balanced(count))
    with progress_bar(2 * count, "integer network", quiet) as bar:
        result, plain = (
            accuracy(model.eval(), validation_batches(some, BATCH_SIZE, 0), torch.device("cpu"), bar.update)
            for model in (logits, packed)
        )
    share = {
        name: n / (result.images * max(1, int(np.prod(network.shapes[name])))) for name, n in logits.saturated.items()
    }
    measured = {"images": result.images, "top1": result.top1, "top5": result.top5, "packed_top1": plain.top1}
    return {**measured, "saturated": share}


def _write_golden(network: IntegerNetwork, golden: Split, folder: Path) -> dict[str, Tensor]:
    """Write the integers of every value for the golden images, and return them."""
    folder.mkdir()
    images = torch.stack([golden[index][0] for index in range(len(golden))])
    values = network.run(images)
    for step in network.steps:
        np.save(folder / f"{step.name}.npy", _narrow(values[step.name].numpy(), network.formats[step.name]))
    return values


def _narrow(x: Array, f: Format) -> Array:
    return x.astype(np.int16 if f.bits + (not f.signed) <= 16 else np.int32)
