"""ONNX files: the weights bit for bit, the logits, the size, and what is refused."""

import importlib.util
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import logart.export.onnx_export
import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import UserError
from logart.export.onnx_activations import count_ties
from logart.export.onnx_export import export_onnx
from logart.grids.activations import EvenGrid
from logart.grids.grid import CodebookSpec
from logart.grids.linear import LINEAR_MINMAX
from logart.grids.logarithmic import DYNAMIC
from logart.networks.network import network_recipe
from logart.packed.file import PackedFile
from logart.quantization.activation_quantizer import quantizers
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers

PREPROCESSING = {"preprocessing": {"input_size": [3, 8, 8]}}


def pack(model: nn.Module, path: Path, info: dict[str, Any], seed: int = 0, **settings: Any) -> Path:
    """The packed file of a network quantized without learning, on noise."""
    size = info["preprocessing"]["input_size"] if "preprocessing" in info else [3, 8, 8]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))
    config = QuantConfig(**{"n_bits": 4, "rounding": "nearest", **settings})
    save_packed(quantize_model(model.eval(), config, images)[0], path, info)
    return path


def run(file: Path, images: Tensor) -> Tensor:
    """The graph as it stands: onnxruntime's integer kernels, which round activations, are left out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def weights_in(file: Path, layers: dict[str, QuantizedWeight]) -> dict[str, Tensor]:
    """What the graph expands each layer's codes to."""
    model = onnx.load(file)
    names = [f"network.{name}.weight" for name in layers]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.zeros([1, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])], np.float32)
    return dict(zip(layers, map(torch.from_numpy, session.run(names, {"images": image})), strict=True))


def is_linear(layer: QuantizedWeight) -> bool:
    return "step" in layer.packed()[1].columns


def same_weight(found: Tensor, layer: QuantizedWeight) -> bool:
    """Bit for bit; of a linear grid, whose scale is a float32, within two roundings."""
    if is_linear(layer):
        return found.dtype == torch.float32 and torch.allclose(found, layer.weight, rtol=2.0**-23, atol=0)
    return same_bits(found, layer.weight)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def check(source: Path, out: Path, model: nn.Module | None = None) -> None:
    """The exported file has the packed file's weights, logits and info, and standard operators only."""
    export_onnx(source, out, model=model)
    network = load_packed(source, model)
    layers = quantized_layers(network)
    found = weights_in(out, layers)
    assert found.keys() == layers.keys() and len(layers) > 0
    assert all(same_weight(found[name], layer) for name, layer in layers.items())
    exported = onnx.load(out)
    onnx.checker.check_model(exported, full_check=True)
    # One node a layer, of its name; what is no standard operator is a function of standard operators in the file.
    weights = {node.output[0]: node for node in exported.graph.node if node.name in layers}
    assert [node.name for node in weights.values()] == list(layers)
    for name, layer in layers.items():
        node = weights[f"network.{name}.weight"]
        assert (node.domain, node.op_type) == (("", "DequantizeLinear") if is_linear(layer) else ("logart", "Decode"))
    assert {node.domain for node in exported.graph.node if node.name not in layers} == {""}
    names = {(function.domain, function.name) for function in exported.functions}
    assert names == ({("logart", "Decode")} if not all(map(is_linear, layers.values())) else set())
    assert {node.domain for function in exported.functions for node in function.node} <= {""}
    assert [entry.name for entry in exported.graph.input] == ["images"]
    assert json.loads(exported.metadata_props[0].value) == network.packed_info
    for batch in (1, 5):
        images = torch.randn(batch, *network.packed_info["preprocessing"]["input_size"])  # type: ignore[index]
        with torch.no_grad():
            expected = network(images)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(run(out, images), expected, rtol=0, atol=1e-4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exported").mkdir()
    return tmp_path / "exported" / "network.onnx"


@pytest.mark.parametrize("models, name", [(logart_cnn.models, "digits_resnet"), (logart_vit.models, "digits_vit")])
def test_the_digits_networks(models: Any, name: str, tmp_path: Path, out: Path) -> None:
    network = models.load_network(name)
    info = {"network": network.recipe, "preprocessing": asdict(network.preprocessing), "class_names": ["zéro", "√2"]}
    source = pack(network.model, tmp_path / "packed.safetensors", json.loads(json.dumps(info)))
    check(source, out)


@pytest.mark.parametrize(
    "track, arch, size, n_bits, graph", [("cnn", "resnet18", 64, 3, 40_000), ("vit", "deit_tiny", 224, 4, 220_000)]
)
def test_networks_of_full_size(
    track: str, arch: str, size: int, n_bits: int, graph: int, tmp_path: Path, out: Path
) -> None:
    torch.manual_seed(0)
    models = {"cnn": logart_cnn.models, "vit": logart_vit.models}[track]
    info = {
        "network": network_recipe(track, arch, None, None, None),
        "preprocessing": {"input_size": [3, size, size]},
    }
    source = pack(models.build_network(arch, shapes={}), tmp_path / "packed.safetensors", info, n_bits=n_bits)
    check(source, out)
    layers = quantized_layers(load_packed(source))
    channels = sum(layer.shape[0] for layer in layers.values())
    assert out.stat().st_size < source.stat().st_size + 8 * channels + graph


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_every_width_takes_its_bits_only(n_bits: int, tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_resnet()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING, n_bits=n_bits)
    check(source, out, model)
    constants = {constant.name: constant for constant in onnx.load(out).graph.initializer}
    layers = quantized_layers(load_packed(source, model))
    for name, layer in layers.items():
        codes = numpy_helper.to_array(constants[f"network.{name}.weight.codes"])
        assert codes.dtype == np.uint8
        assert layer.shape.numel() * n_bits / 8 <= codes.nbytes < layer.shape.numel() * n_bits / 8 + n_bits
    quantized = {layer.shape for layer in layers.values()}
    assert not [name for name, constant in constants.items() if torch.Size(constant.dims) in quantized]


@pytest.mark.parametrize("last", range(1, 8))
def test_counts_that_fill_no_group_of_eight(last: int, tmp_path: Path, out: Path) -> None:
    torch.manual_seed(last)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3), nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, last))
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING, n_bits=5, first_last_bits=7)
    check(source, out, model)


@pytest.mark.parametrize(
    "settings",
    [
        {"channel_wise": False},
        {"asymmetric": True, "zero_code": True, "n_bits": 3},
        {"scale_search": "grid", "asymmetric": True},
        {"scale_search": "half_step", "n_bits": 5},
        {"hardware_terms": 2},
        {"hardware_terms": 4, "zero_code": True},
        {"scale_method": "linear_minmax"},
        {"scale_method": "linear_mse", "n_bits": 6},
        {"scale_method": "linear_minmax", "channel_wise": False, "n_bits": 3},
        {"scale_method": "apot"},
        {"scale_method": "log_2", "first_last_bits": 8},
        {"scale_method": "log_sqrt2", "n_bits": 8},
    ],
    ids=str,
)
def test_every_grid(settings: dict[str, Any], tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_resnet()
    check(pack(model, tmp_path / "packed.safetensors", PREPROCESSING, **settings), out, model)


def test_a_transformer_of_ones_own(tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_vit()
    check(pack(model, tmp_path / "packed.safetensors", PREPROCESSING, n_bits=6), out, model)


def test_dropout_stays_off(tmp_path: Path, out: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5))
    check(pack(model, tmp_path / "packed.safetensors", PREPROCESSING), out, model)


@pytest.mark.parametrize("scale_method", ["log_2", "log_sqrt2", "linear_minmax"])
def test_extreme_channels(scale_method: str, tmp_path: Path, out: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with torch.no_grad():
        model[1].weight[0] = 0.0
        model[1].weight[1] *= 2.0**-122
        model[1].weight[2] *= 2.0**-143
        model[1].weight[3] *= 2.0**60
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING, scale_method=scale_method)
    export_onnx(source, out, model=model)
    layers = quantized_layers(load_packed(source, model))
    weight = weights_in(out, layers)["1"]
    assert same_bits(weight, layers["1"].weight)
    assert [node.op_type for node in onnx.load(out).graph.node if node.name == "1"] == ["Decode"]  # float32 scales end
    denormal = (weight[:3] != 0) & (weight[:3].abs() < torch.finfo(torch.float32).tiny)
    assert denormal[1].any() and denormal[2].any()


@pytest.mark.parametrize("terms", [0, 2, 3, 4])
@pytest.mark.parametrize("n_bits", [2, 5, 8])
def test_units_times_factor_are_the_levels(n_bits: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(n_bits + terms)
    n_levels, channels = 2 ** (n_bits - 1), 400
    k = torch.randint(0, n_levels + 1, (channels,), generator=generator)
    top = torch.randint(-300, 250, (channels,), generator=generator)
    columns = {
        "top_half_step": torch.where(k == n_levels, top // 2 * 2, top),
        "n_base2": k,
        "flags": torch.randint(0, 4, (channels,), generator=generator),
        "unused_codes": torch.zeros(channels, dtype=torch.int64),
        "scale": torch.randint(1, 64, (channels,), generator=generator),
    }
    spec = CodebookSpec(DYNAMIC, columns, terms)
    units, factor = DYNAMIC.units(spec, n_bits, torch.float32)
    assert same_bits((units * factor[:, None]).float(), spec.codebook(n_bits).levels.float())


def test_units_of_linear_levels_are_cut_where_they_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    columns = {"step": torch.tensor([0.0, 0.3, largest / 7 * 1.01]), "zero_point": torch.tensor([0, 5, 8])}
    spec = CodebookSpec(LINEAR_MINMAX, columns)
    units, factor = LINEAR_MINMAX.units(spec, 4, torch.float32)
    expected = spec.codebook(4).levels
    assert expected.max() == largest
    assert same_bits((units * factor[:, None]).clamp(-largest, largest).float() + 0.0, expected.float() + 0.0)


def test_channels_that_share_levels_share_their_row(tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_resnet()
    export_onnx(
        pack(model, tmp_path / "packed.safetensors", PREPROCESSING, n_bits=8, scale_method="log_sqrt2"),
        out,
        model=model,
    )
    constants = {constant.name: constant.dims for constant in onnx.load(out).graph.initializer}
    assert constants["rows.8bit"][0] <= 2  # the top half-step is even or odd
    assert math.prod(constants["values.8bit"]) <= 2 * 2**8


def test_sizes_add_up_to_the_file(tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_resnet()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING)
    written = export_onnx(source, out, model=model)
    assert str(written.sizes) in str(written) and "largest difference of a logit to torch" in str(written)
    layers = quantized_layers(load_packed(source, model)).values()
    parts = {name: sizes for name, *sizes in written.sizes.parts}
    assert sum(packed for _, packed in parts.values()) == out.stat().st_size
    assert parts["quantized weights"] == [
        4 * sum(layer.shape.numel() for layer in layers),
        sum(4 * -(-layer.shape.numel() // 8) for layer in layers),
    ]
    assert parts["everything else"] == [4 * sum(layer.shape[0] for layer in layers)] * 2  # the biases; norms are folded


@pytest.mark.parametrize("scale_method, opset, kind", [
    ("linear_minmax", None, TensorProto.UINT4), ("linear_minmax", 20, TensorProto.UINT8), ("dynamic", 21, None),
])  # fmt: skip
def test_the_opset_decides_how_short_linear_codes_are(
    scale_method: str, opset: int | None, kind: int | None, tmp_path: Path, out: Path
) -> None:
    model, images = networks.small_resnet()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING, scale_method=scale_method, first_last_bits=6)
    written = export_onnx(source, out, model=model, opset=opset)
    exported = onnx.load(out)
    assert {entry.domain: entry.version for entry in exported.opset_import}[""] == written.opset == (opset or 21)
    codes = {c.name: c for c in exported.graph.initializer if c.name.endswith(".codes")}
    layers = PackedFile.read(source).layers
    assert len(codes) == len(layers)
    for name, layer in layers.items():
        stored = codes[f"network.{name}.weight.codes"]
        assert stored.data_type == (TensorProto.UINT8 if kind is None or layer.n_bits > 4 else kind)
        if kind is not None:
            assert torch.equal(torch.from_numpy(numpy_helper.to_array(stored).astype(np.uint8)), layer.unpacked())
    with torch.no_grad():
        expected = load_packed(source, model)(images)
    difference = (run(out, images) - expected).abs().max()
    assert difference < 1e-4 and written.difference < 1e-4 <= written.largest


def test_half_precision(tmp_path: Path, out: Path) -> None:
    model, images = networks.small_resnet()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING)
    whole = export_onnx(source, out, model=model).sizes
    half = export_onnx(source, out, model=networks.small_resnet()[0], half=True)
    rest = {name: packed for name, _, packed in half.sizes.parts}["everything else"]
    assert 2 * rest == {name: packed for name, _, packed in whole.parts}["everything else"]
    exported = onnx.load(out)
    kinds = {entry.type.tensor_type.elem_type for entry in (*exported.graph.input, *exported.graph.output)}
    assert kinds == {TensorProto.FLOAT16}
    with torch.no_grad():
        expected = load_packed(source, networks.small_resnet()[0])(images)
    logits = run(out, images.half())
    assert logits.dtype is torch.float16 and 0 < (logits - expected).abs().max() < 1e-2
    assert abs(half.difference) < 1e-2


def test_nothing_is_printed(tmp_path: Path, out: Path, capfd: Any, recwarn: Any) -> None:
    model, _ = networks.small_vit()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING)
    recwarn.clear()
    capfd.readouterr()
    export_onnx(source, out, model=model)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_the_network_given_is_not_changed(tmp_path: Path, out: Path) -> None:
    model, _ = networks.small_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(pack(model, tmp_path / "packed.safetensors", PREPROCESSING), out, model=model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def kept(out: Path) -> Any:
    """A file in the place of the result, which must still be there, alone, after whatever fails."""
    out.write_text("what was there")
    yield out
    assert os.listdir(out.parent) == [out.name] and out.read_text() == "what was there"


@pytest.mark.parametrize(
    "info, message",
    [
        ({}, "does not say how large its images are"),
        ({"preprocessing": {}}, "does not say how large its images are"),
        ({"preprocessing": {"input_size": [3, 8]}}, "has the input_size"),
        ({"preprocessing": {"input_size": [3, 8, 0]}}, "has the input_size"),
        ({"preprocessing": {"input_size": [3, 8, 8.0]}}, "has the input_size"),
        ({"preprocessing": {"input_size": [3, True, 8]}}, "has the input_size"),
        ({"preprocessing": {"input_size": [3, 99999, 99999]}}, "has the input_size"),
        ({"preprocessing": {"input_size": [2, 8, 8]}}, "torch cannot export the network"),
    ],
)
def test_files_whose_images_are_unknown(info: dict[str, Any], message: str, tmp_path: Path, kept: Path) -> None:
    model, images = networks.small_resnet()
    config = QuantConfig(n_bits=4, rounding="nearest", scale_method="log_2")
    source = tmp_path / "packed.safetensors"
    save_packed(quantize_model(model, config, images)[0], source, info)
    with pytest.raises(UserError, match=f"--onnx: .*packed.safetensors.*{message}") as error:
        export_onnx(source, kept, model=model)
    assert "\n" not in str(error.value)


def test_weights_of_another_type(tmp_path: Path, kept: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    source = tmp_path / "packed.safetensors"
    save_packed(quantize_model(model, QuantConfig(rounding="nearest"), images)[0], source, PREPROCESSING)
    with pytest.raises(UserError, match=r"layer 1 has weights of torch\.float64; expected torch\.float32"):
        export_onnx(source, kept, model=model)


class Frozen(nn.Module):
    """Takes the batch size for a constant when traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(int(x.shape[0]), -1))  # type: ignore[no-any-return]


class FrozenSum(Frozen):
    """Takes the number of images for a factor, and runs at any batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * float(len(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Frozen(), FrozenSum()], ids=lambda model: type(model).__name__)
def test_a_trace_that_froze_the_batch_size_is_refused(model: nn.Module, tmp_path: Path, kept: Path) -> None:
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING)
    with pytest.raises(UserError, match="torch's export of the network does not run as it should"):
        export_onnx(source, kept, model=model)


@pytest.mark.parametrize("name", ["network.pb", "no/folder/network.onnx", "."])
def test_places_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--onnx: .*expected a file that ends in .onnx"):
        export_onnx(tmp_path / "packed.safetensors", tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full(call: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    model, _ = networks.small_resnet()
    source = pack(model, tmp_path / "packed.safetensors", PREPROCESSING)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="--onnx: .*cannot be written .*No space left on device"):
        export_onnx(source, kept, model=model)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "logart.export.onnx_file")
    spec = importlib.util.spec_from_file_location("without_the_extra", logart.export.onnx_export.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=rf"--onnx: needs the extra \[onnx\] \(.*{package}.*\); .*logart\[onnx\]"):
        module.export_onnx(tmp_path / "packed.safetensors", tmp_path / "network.onnx")


def test_weights_whose_channels_do_not_come_first_are_refused(tmp_path: Path, out: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(324, 2)).eval()
    network = quantize_model(model, QuantConfig(rounding="nearest"), torch.rand(2, 3, 8, 8))[0]
    save_packed(network, tmp_path / "packed.safetensors", PREPROCESSING)
    with pytest.raises(UserError, match="--onnx: .*: 0 is a weight whose channels do not come first"):
        export_onnx(tmp_path / "packed.safetensors", out, model=model)


def nodes_of(file: Path) -> dict[str, list[Any]]:
    """The nodes of a file by operator."""
    nodes: dict[str, list[Any]] = {}
    for node in onnx.load(file).graph.node:
        nodes.setdefault(node.op_type, []).append(node)
    return nodes


def pack_resnet(path: Path, **settings: Any) -> tuple[Path, nn.Module]:
    """A network with quantized activations, as a file and loaded from it."""
    model, _ = networks.small_resnet()
    pack(model, path, PREPROCESSING, calib_samples=2, **settings)
    return path, load_packed(path, model)


@pytest.mark.parametrize("n_bits_a", [8, 4, 12])
def test_quantized_activations_are_pairs_of_nodes_before_layers_of_linear_grids(n_bits_a: int, tmp_path: Path) -> None:
    source, network = pack_resnet(tmp_path / "a.safetensors", scale_method="linear_mse", n_bits_a=n_bits_a)
    out = tmp_path / "a.onnx"
    written = export_onnx(source, out, model=network)
    assert written.opset == 21 and written.values > 0 and written.difference < 1e-4
    nodes, found = nodes_of(out), quantizers(network)
    assert {n.name for n in nodes["QuantizeLinear"]} == {f"{n.removesuffix('_quantizer')}.quantize" for n in found}
    assert "Floor" not in nodes and len(nodes.get("Clip", ())) == (0 if n_bits_a == 8 else len(found))
    zeros = {c.name: c.data_type for c in onnx.load(out).graph.initializer if c.name.endswith(".zero_point")}
    for name, quantizer in found.items():
        grid = quantizer.even_grid
        assert grid is not None
        kind = f"{'U' * (grid.low == 0)}INT{8 if n_bits_a <= 8 else 16}"
        assert zeros[f"network.{name.removesuffix('_quantizer')}.zero_point"] == getattr(TensorProto, kind)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (run(out, images) - network(images)).abs()
    assert difference.median() < 1e-5 and difference.max() < 0.02  # a value at a border may go to the other level
    if n_bits_a == 12:
        with pytest.raises(UserError, match="--opset: activations of 12 bits need 21 or more, got 20"):
            export_onnx(source, out, model=network, opset=20)


def test_integer_kernels_take_such_a_network(tmp_path: Path) -> None:
    source, network = pack_resnet(tmp_path / "a.safetensors", scale_method="linear_mse", n_bits_a=8)
    export_onnx(source, tmp_path / "a.onnx", model=network)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "b.onnx"), 3
    onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
    assert "QLinearConv" in nodes_of(tmp_path / "b.onnx")


def test_activations_before_other_grids_stay_operators_that_give_the_same_logits(tmp_path: Path) -> None:
    """Behind such pairs onnxruntime would round weights to linear 8 bits."""
    source, network = pack_resnet(tmp_path / "a.safetensors", n_bits_a=8)
    written = export_onnx(source, tmp_path / "a.onnx", model=network)
    assert "QuantizeLinear" not in nodes_of(tmp_path / "a.onnx")
    assert written.values == 0 and written.difference < 1e-4 and written.optimized < 1e-4


def test_ties_are_counted() -> None:
    """Halfway values round up in torch and to the even level in ONNX."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    config = QuantConfig(rounding="nearest", n_bits_a=8, calib_samples=2)
    quantized = quantize_model(network, config, torch.rand(2, 4))[0]
    (quantizer,) = quantizers(quantized).values()
    quantizer.set_even(EvenGrid(0.5, 0, 255))
    images = torch.tensor([[0.25, 0.5, 0.75, 1.0], [-0.25, 127.75, 3.1, 0.0]])  # at the ends both saturate
    assert count_ties(quantized, images) == (2, 8)
