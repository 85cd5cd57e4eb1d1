"""The integer network: the NumPy reference against torch, without a multiplication, every bit as the README says."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from integer_networks import Odd, built
from small_runs import assert_refused
from torch import Tensor, nn

import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import NetworkError
from logart.export import integer_reference
from logart.export.command import main
from logart.export.hardware import HardwareLevels
from logart.export.inputs import open_source
from logart.export.integer_export import export_integer
from logart.export.integer_formats import ACCUMULATOR_BITS, Format, IntegerWeights
from logart.export.integer_graph import reciprocal
from logart.export.integer_readme import input_bits
from logart.export.integer_trace import trace
from logart.networks.data import Preprocessing
from logart.networks.digits import DIGITS
from logart.packed.file import PackedFile
from logart.quantization.activation_quantizer import quantizers
from logart_cnn.main import main as cnn_main


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in CNN at 4 bits, √2 as 1 + 1/2, with a factor per channel."""
    folder = tmp_path_factory.mktemp("packed")
    path = folder / "digits.safetensors"
    flags = "--preset fast --calib_samples 64 --hardware_approx --scale_search --quiet --device cpu --workers 0".split()
    assert cnn_main([*flags, "--save", str(path), "--results", str(folder / "results.csv")]) == 0
    return path


@pytest.fixture(scope="module")
def exported(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("integer") / "out"
    assert main([str(packed), "--integer", str(out), "--n", "3", "--quiet"]) == 0
    return out


def graph_of(folder: Path) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads((folder / "graph.json").read_text("utf-8"))
    return graph


def input_integers(graph: dict[str, Any], images: Tensor) -> Any:
    """Images in input format, as the export's README defines it."""
    f = graph["input"]
    high = 2 ** (f["bits"] - f["signed"]) - 1
    x = np.floor(np.ldexp(images.double().numpy(), f["fraction"]) + 0.5)
    return np.clip(x, -high - 1 if f["signed"] else 0, high).astype(np.int64)


def differing(folder: Path) -> list[str]:
    """The values of which NumPy's integers are not torch's, bit for bit, for all golden images of a folder."""
    graph, golden = graph_of(folder), {path.stem: np.load(path) for path in (folder / "golden").glob("*.npy")}
    assert golden.keys() == graph["values"].keys()
    values = integer_reference.run(graph, golden[graph["input"]["value"]].astype(np.int64), folder)
    return [name for name, expected in golden.items() if not np.array_equal(values[name], expected)]


def test_every_value_of_every_test_image_is_torch_s_bit_for_bit_and_so_is_the_accuracy(packed: Path) -> None:
    out = packed.parent / "all"
    graph = export_integer(packed, out, DIGITS, images=500, test_images=500)
    val = open_source(PackedFile.read(packed).info, DIGITS).val
    assert len(val) == len(graph["golden_images"]) == 500 == graph["measured"]["images"]
    assert differing(out) == []
    images = torch.stack([val[index][0] for index in range(500)])
    assert graph["golden_images"] == list(val.names)
    assert np.array_equal(np.load(out / "golden" / f"{graph['input']['value']}.npy"), input_integers(graph, images))
    logits = np.load(out / "golden" / f"{graph['output']['value']}.npy")
    labels = np.array([val[index][1] for index in range(len(val))])
    # where the best logits are equal, torch.topk decides: leave those images out on both sides
    top = np.sort(logits, axis=1)
    clear = top[:, -1] > top[:, -2]
    right = (logits.argmax(1) == labels)[clear].sum()
    assert abs(100 * right / len(labels) - graph["measured"]["top1"]) <= 100 * (~clear).sum() / len(labels)
    assert graph["measured"]["top1"] > 97
    with torch.no_grad():
        floating = 100 * (load_packed(packed)(images).argmax(1).numpy() == labels).mean()
    assert graph["measured"]["packed_top1"] == pytest.approx(floating, abs=0.01)
    assert f"{floating:.2f} % of the same" in (out / "README.md").read_text("utf-8")


def test_hex_files_and_accumulators_are_as_wide_as_the_readme_says(exported: Path) -> None:
    graph = graph_of(exported)

    def numbers(path: Path, bits: int, *, signed: bool) -> list[int]:
        lines = path.read_text("ascii").split()
        assert {len(line) for line in lines} == {-(-bits // 4)}
        values = [int(line, 16) for line in lines]
        return [v - (1 << bits) if signed and v >> bits - 1 else v for v in values]

    for node in (node for node in graph["nodes"] if "folder" in node):
        folder, f = exported / node["folder"], graph["values"][node["inputs"][0]]
        codes, bias = np.load(folder / "codes.npy"), np.load(folder / "bias.npy")
        factors = [int(text) for text in node["factor"]]
        assert all(sum(s << e if s > 0 else -1 << e for s, e in terms) == int(text) and min(e for _, e in terms) >= 0
                   for text, terms in node["factors"].items())  # fmt: skip
        assert np.array_equal(numbers(folder / "codes.hex", 4, signed=False), codes.ravel())
        assert numbers(folder / "factor.hex", 8, signed=False) == factors
        for name, bits in (("unit", 12), ("requantize", 12), ("bias", 32)):
            assert np.array_equal(numbers(folder / f"{name}.hex", bits, signed=True), np.load(folder / f"{name}.npy"))
        signs, places = integer_reference.weights(node, exported)
        weights = np.abs((signs.astype(np.int64) << np.maximum(places, 0)).sum(0)).sum(1)
        largest = 2 ** (f["bits"] - 1) if f["signed"] else 2 ** f["bits"] - 1
        ends = [w * largest * i + abs(b) for w, i, b in zip(weights.tolist(), factors, bias.tolist(), strict=True)]
        assert node["accumulator_bits"] == 1 + max(end.bit_length() for end in ends)


def test_the_readme_gives_the_range_of_input_bits() -> None:
    nodes = [{"folder": "layers/a", "inputs": ["x"]}, {"inputs": ["b"]}, {"folder": "layers/c", "inputs": ["y"]}]
    values = {"x": {"bits": 8}, "b": {"bits": 16}, "y": {"bits": 4}}
    assert input_bits({"nodes": nodes, "values": values}) == "4 to 8"
    assert input_bits({"nodes": nodes[:2], "values": values}) == "8"


def test_a_mobilenet_is_torch_s_bit_for_bit(image_folder: Path, tmp_path: Path) -> None:
    """ReLU6, depthwise convolutions, residual sums and a mean over all positions, in a network made for them."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=4).eval()
    config = QuantConfig(rounding="nearest", hardware_terms=2, n_bits_a=8, calib_samples=2)
    network = quantize_model(model, config, torch.randn(2, 3, 32, 32))[0]
    preprocessing = Preprocessing((3, 32, 32), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    info = {"preprocessing": asdict(preprocessing), "class_names": [f"class{label}" for label in range(4)]}
    save_packed(network, tmp_path / "mobile.safetensors", info)
    out = tmp_path / "out"
    export_integer(tmp_path / "mobile.safetensors", out, str(image_folder), images=2, test_images=2, model=model)
    assert differing(out) == []
    assert {node["op"] for node in graph_of(out)["nodes"]} >= {"conv", "linear", "add", "average_pool"}


def test_the_shipped_program_checks_its_golden_vectors_and_sees_a_flipped_bit(exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(exported / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    values = len(graph_of(exported)["values"]) - 1  # the input is given
    assert (done.returncode, done.stdout) == (0, f"{values} of {values} golden values equal\n"), done.stderr
    codes = exported / "layers" / "conv1" / "codes.npy"
    before = codes.read_bytes()
    changed = np.load(codes)
    changed.flat[0] ^= 1
    try:
        np.save(codes, changed)
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        codes.write_bytes(before)
    assert done.returncode == 1 and "conv1" in done.stdout


def test_golden_images_are_of_several_classes(packed: Path, exported: Path) -> None:
    graph = graph_of(exported)
    val = open_source(PackedFile.read(packed).info, DIGITS).val
    labels = {name: val[index][1] for index, name in enumerate(val.names)}
    assert len({labels[name] for name in graph["golden_images"]}) == len(graph["golden_images"]) == 3


def program(exported: Path, *words: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(exported / "run.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_shipped_program_takes_what_the_input_format_holds_and_refuses_other_arrays(
    exported: Path, tmp_path: Path
) -> None:
    f = graph_of(exported)["input"]
    high = 2 ** (f["bits"] - f["signed"]) - 1
    low = -high - 1 if f["signed"] else 0
    good = np.full((1, 1, 8, 8), high)
    good[0, 0, 0, 0] = low
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    for bad, seen in (
        (good.astype(float), "float64 [1, 1, 8, 8]"),
        (good[..., :4], "int64 [1, 1, 8, 4]"),
        (good + 1, "int64 [1, 1, 8, 8]"),
        (good - 1, "int64 [1, 1, 8, 8]"),
        (good[:0], "int64 [0, 1, 8, 8]"),
    ):
        np.save(x, bad)
        done = program(exported, x, y)
        line = f"{x}: {seen}; expected integers [n, 1, 8, 8], n at least 1, from {low} to {high}\n"
        assert (done.returncode, done.stderr, y.exists()) == (2, line, False)
    np.save(x, good)
    assert program(exported, x, y).returncode == 0 and np.load(y).shape == (1, 10)


def test_the_shipped_program_names_a_file_that_is_missing_or_no_array(exported: Path, tmp_path: Path) -> None:
    copied = tmp_path / "out"
    shutil.copytree(exported, copied)
    text, y = tmp_path / "text.npy", tmp_path / "y.npy"
    text.write_text("no array", "ascii")
    golden = copied / "golden" / "conv1.npy"
    x = shutil.copy(copied / "golden" / f"{graph_of(copied)['input']['value']}.npy", tmp_path / "x.npy")
    for words, broken in (
        ((tmp_path / "none.npy", y), tmp_path / "none.npy"),
        ((text, y), text),
        ((x, tmp_path / "none" / "y.npy"), tmp_path / "none" / "y.npy"),
        ((), golden),
        ((x, y), copied / "layers" / "conv1" / "unit.npy"),
        ((), copied / "graph.json"),
    ):
        if broken.is_relative_to(copied):
            broken.unlink()
        done = program(copied, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(broken) in done.stderr, done.stderr
        assert done.stderr.startswith("run.py: ") and not done.stdout and not y.exists()
    for damaged in ('{"a": ', "\xff"):
        (copied / "graph.json").write_text(damaged, "latin-1")
        done = program(copied)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "graph.json: expected JSON" in done.stderr


class Number(int):
    """An integer that knows shifts, sums and order, and no product or quotient."""

    def _refuse(self, other: Any) -> Any:
        raise TypeError("this machine has no multiplier")

    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = _refuse  # type: ignore[assignment]

    def __add__(self, other: int) -> Number:
        return Number(int(self) + int(other))

    def __sub__(self, other: int) -> Number:
        return Number(int(self) - int(other))

    def __lshift__(self, other: int) -> Number:
        return Number(int(self) << int(other))

    def __rshift__(self, other: int) -> Number:
        return Number(int(self) >> int(other))

    __radd__ = __add__


def test_no_activation_is_ever_multiplied(exported: Path) -> None:
    graph = graph_of(exported)
    golden = np.load(exported / "golden" / f"{graph['input']['value']}.npy")[:1]
    x = np.frompyfunc(Number, 1, 1)(golden)
    with pytest.raises(TypeError, match="no multiplier"):
        x * x  # noqa: B018
    values = integer_reference.run(graph, x, exported)
    out = graph["output"]["value"]
    assert np.array_equal(values[out].astype(np.int64), np.load(exported / "golden" / f"{out}.npy")[:1])


def test_every_operation_is_near_the_float_network_and_nearer_with_more_bits() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 2, 13, 12)
    distances = []
    for a_bit in (4, 8, 12, 16):
        network, integers = built(Odd(), images, a_bit, seed=0)
        last = integers.steps[-1].name
        logits = integers.formats[last].real(integers.run(images)[last])
        with torch.no_grad():
            distances.append(float((logits - network(images)).norm() / network(images).norm()))
        torch.manual_seed(0)
        images = torch.randn(16, 2, 13, 12)
    assert {step.op for step in integers.steps} == {
        "input", "conv", "linear", "add", "max_pool", "average_pool", "concatenate", "flatten", "pad", "slice",
    }  # fmt: skip
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 and distances[0] > 1e-2


def test_a_layer_is_what_the_readme_says_weight_by_weight() -> None:
    """One channel after the other in Python's own integers."""
    rng = np.random.default_rng(0)
    levels = HardwareLevels(
        np.array([[-1, 0, 1, 1]], np.int16), np.array([[2, 0, -1, 0]], np.int16),
        np.array([[[-1], [0], [0], [-1]]], np.int16), np.array([37], np.int16),
    )  # fmt: skip
    codes = rng.integers(0, 4, (3, 5)).astype(np.uint8)
    given, bias = Format(8, 4, True), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    weights = IntegerWeights.of(levels, codes, bias, given)
    value = {0: -4 * 0.5, 1: 0.0, 2: 0.5, 3: 0.5}  # sign · 2^shift · (1 - 1/2)
    value[2] = 0.5  # no add-shift
    for c in range(3):
        terms = [value[int(code)] for code in codes[c]]
        assert weights.integers[c].tolist() == [t * 2.0 ** -int(weights.unit[c]) for t in terms]
        exact = float(bias[c]) * 2.0 ** (4 + 5 - int(weights.unit[c]))
        assert float(weights.bias[c]) == math.floor(exact + 0.5)
    assert (weights.bits <= ACCUMULATOR_BITS).all() and not weights.left_out.any()


def test_a_channel_that_would_not_fit_leaves_terms_out_and_says_so() -> None:
    shifts = np.array([[-40, 0]], np.int16)
    levels = HardwareLevels(np.ones((1, 2), np.int16), shifts, np.zeros((1, 2, 0), np.int16), None)
    codes = np.array([[0, 1], [1, 1]], np.uint8)
    weights = IntegerWeights.of(levels, codes, None, Format(8, 0, False))
    assert weights.left_out.tolist() == [1, 0] and (weights.bits <= ACCUMULATOR_BITS).all()
    tiny = IntegerWeights.of(levels, np.zeros((1, 2), np.uint8), torch.tensor([3.0]), Format(8, 0, False))
    assert int(tiny.bits[0]) <= ACCUMULATOR_BITS and abs(float(tiny.bias[0]) * 2.0 ** int(tiny.unit[0]) - 3) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 9, 49, 64, 121, 1023, 1024])
def test_the_constant_of_an_average(count: int) -> None:
    integer, exponent = reciprocal(count)
    assert abs(math.ldexp(integer, -exponent) * count - 1) <= 2.0**-16
    # the README: the total of 16 bits has at most floor(log2 count) + 17 bits more, one of them the sign
    assert (2**16 - 1) * count * integer < 2 ** (16 + math.floor(math.log2(count)) + 17 - 1)
    assert (integer == 1) == (count & (count - 1) == 0)


def test_formats_hold_what_they_were_chosen_for() -> None:
    x = torch.tensor([0.0, 0.5, 3.0, -1.0])
    f = Format.choose(x, 8)
    assert f.signed and torch.equal(f.real(f.quantize(x)), x.double())
    assert not Format.choose(x.abs(), 8).signed
    outlier = torch.cat([torch.randn(100000, generator=torch.Generator().manual_seed(0)), torch.tensor([64.0])])
    chosen = Format.choose(outlier, 4)
    assert float(chosen.real(torch.tensor(float(chosen.high)))) < 64  # one outlier does not set the step of all
    with pytest.raises(ValueError, match="not finite"):
        Format.choose(torch.tensor([1.0, math.inf]), 8)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Refused(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.head, self.act = nn.Conv2d(1, 4, 3), nn.Linear(4, 2), act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("act", "named"),
    [(nn.SiLU(), "SiLU act"), (nn.BatchNorm2d(4), "BatchNorm2d act"), (Gate(), "sigmoid"),
     (Shift(), "add with a constant"), (nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d act")],
)  # fmt: skip
def test_what_has_no_integer_form_is_refused_by_name(act: Any, named: str) -> None:
    model = Refused(nn.Identity()).eval()
    network = quantize_model(model, QuantConfig(rounding="nearest"), torch.randn(2, 1, 6, 6))[0]
    network.act = act
    with pytest.raises(NetworkError, match=f"--integer: {named}.* has no integer form"):
        trace(network.eval(), torch.randn(2, 1, 6, 6))


def test_wrong_calls_take_one_line(packed: Path, tmp_path: Path, capfd: Any) -> None:
    out = str(tmp_path / "out")
    exact = tmp_path / "mine.safetensors"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    save_packed(quantize_model(model, QuantConfig(rounding="nearest"), torch.randn(2, 1, 8, 8))[0], exact)
    for argv, line in (
        ([str(packed), "--integer", out, "--inputs", "nowhere"], "--inputs: "),
        ([str(packed), "--integer", out, "--n", "0"], "--n: expected at least 1, got 0"),
        ([str(packed), "--onnx", "x.onnx", "--a_bit", "8"], "--a_bit has no effect here"),
        ([str(exact), "--integer", out], "--inputs: --integer needs images"),
        ([str(exact), "--integer", out, "--inputs", "digits"], "--terms: an exact √2"),
    ):
        assert_refused(main, argv, f"logart-export: {line}", capfd)
        assert not Path(out).exists()


def test_levels_of_the_files_own_activations_are_taken(tmp_path: Path, capfd: Any) -> None:
    network = logart_cnn.models.load_network("digits_resnet")
    info = {
        "network": network.recipe, "preprocessing": asdict(network.preprocessing), "source": {"data": DIGITS},
        "class_names": [str(digit) for digit in range(10)],
    }  # fmt: skip
    calibration = torch.stack([open_source(info, DIGITS).train[index][0] for index in range(32)])
    for scale in ("pow2", "float"):
        config = QuantConfig(rounding="nearest", hardware_terms=2, n_bits_a=6, act_scale=scale, calib_samples=32)
        quantized = quantize_model(copy.deepcopy(network.model), config, calibration)[0]
        save_packed(quantized, tmp_path / f"{scale}.safetensors", json.loads(json.dumps(info)))
    argv = ["--integer", str(tmp_path / "out")]
    line = "logart-export: --integer: layer conv1 reads activations with steps of "
    assert_refused(main, [str(tmp_path / "float.safetensors"), *argv], line, capfd)
    file = str(tmp_path / "pow2.safetensors")
    assert_refused(main, [file, *argv, "--a_bit", "6"], "logart-export: --a_bit has no effect here", capfd)
    assert main([file, *argv, "--n", "8", "--quiet"]) == 0
    graph, loaded = graph_of(tmp_path / "out"), load_packed(file)
    known = {f"{name.removesuffix('.input_quantizer')}": q for name, q in quantizers(loaded).items()}
    read = {node["layer"]: graph["values"][node["inputs"][0]] for node in graph["nodes"] if node.get("layer")}
    assert read.keys() == known.keys() and graph["activation_bits"] == 6
    assert "theirs are the packed network's own" in (tmp_path / "out" / "README.md").read_text("utf-8")
    for name, quantizer in known.items():
        grid = quantizer.even_grid
        assert grid is not None and grid.step == 2.0 ** -read[name]["fraction"]
        assert (read[name]["bits"], read[name]["signed"]) == (6, grid.low < 0)
    # Values between layers have 16 bits: the logits are the quantized network's but for few roundings.
    val = open_source(info, DIGITS).val
    images = torch.stack([val[val.names.index(name)][0] for name in graph["golden_images"]])
    with torch.no_grad():
        logits = loaded(images)
    golden = np.load(tmp_path / "out" / "golden" / f"{graph['output']['value']}.npy").astype(float)
    distance = np.abs(np.ldexp(golden, -graph["output"]["fraction"]) - logits.numpy())
    assert np.median(distance) < 0.01 * float(logits.abs().max())


def test_a_transformer_is_refused_by_the_first_step_that_has_no_integer_form(tmp_path: Path, capfd: Any) -> None:
    network = logart_vit.models.load_network("digits_vit")
    config = QuantConfig(rounding="nearest", hardware_terms=2)
    quantized = quantize_model(network.model, config, torch.randn(2, 1, 8, 8))
    info = {
        "network": network.recipe, "preprocessing": {**asdict(network.preprocessing)}, "source": {"data": DIGITS},
        "class_names": [str(digit) for digit in range(10)],
    }  # fmt: skip
    save_packed(quantized[0], tmp_path / "vit.safetensors", json.loads(json.dumps(info)))
    argv = [str(tmp_path / "vit.safetensors"), "--integer", str(tmp_path / "out")]
    assert_refused(main, argv, "logart-export: --integer: flatten to [2, 48, 4] (step flatten) has no integer", capfd)
    assert not (tmp_path / "out").exists()


def test_the_network_is_the_one_that_is_loaded(exported: Path, packed: Path) -> None:
    """With 12-bit activations, which the accumulators hold, it is the packed network but for their rounding."""
    out = exported.parent / "twelve"
    graph = export_integer(packed, out, DIGITS, a_bit=12, images=2, test_images=20)
    assert not any(node.get("left_out") for node in graph["nodes"])
    val = open_source(PackedFile.read(packed).info, DIGITS).val
    images = torch.stack([val[0][0], val[1][0]])
    with torch.no_grad():
        logits = load_packed(packed)(images)
    integers = integer_reference.run(graph, input_integers(graph, images), out)[graph["output"]["value"]]
    assert np.abs(np.ldexp(integers.astype(float), -graph["output"]["fraction"]) - logits.numpy()).max() < 0.02


def test_the_reference_needs_nothing_of_the_project() -> None:
    assert isinstance(integer_reference, ModuleType)
    source = Path(str(integer_reference.__file__)).read_text("utf-8")
    assert "torch" not in source and "logart" not in source.replace("logart-integer", "")
