"""The hardware export, read back from its files alone: weights, words, golden vectors, counts; and wrong calls."""

from __future__ import annotations

import json
import re
import runpy
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hardware_folder import read_export
from PIL import Image
from small_runs import assert_refused
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, quantize_model, save_packed
from logart.errors import UserError
from logart.export.command import main
from logart.export.hardware_export import export_hardware
from logart.export.hardware_readme import cost_table
from logart.export.inputs import GoldenImages, golden_images
from logart.export.onnx_export import OPSETS, check_target
from logart.grids.grid import ScaleSearch
from logart.networks.network import DIGITS_PREPROCESSING, network_recipe
from logart.packed.file import PackedFile
from logart.quantization.layers import hardware_approximation
from logart.quantization.surgery import quantized_layers


class Odd(nn.Module):
    """A user's own network: every kind of convolution, tokens, two token axes."""

    def __init__(self) -> None:
        super().__init__()
        self.same = Conv2dSame(2, 4, 3, stride=2)
        self.depthwise = nn.Conv2d(4, 8, (3, 2), padding="same", dilation=(2, 1), groups=4)  # one more on one side
        self.grouped = nn.Conv2d(8, 6, 3, stride=(2, 1), padding=(1, 2), groups=2, padding_mode="reflect", bias=False)
        self.tokens = nn.Linear(6, 5)
        self.windows = nn.Linear(5, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.same(x))))))
        x = F.gelu(self.tokens(x.flatten(2).transpose(1, 2)))  # [n, tokens, 5]
        x = self.windows(x[:, :12].unflatten(1, (3, 4)))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


def quantized(model: nn.Module, images: Tensor, **settings: Any) -> nn.Module:
    config = QuantConfig(**{"rounding": "nearest", "n_bits": 4, **settings})
    return quantize_model(model.eval(), config, images)[0]


def info(track: str, arch: str) -> dict[str, Any]:
    p = DIGITS_PREPROCESSING
    return {
        "network": network_recipe(track, arch, {}, None, None),
        "preprocessing": {**vars(p), "input_size": list(p.input_size), "mean": list(p.mean), "std": list(p.std)},
        "source": {"data": "digits"},
    }


def digits(path: Path, track: str = "cnn", **settings: Any) -> nn.Module:
    """A packed network for digits of random weights."""
    torch.manual_seed(0)
    build = {"cnn": logart_cnn.models, "vit": logart_vit.models}[track].build_network
    arch = {"cnn": "digits_resnet", "vit": "digits_vit"}[track]
    model = quantized(build(arch, shapes={}, model_kwargs={}), torch.randn(4, 1, 8, 8), **settings)
    save_packed(model, path, info(track, arch))
    return model


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed digits_resnet with an exact √2. Not to be written to."""
    path = tmp_path_factory.mktemp("packed") / "exact.safetensors"
    digits(path)
    return path


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Tensor]:
    """A user's own packed network with its float one, and images."""
    torch.manual_seed(1)
    model, images = Odd().eval(), torch.randn(3, 2, 11, 10)
    path = tmp_path_factory.mktemp("packed") / "odd.safetensors"
    save_packed(quantized(model, images, n_bits=3, scale_search=ScaleSearch.GRID, hardware_terms=2), path)
    return path, model, images


def mine(images: Tensor) -> GoldenImages:
    return GoldenImages(images, images, "mine")


def folders(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of the layers with their entries."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [(folder / layer["folder"], layer) for layer in manifest["layers"]]


def hex_numbers(path: Path, bits: int, *, signed: bool) -> np.ndarray:
    """Numbers as a `$readmemh` would read them, all lines of one width."""
    *lines, end = path.read_bytes().decode("ascii").split("\n")
    assert end == ""
    width = -(-bits // 4)
    assert all(re.fullmatch(rf"[0-9a-f]{{{width}}}", line) for line in lines)
    values = [int(line, 16) for line in lines]
    return np.array([v - 16**width if signed and v >= 16**width // 2 else v for v in values], np.int64)


# ---------------------------------------------------------------- weights

OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_bits": 2, "scale_search": ScaleSearch.GRID, "zero_code": True},
    {"n_bits": 3, "scale_search": ScaleSearch.HALF_STEP, "first_last_bits": 8},
    {"n_bits": 5, "asymmetric": True, "channel_wise": False},
    {"n_bits": 8, "scale_method": "log_sqrt2", "asymmetric": True, "zero_code": True},
]


@pytest.mark.parametrize("since_calibration", [False, True])
@pytest.mark.parametrize(("options", "terms"), list(zip(OPTIONS, (2, 3, 4, 2, 3), strict=True)), ids=str)
def test_the_files_give_the_weights_back(
    options: dict[str, Any], terms: int, since_calibration: bool, tmp_path: Path
) -> None:
    packed = tmp_path / "a.safetensors"
    model = digits(packed, **options, hardware_terms=terms if since_calibration else 0)
    manifest = export_hardware(packed, tmp_path / "out", terms=None if since_calibration else terms)
    found = read_export(tmp_path / "out")
    with hardware_approximation(model, terms):
        expected = {name: layer.weight.clone() for name, layer in quantized_layers(model).items()}
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
    for name, layer in PackedFile.read(packed).layers.items():
        assert torch.equal(replace(layer, spec=replace(layer.spec, terms=terms)).weight(), found[name])
        assert torch.equal(layer.weight(), found[name]) or not since_calibration
    for entry in manifest["layers"]:  # of 2 bits some layers have no √2
        tail = entry["add_shifts"]
        assert tail == {2: [1], 3: [1, -4], 4: [1, -4, -6]}[terms] or (options.get("n_bits") == 2 and tail == [])
        assert entry["root2_approximated_by_export"] == (bool(tail) and not since_calibration)
        codebook = np.load(tmp_path / "out" / entry["folder"] / "codebook.npy")
        assert codebook.shape == (entry["codebooks"], 2 ** entry["bits"], 2 + len(tail))


def test_base_2_needs_no_approximation(tmp_path: Path) -> None:
    digits(tmp_path / "a.safetensors", scale_method="log_2")
    export_hardware(tmp_path / "a.safetensors", tmp_path / "out")
    layers = PackedFile.read(tmp_path / "a.safetensors").layers
    assert all(torch.equal(w, layers[name].weight()) for name, w in read_export(tmp_path / "out").items())
    assert "No level holds √2" in (tmp_path / "out" / "README.md").read_text()
    for _, layer in folders(tmp_path / "out"):  # one shift and one add a weight
        assert layer["cost"]["shifts"] == layer["cost"]["adds"] == layer["cost"]["multiplications"]
    with pytest.raises(UserError, match="--terms has no effect here"):
        export_hardware(tmp_path / "a.safetensors", tmp_path / "other", terms=2)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2]], ids=str)
def test_words_and_hex_say_what_the_arrays_say(options: dict[str, Any], tmp_path: Path) -> None:
    digits(tmp_path / "a.safetensors", **options)
    export_hardware(tmp_path / "a.safetensors", tmp_path / "out", terms=4)
    weights = read_export(tmp_path / "out")
    for folder, layer in folders(tmp_path / "out"):
        rows, groups, bits = layer["shape"][0], layer["codebooks"], layer["bits"]
        codes = hex_numbers(folder / "codes.hex", bits, signed=False)
        assert np.array_equal(codes, np.load(folder / "codes.npy").ravel()) and codes.max() < 2**bits
        words = hex_numbers(folder / "codebook.hex", 16, signed=False).reshape(groups, 2**bits)
        # The weights by the README's definition of a word, from hex alone.
        shift = (words & 0x1FFF) - ((words & 0x1000) << 1)
        factor = np.where(words >> 13 & 1, 1 + 1 / 2 - 1 / 16 - 1 / 64, 1.0)
        levels = np.where(words >> 15, 0.0, np.where(words >> 14 & 1, -1, 1) * factor * 2.0**shift)
        assert not (words[words >> 15 == 1] & 0x7FFF).any()
        if layer["scale"] is not None:
            scale = hex_numbers(folder / "scale.hex", 8, signed=False)
            assert np.array_equal(scale, np.load(folder / "scale.npy"))
            assert all(sum(s * 2**e for s, e in layer["scale"][str(i)]) == i for i in scale.tolist())
            levels = levels * scale[:, None] / 32
        which = np.arange(rows) // (rows // groups)
        weight = levels[which[:, None], codes.reshape(rows, -1)].reshape(layer["shape"])
        assert torch.equal(torch.from_numpy(weight).float(), weights[layer["name"]])
    assert any(layer["scale"] for _, layer in folders(tmp_path / "out")) == ("scale_search" in str(options) and
        options["scale_search"] is ScaleSearch.GRID)  # fmt: skip


@pytest.mark.parametrize("n_bits", [2, 4])
def test_where_levels_differ_in_their_add_shifts_each_has_its_own(n_bits: int, tmp_path: Path) -> None:
    digits(tmp_path / "a.safetensors", scale_method="apot", n_bits=n_bits)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval().requires_grad_(False)
    model[1].weight.zero_()  # of a layer of zeros no level has one
    zeros = quantized(model, torch.randn(2, 1, 8, 8), scale_method="apot", n_bits=n_bits)
    save_packed(zeros, tmp_path / "0.safetensors")
    shared = []
    for name in ("a", "0"):
        export_hardware(tmp_path / f"{name}.safetensors", tmp_path / name)
        for folder, layer in folders(tmp_path / name):
            codebook, words = np.load(folder / "codebook.npy"), hex_numbers(folder / "codebook.hex", 16, signed=False)
            own = layer["add_shifts"] is None
            assert codebook.shape[2] == 2 + (1 if own else len(layer["add_shifts"]))
            assert (folder / "add_shifts.npy").exists() == (folder / "add_shifts.hex").exists() == own
            if own:
                assert np.array_equal(np.load(folder / "add_shifts.npy"), codebook[..., 2:])
                assert np.array_equal(hex_numbers(folder / "add_shifts.hex", 8, signed=True), codebook[..., 2:].ravel())
            assert np.array_equal(words >> 13 & 1, codebook[..., 2:].any(-1).ravel())
            shared.append(layer["add_shifts"])
    assert shared[-1] == [] and (None in shared) == (n_bits == 4)


# ---------------------------------------------------------------- golden vectors


def check_golden(out: Path, inputs: dict[str, Tensor]) -> None:
    """Golden vectors, from the files alone, against float64 layers of these inputs."""
    weights = read_export(out)
    for folder, layer in folders(out):
        golden, geometry = layer["golden"], layer["geometry"]
        at, bits = folder / "golden", golden["output"]["bits"]
        x, y = np.load(at / "input.npy"), np.load(at / "output.npy")
        assert x.dtype == np.int16 and y.dtype == np.int64
        assert list(x.shape) == golden["input"]["shape"] and list(y.shape) == golden["output"]["shape"]
        assert np.array_equal(hex_numbers(at / "input.hex", 16, signed=True), x.ravel())
        assert np.array_equal(hex_numbers(at / "output.hex", bits, signed=True), y.ravel())
        weight, bias, rounded = weights[layer["name"]].double(), None, None
        if (at / "bias.npy").exists():
            integers = np.load(at / "bias.npy")
            assert np.array_equal(hex_numbers(at / "bias.hex", bits, signed=True), integers)
            bias = torch.from_numpy(np.load(folder / "bias.npy"))
            rounded = torch.from_numpy(integers * 2.0 ** -golden["output"]["fraction"])
            assert (bias - rounded).abs().max() <= 2.0 ** -golden["output"]["fraction"] / 2

        def layer_of(x: Tensor, bias: Tensor | None, w: Tensor = weight, g: Any = geometry) -> Tensor:
            if g is None:
                return F.linear(x, w, bias)
            (top, bottom), (left, right) = g["padding"]
            mode = {"zeros": "constant"}.get(g["padding_mode"], g["padding_mode"])
            return F.conv2d(
                F.pad(x, (left, right, top, bottom), mode), w, bias, g["stride"], 0, g["dilation"], g["groups"]
            )

        exact = layer_of(torch.from_numpy(x * 2.0 ** -golden["input"]["fraction"]), rounded)
        result = torch.from_numpy(y * 2.0 ** -golden["output"]["fraction"])
        assert golden["rounded_terms"] == 0 and torch.equal(result, exact), layer["name"]
        codes, codebook = np.load(folder / "codes.npy"), np.load(folder / "codebook.npy").astype(np.int64)
        rows, books = codes.reshape(len(codes), -1), np.arange(len(codes)) // (len(codes) // len(codebook))
        sign, shift, *adds = np.moveaxis(codebook[books[:, None], rows], 2, 0)
        exponents = [shift[sign != 0], *((shift - abs(k))[(sign != 0) & (k != 0)] for k in adds)]
        assert golden["guard"] == max(0, -int(np.concatenate(exponents).min()))
        given = inputs[layer["name"]].double()
        assert np.abs(x).max() >= 2**13  # the format is used
        distance = (result - layer_of(given, bias)).abs().max()
        assert 0 < distance <= golden["error_bound"]


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each quantized layer of a network is fed."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        for name, layer in quantized_layers(model).items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_golden_vectors_of_the_digits(track: str, tmp_path: Path) -> None:
    packed, out = tmp_path / "a.safetensors", tmp_path / "out"
    model = digits(packed, track)
    assert main([str(packed), "--out", str(out), "--terms", "2", "--quiet"]) == 0
    images = torch.from_numpy(np.load(out / "images.npy"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert images.shape == (8, 1, 8, 8) and manifest["images"] == 8 and manifest["calibration_images"] == 256
    first = manifest["layers"][0]["golden"]["input"]
    integers = np.load(out / manifest["layers"][0]["folder"] / "golden" / "input.npy")
    assert np.array_equal(np.rint(np.load(out / "images.npy").astype(float) * 2.0 ** first["fraction"]), integers)
    calibration = golden_images(info(track, ""), "digits", 8).calibration
    with hardware_approximation(model, 2):
        check_golden(out, inputs_of(model, images))
        for name, seen in inputs_of(model, calibration).items():
            (golden,) = (layer["golden"] for layer in manifest["layers"] if layer["name"] == name)
            assert 2**14 <= np.rint(float(seen.abs().max()) * 2.0 ** golden["input"]["fraction"]) < 2**15
    floats = manifest["float_operations"]
    if track == "vit":
        blocks = sum(isinstance(module, nn.GELU) for module in model.modules())
        assert floats["gelu"] == blocks > 1 and floats["native_layer_norm"] == 2 * blocks + 1
        assert any("scaled_dot_product" in name or "softmax" in name for name in floats)
    else:
        assert "relu_" in floats or "relu" in floats
    assert not {"convolution", "addmm", "mm", "view", "clone"} & floats.keys()
    assert all(name in (out / "README.md").read_text() for name in floats)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_what_saturates_in_formats_of_smaller_images_is_counted(
    odd: tuple[Path, nn.Module, Tensor], tmp_path: Path
) -> None:
    packed, model, images = odd
    golden = GoldenImages(images, 0.3 * images[:1], "mine")
    manifest = export_hardware(packed, tmp_path / "out", golden=golden, model=model)
    counts = [layer["golden"]["saturated"] for layer in manifest["layers"]]
    assert counts[0] > 0
    for (folder, _), count in zip(folders(tmp_path / "out"), counts, strict=True):
        x = np.load(folder / "golden" / "input.npy")
        assert count <= np.count_nonzero((x == 2**15 - 1) | (x == -(2**15))) <= count + 2


def test_images_from_a_folder_have_the_recorded_preprocessing(exact: Path, tmp_path: Path, capfd: Any) -> None:
    file = PackedFile.read(exact)
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    replace(file, info={**file.info, "class_names": ["a", "b"]}).write(tmp_path / "named.safetensors")
    argv = [str(tmp_path / "named.safetensors"), "--terms", "2", "--quiet", "--inputs", str(folder), "--n", "4"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["images"], manifest["calibration_images"]) == (4, 10)
    first = np.asarray(Image.open(folder / "val" / manifest["image_names"][0].removeprefix("val/")), np.float64) / 255
    p = DIGITS_PREPROCESSING
    expected = (first - p.mean[0]) / p.std[0]
    assert np.abs(np.load(tmp_path / "out" / "images.npy")[0, 0] - expected).max() < 1e-6


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_golden_vectors_of_every_kind_of_layer(odd: tuple[Path, nn.Module, Tensor], tmp_path: Path) -> None:
    packed, model, images = odd
    manifest = export_hardware(packed, tmp_path / "out", golden=mine(images), model=model)
    again = quantized(model, images, n_bits=3, scale_search=ScaleSearch.GRID, hardware_terms=2)
    check_golden(tmp_path / "out", inputs_of(again, images))
    assert [layer["golden"]["output"]["shape"] for layer in manifest["layers"]] == [
        [3, 4, 6, 5], [3, 8, 6, 5], [3, 6, 3, 7], [3, 21, 5], [3, 3, 4, 4], [3, 3],
    ]  # fmt: skip
    macs = [4 * 30 * 18, 8 * 30 * 6, 6 * 21 * 36, 21 * 5 * 6, 12 * 4 * 5, 3 * 4]
    assert [layer["cost"]["multiplications"] for layer in manifest["layers"]] == macs
    assert manifest["cost"]["multiplications"] == sum(macs)
    assert manifest["layers"][0]["geometry"]["padding"] == [[1, 1], [0, 1]]  # 11 to 6 and 10 to 5 by strides of 2


def test_images_from_a_file(exact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32))
    argv = [str(exact), "--terms", "2", "--quiet", "--inputs", str(tmp_path / "mine.npy")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    first = folders(tmp_path / "out")[0][0] / "golden" / "input.npy"
    assert np.load(first).shape == (2, 1, 8, 8)
    ours = (tmp_path / "mine.npy").read_bytes()
    assert (tmp_path / "out" / "images.npy").read_bytes() == ours


# ---------------------------------------------------------------- counts and texts


def test_the_cost_table_is_the_same_everywhere(exact: Path, tmp_path: Path, capfd: Any) -> None:
    assert main([str(exact), "--out", str(tmp_path / "out"), "--terms", "3"]) == 0
    out, _ = capfd.readouterr()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    table = cost_table(manifest)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert table in out and table in readme
    for text in (out, readme):
        assert "√2 ≈ 1 + 1/2 - 1/16 (--terms 3)" in text and "golden vectors" in text.lower()
    packed = PackedFile.read(exact)
    for (_, layer), line in zip(folders(tmp_path / "out"), table.splitlines()[1:], strict=False):
        weight = packed.layers[layer["name"]]
        log2 = weight.weight().double().abs().log2()
        is_odd = (log2 - log2.round()).abs() > 0.25
        positions = layer["cost"]["multiplications"] // is_odd.numel()
        adds = positions * int((1 + 2 * is_odd).sum())
        storage = is_odd.numel() * 4 + layer["shape"][0] * 16  # two integers of a byte each
        expected = [positions * is_odd.numel(), adds, adds, storage, is_odd.numel() * 4 + layer["shape"][0] * 36]
        assert list(layer["cost"].values()) == expected
        assert line.split()[0] == Path(layer["folder"]).name
        assert line.split()[3:] == [f"{value:,}" for value in expected]
    assert "16 bits a codebook" in readme
    assert folders(tmp_path / "out")[0][1]["cost"]["multiplications"] == 64 * 8 * 9  # 8×8 pixels, 8 filters of 3×3
    total = [sum(layer["cost"][name] for layer in manifest["layers"]) for name in manifest["cost"]]
    assert list(manifest["cost"].values()) == total
    assert table.splitlines()[-1].split() == ["total", *(f"{value:,}" for value in total)]


def test_quiet_says_nothing(exact: Path, tmp_path: Path, capfd: Any) -> None:
    assert main([str(exact), "--out", str(tmp_path / "out"), "--terms", "2", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_help(capfd: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out, _ = capfd.readouterr()
    assert stopped.value.code == 0
    for flag in ("FILE", "--out", "--terms", "--inputs", "--onnx", "--quiet"):
        assert flag in out


def test_without_golden_vectors_there_are_counts(tmp_path: Path, capfd: Any) -> None:
    digits(tmp_path / "a.safetensors", hardware_terms=2)
    file = PackedFile.read(tmp_path / "a.safetensors")
    replace(file, info={**file.info, "source": {"data": "pictures"}}).write(tmp_path / "b.safetensors")
    other = [str(tmp_path / "b.safetensors"), "--out", str(tmp_path / "out")]
    assert_refused(main, other, "logart-export: --inputs: golden vectors need images; expected a folder", capfd)
    assert main([*other, "--n", "0"]) == 0
    assert "no golden vectors" in capfd.readouterr().out
    for folder, layer in folders(tmp_path / "out"):
        assert layer["golden"] is None and layer["cost"]["adds"] and not (folder / "golden").exists()
        assert (layer["geometry"] is None) == (layer["kind"] == "Linear")
    assert not (tmp_path / "out" / "images.npy").exists()
    assert "This export has no golden vectors." in (tmp_path / "out" / "README.md").read_text()
    again = [str(tmp_path / "b.safetensors"), "--out", str(tmp_path / "more"), "--quiet", "--inputs", "digits"]
    assert main(again) == 0
    assert folders(tmp_path / "more")[0][1]["golden"]


def test_a_network_that_cannot_be_built_still_gives_its_weights(
    odd: tuple[Path, nn.Module, Tensor], tmp_path: Path, capfd: Any
) -> None:
    packed, _, images = odd
    assert main([str(packed), "--out", str(tmp_path / "out"), "--n", "0"]) == 0
    assert "names no network" in capfd.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["cost"] is None and "names no network" in manifest["not_run"]
    assert all(layer["cost"] is None and layer["geometry"] is None for layer in manifest["layers"])
    layers = PackedFile.read(packed).layers
    assert all(torch.equal(weight, layers[name].weight()) for name, weight in read_export(tmp_path / "out").items())
    with pytest.raises(UserError, match="--inputs: golden vectors need the network"):
        export_hardware(packed, tmp_path / "other", golden=mine(images))
    assert not (tmp_path / "other").exists()


def test_a_layers_name_leads_nowhere_else(odd: tuple[Path, nn.Module, Tensor], tmp_path: Path) -> None:
    file = PackedFile.read(odd[0])
    names = ["../../up", "/root", "a/b", "", "..", "x" * 300]
    layers = dict(zip(names, file.layers.values(), strict=True))
    PackedFile(layers, {}, {"network": [], "preprocessing": {"input_size": [1, -1]}}).write(tmp_path / "a.safetensors")
    export_hardware(tmp_path / "a.safetensors", tmp_path / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "deep"]
    assert len(list((tmp_path / "deep" / "layers").iterdir())) == len(names)
    assert list(read_export(tmp_path / "deep")) == names


# ---------------------------------------------------------------- wrong calls


def test_wrong_calls_take_one_line_and_leave_nothing(exact: Path, tmp_path: Path, capfd: Any) -> None:
    full, new = tmp_path / "full", str(tmp_path / "new")
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    linear, approximated = tmp_path / "linear.safetensors", tmp_path / "two.safetensors"
    digits(linear, scale_method="linear_minmax")
    digits(approximated, hardware_terms=2)
    arrays = {
        "wide": np.zeros((2, 1, 9, 8), np.float32), "flat": np.zeros((8, 8), np.float32),
        "none": np.zeros((0, 1, 8, 8), np.float32),
        "double": np.zeros((2, 1, 8, 8)), "nan": np.full((1, 1, 8, 8), np.nan, np.float32),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "junk.npy").write_bytes(b"PK\x03\x04junk")
    before = sorted(tmp_path.iterdir())
    good = [str(exact), "--out", new, "--terms", "2"]
    wrong: list[tuple[list[str], str]] = [
        ([str(exact)], "nothing to write"),
        ([str(exact), "--out", new], "--terms: an exact √2"),
        ([str(exact), "--out", new, "--terms", "5"], "--terms: invalid choice"),
        ([str(approximated), "--out", new, "--terms", "3"], "--terms: 3, but the file was made with √2 ≈ 1 + 1/2"),
        ([str(linear), "--out", new], "layer 'conv1': levels of the grid linear_minmax have no shifts"),
        ([str(exact), "--out", str(full), "--terms", "2"], f"--out: {full} is there already"),
        ([str(exact), "--out", str(exact), "--terms", "2"], f"--out: {exact} is there already"),
        ([str(exact), "--out", str(tmp_path / "no" / "where"), "--terms", "2"], "--out: no folder"),
        ([str(tmp_path / "missing"), "--out", new], f"{tmp_path / 'missing'}: does not exist"),
        ([str(exact), "--onnx", "x.onnx", "--terms", "2"], "--terms has no effect here"),
        ([str(exact), "--onnx", "x.onnx", "--inputs", "digits"], "--inputs has no effect here"),
        ([str(exact), "--onnx", str(tmp_path / "x.onnx"), "--opset", "17"], "--opset: expected 18 to 23, got 17"),
        ([*good, "--opset", "18"], "--opset has no effect here"),
        ([*good, "--fp16"], "--fp16 has no effect here"),
        ([*good, "--n", "0", "--inputs", "digits"], "--inputs has no effect here: --n 0"),
        ([*good, "--n", "-1"], "--n: expected at least 0, got -1"),
        ([*good, "--inputs", str(tmp_path / "nowhere")], "--inputs: the file does not say how many classes"),
        ([*good, "--inputs", str(tmp_path / "missing.npy")], "--inputs: cannot read"),
        ([*good, "--inputs", str(tmp_path / "junk.npy")], "--inputs: cannot read"),
        *(([*good, "--inputs", str(tmp_path / f"{name}.npy")], "--inputs: ") for name in arrays),
    ]
    for argv, line in wrong:
        assert_refused(main, argv, f"logart-export: {line}", capfd)
        assert sorted(tmp_path.iterdir()) == before
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_images_that_the_network_does_not_take(odd: tuple[Path, nn.Module, Tensor], tmp_path: Path) -> None:
    packed, model, _ = odd
    for images, message in (
        (torch.zeros(1, 5, 11, 10), "does not take"),
        (torch.full((1, 2, 11, 10), torch.inf), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            export_hardware(packed, tmp_path / "out", golden=mine(images), model=model)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = np.save, 0

    def failing(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(UserError, match="--out: cannot write .*No space left"):
        export_hardware(exact, tmp_path / "out", terms=2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty folder is taken
    export_hardware(exact, tmp_path / "out", terms=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and read_export(tmp_path / "out")


def test_onnx_is_handed_on(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    calls: list[tuple[str, ...]] = []
    module = types.ModuleType("logart.export.onnx_export")
    module.export_onnx = lambda *paths, **options: calls.append((*paths, *map(str, options.values())))  # type: ignore[attr-defined]
    module.check_target, module.OPSETS = check_target, OPSETS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "logart.export.onnx_export", module)
    monkeypatch.chdir(tmp_path)
    assert main([str(exact), "--onnx", "x.onnx"]) == 0
    assert calls == [(str(exact), "x.onnx", "None", "False")] and "x.onnx" in capfd.readouterr().out
    options = ["--opset", "19", "--fp16", "--out", str(tmp_path / "out"), "--terms", "2", "--quiet"]
    assert main([str(exact), "--onnx", "y.onnx", *options]) == 0
    assert calls[1:] == [(str(exact), "y.onnx", "19", "True")] and (tmp_path / "out" / "manifest.json").exists()
    wrong = [str(exact), "--onnx", "nowhere/z.onnx", "--out", str(tmp_path / "other"), "--terms", "2", "--quiet"]
    with pytest.raises(SystemExit):
        main(wrong)
    assert not (tmp_path / "other").exists() and len(calls) == 2  # neither, where one cannot be


def test_it_runs_as_a_module(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(exact), "--out", str(tmp_path / "out"), "--terms", "2", "--quiet"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("logart.export", run_name="__main__")
    assert stopped.value.code == 0 and read_export(tmp_path / "out")
