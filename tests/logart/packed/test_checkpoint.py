"""Quantized networks to packed files and back: the same logits, the same bytes, never half a file."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import quantized_twin
from torch import Tensor, nn

import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.grids.grid import ScaleSearch
from logart.networks.network import network_recipe
from logart.packed.checkpoint import to_packed
from logart.packed.file import PackedFile, PackedFileError
from logart.quantization.folding import fold_batch_norms
from logart.quantization.layers import hardware_approximation
from logart.quantization.surgery import quantized_layers

NAMED: dict[str, tuple[str, str, dict[str, object], tuple[int, ...]]] = {
    "digits_resnet": ("cnn", "digits_resnet", {}, (1, 8, 8)),
    "cifar_resnet20": ("cnn", "cifar_resnet20", {}, (3, 32, 32)),
    "mnasnet": ("cnn", "mnasnet", {}, (3, 32, 32)),
    "squeezenet": ("cnn", "squeezenet1_1", {}, (3, 64, 64)),
    "norms with activations": ("cnn", "timm:mobilenetv3_small_050", {}, (3, 32, 32)),
    "same padding": ("cnn", "timm:tf_mobilenetv3_small_minimal_100", {}, (3, 32, 32)),
    "digits_vit": ("vit", "digits_vit", {}, (1, 8, 8)),
    "vit": (
        "vit", "timm:vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}, (3, 16, 16),
    ),
    "swin": (
        "vit", "timm:swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "num_classes": 4},
        (3, 32, 32),
    ),
}  # fmt: skip
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "cnn": logart_cnn.models.build_network,
    "vit": logart_vit.models.build_network,
}
RECIPE = {"network": network_recipe("cnn", "digits_resnet", {}, None, None)}


class Odd(nn.Module):
    """A user's own network: norms that cannot be folded, a tied buffer, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, bias=False)
        self.before = nn.BatchNorm2d(2)
        self.after = nn.BatchNorm2d(6)
        self.moving = nn.BatchNorm2d(6, track_running_stats=False)
        self.last = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.moving(self.after(self.first(self.before(x))))
        return self.last(y.mean((2, 3))) * self.gain.where(self.mask, 2.0)


def trained(model: nn.Module) -> nn.Module:
    """Random weights, and batch norms with statistics that are not the first ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def nearest(model: nn.Module, images: Tensor, **settings: object) -> nn.Module:
    config = QuantConfig(**{"rounding": "nearest", "n_bits": 3, **settings})  # type: ignore[arg-type]
    return quantize_model(model, config, images)[0]


def named(name: str) -> tuple[nn.Module, Tensor, dict[str, object]]:
    track, arch, kwargs, size = NAMED[name]
    torch.manual_seed(0)
    model = trained(BUILDERS[track](arch, shapes={}, model_kwargs=kwargs))
    return model, torch.randn(4, *size), {"network": network_recipe(track, arch, kwargs, None, None)}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor]:
    model, images, _ = named("digits_resnet")
    return nearest(model, images, n_bits=4), images


# ---------------------------------------------------------------- the same network


@pytest.mark.parametrize("name", NAMED)
def test_a_named_network_comes_back_bit_for_bit_without_a_checkpoint(name: str, tmp_path: Path) -> None:
    model, images, info = named(name)
    quantized = nearest(model, images)
    save_packed(quantized, tmp_path / "a.safetensors", info)
    with torch.no_grad():
        expected = quantized(images)
        for dequantize in ("once", "on-the-fly"):
            loaded = load_packed(tmp_path / "a.safetensors", dequantize=dequantize)
            assert torch.equal(loaded(images), expected), dequantize
            assert not any(m.training for m in loaded.modules()) and loaded.packed_info == info
            save_packed(loaded, tmp_path / "b.safetensors")
            assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert not torch.equal(expected, model(images))


OPTIONS: list[dict[str, object]] = [
    {"n_bits": 2, "scale_search": ScaleSearch.GRID, "zero_code": True},
    {"n_bits": 5, "asymmetric": True, "hardware_terms": 2, "channel_wise": False},
    {"n_bits": 8, "scale_method": "log_sqrt2", "asymmetric": True, "zero_code": True, "hardware_terms": 4},
    {"n_bits": 4, "scale_method": "linear_mse", "first_last_bits": 8},
    {"n_bits": 6, "scale_method": "linear_minmax"},
    {"n_bits": 3, "rounding": "compensated", "calib_samples": 4, "scale_search": ScaleSearch.HALF_STEP},
    {"n_bits": 3, "rounding": "both", "calib_samples": 4, "iters": 2, "batch_size": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_grid_comes_back(options: dict[str, object], tmp_path: Path) -> None:
    model, images, info = named("digits_resnet")
    quantized = nearest(model, images, **options)
    save_packed(quantized, tmp_path / "a.safetensors", info)
    loaded = load_packed(tmp_path / "a.safetensors")
    assert torch.equal(loaded(images), quantized(images))
    for name, layer in quantized_layers(quantized).items():
        again = quantized_layers(loaded)[name]
        assert torch.equal(again.weight, layer.weight) and again.n_bits == layer.n_bits
        rows = again.weight.reshape(again.n_codebooks, -1)
        assert all(len(row.unique()) <= 2**layer.n_bits for row in rows)


@pytest.mark.parametrize("dequantize", ["once", "on-the-fly"])
def test_a_users_own_module(dequantize: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, images = trained(Odd()), torch.randn(4, 2, 7, 7)
    quantized = nearest(model, images)
    save_packed(quantized, tmp_path / "a.safetensors")
    other = trained(Odd()).train()  # any weights, any mode
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    loaded = load_packed(tmp_path / "a.safetensors", other, dequantize=dequantize)
    assert torch.equal(loaded(images), quantized(images))
    after = other.state_dict()
    assert other.training and list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert loaded.packed_info["settings"]["n_bits"] == 3  # type: ignore[index]
    assert set(loaded.packed_info["layers"]) == {"first", "last"}  # type: ignore[arg-type]
    with pytest.raises(PackedFileError, match="pass model="):
        load_packed(tmp_path / "a.safetensors")


def test_float64_networks_keep_their_type(tmp_path: Path) -> None:
    model, images = trained(Odd()).double(), torch.randn(4, 2, 7, 7, dtype=torch.float64)
    quantized = nearest(model, images)
    save_packed(quantized, tmp_path / "a.safetensors")
    loaded = load_packed(tmp_path / "a.safetensors", trained(Odd()).double())
    assert loaded(images).dtype == torch.float64 and torch.equal(loaded(images), quantized(images))
    with pytest.raises(PackedFileError, match=r"layer first is \[6, 2, 3, 3\] torch.float32 in the network"):
        load_packed(tmp_path / "a.safetensors", trained(Odd()))


@pytest.mark.parametrize("dequantize", ["once", "on-the-fly"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_loaded_network_goes_to_another_type_as_a_float_one_does(
    dequantize: str, dtype: torch.dtype, digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    quantized, images = digits
    save_packed(quantized, tmp_path / "a.safetensors", RECIPE)
    loaded = load_packed(tmp_path / "a.safetensors", dequantize=dequantize)
    plain = named("digits_resnet")[0]
    fold_batch_norms(plain, images)
    weights = {name: layer.weight for name, layer in quantized_layers(loaded).items()}
    plain.load_state_dict({**plain.state_dict(), **{f"{name}.weight": w for name, w in weights.items()}})
    biases = {name: tensor for name, tensor in loaded.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(biases, strict=False)
    assert torch.equal(plain(images), loaded(images))
    assert torch.equal(plain.to(dtype)(images.to(dtype)), loaded.to(dtype)(images.to(dtype)))
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.weight, weights[name].to(dtype)) and layer.weight.dtype == dtype
    with hardware_approximation(loaded, 2):
        assert loaded(images.to(dtype)).dtype == dtype
    assert torch.equal(plain(images.to(dtype)), loaded(images.to(dtype)))


@pytest.mark.parametrize("dequantize", [None, "once", "on-the-fly"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{"scale_search": "grid", "asymmetric": True}, {"scale_method": "linear_mse"}])
def test_a_quantized_network_comes_back_from_another_type_as_it_was(
    settings: dict[str, Any],
    dtype: torch.dtype,
    dequantize: str | None,
    digits: tuple[nn.Module, Tensor],
    tmp_path: Path,
) -> None:
    """Not its weights: levels of base sqrt 2 are none of a short type."""
    model, images = trained(Odd()), torch.randn(8, 2, 7, 7)
    quantized, _ = quantize_model(model, QuantConfig(n_bits=3, rounding="nearest", **settings), images, quiet=True)
    sizes = save_packed(quantized, tmp_path / "a.safetensors")
    if dequantize is not None:
        quantized = load_packed(tmp_path / "a.safetensors", trained(Odd()), dequantize=dequantize)
    weights = {name: layer.weight.clone() for name, layer in quantized_layers(quantized).items()}
    quantized.to(dtype)
    for name, layer in quantized_layers(quantized).items():
        assert torch.equal(layer.weight, weights[name].to(dtype)) and layer.weight.dtype == dtype
    with pytest.raises(ValueError, match=f"layer first: quantized as torch.float32, but moved to {dtype} since"):
        save_packed(quantized, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    quantized.float()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in quantized_layers(quantized).items())
    assert save_packed(quantized, tmp_path / "b.safetensors") == sizes
    load_packed(tmp_path / "b.safetensors", trained(Odd()))


def test_a_reloaded_network_holds_no_float_weight_and_on_the_fly_no_expanded_one(
    digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    quantized, _ = digits
    save_packed(quantized, tmp_path / "a.safetensors", RECIPE)
    held = {}
    for dequantize in ("once", "on-the-fly"):
        loaded = load_packed(tmp_path / "a.safetensors", dequantize=dequantize)
        layers = quantized_layers(loaded).values()
        assert all(layer.float_weight is None and layer.codes is None for layer in layers)
        tensors = [*loaded.parameters(), *loaded.buffers()]
        held[dequantize] = sum(t.numel() * t.element_size() for t in tensors)
    weights = sum(layer.shape.numel() for layer in quantized_layers(quantized).values())
    assert held["once"] - held["on-the-fly"] == 4 * weights
    assert held["on-the-fly"] < (tmp_path / "a.safetensors").stat().st_size


# ---------------------------------------------------------------- size


# What a run keeps beside the network, of the usual length.
OF_A_RUN = {
    "preprocessing": {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.48, 0.46, 0.41], "std": [0.2, 0.2, 0.3]},
    "class_names": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "source": {"checkpoint": "some.pth", "sha256": hashlib.sha256().hexdigest(), "data": "cifar10"},
    "accuracy": {stage: {"top1": 88.38, "top5": 99.5, "images": 10000} for stage in ("float", "searched", "rounded")},
    "versions": {"torch_version": "2.7.1", "timm_version": "1.0.15", "project_version": "0.1.0"},
    "run": {"network_options": "", "preset": "best", "calib_augment": "False", "calib_list": "0123456789abcdef"},
}


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_a_network_of_a_million_weights_is_codes_and_little_else(n_bits: int, tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 100}
    torch.manual_seed(0)
    model = logart_vit.models.build_network("timm:vit_tiny_patch16_224", shapes={}, model_kwargs=size).eval()
    quantized = nearest(model, torch.randn(2, 3, 32, 32), n_bits=n_bits, scale_method="log_sqrt2")
    path = tmp_path / "a.safetensors"
    table = save_packed(quantized, path, {**quantized.packed_info, **OF_A_RUN})  # type: ignore[dict-item]
    layers = quantized_layers(quantized).values()
    weights, channels = sum(layer.shape.numel() for layer in layers), sum(layer.shape[0] for layer in layers)
    rest = sum(p.numel() for name, p in model.named_parameters() if p.ndim < 2 or name in ("cls_token", "pos_embed"))
    assert weights > 1_000_000 and rest > 17_000
    assert n_bits / 8 * weights + 4 * rest < path.stat().st_size
    assert path.stat().st_size <= 1.02 * (n_bits / 8 * weights + 4 * rest + 4 * channels)
    assert sum(part[2] for part in table.parts) == path.stat().st_size
    assert f"{path.stat().st_size} B" in str(table).splitlines()[-1] and "quantized weights" in str(table)


# ---------------------------------------------------------------- what does not fit


def test_a_network_that_is_not_the_files_is_refused(digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_packed(digits[0], path)
    for change, said in {
        "less": "the network has no Conv2d blocks.4.conv1",
        "more": r"the file has nothing for extra.weight, the network \[2, 3\]",
        "other": r"layer conv1 is \[8, 2, 3, 3\]",
        "kind": "has no Linear linear",
        "unknown": "the network has no linear.bias",
    }.items():
        model = named("digits_resnet")[0]
        if change == "less":
            model.blocks = model.blocks[:4]  # type: ignore[index]
        elif change == "more":
            model.extra = nn.Linear(3, 2)
        elif change == "other":
            model.conv1 = nn.Conv2d(2, 8, 3)
        elif change == "kind":
            model.linear = nn.Conv2d(16, 10, 1)
        else:
            file = PackedFile.read(path)
            model.linear = nn.Identity()
            layers = {name: layer for name, layer in file.layers.items() if name != "linear"}
            path = tmp_path / "b.safetensors"
            PackedFile(layers, file.rest, {}).write(path)
        with pytest.raises(PackedFileError, match=said):
            load_packed(path, model)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"track": "rnn", "arch": "x", "model_kwargs": {}}, "no builder of track 'rnn': install"),
        ({"track": [], "arch": "x", "model_kwargs": {}}, r"no builder of track \[\]: install"),
        ([], "names no network; pass model="),
        ({"track": "cnn", "arch": "timm:resnet18", "model_kwargs": {"a": {"cache_dir": "x"}}}, "damaged description"),
        ({"track": "cnn", "arch": "timm:nothing", "model_kwargs": {}}, "cannot be built"),
        ({"track": "cnn", "arch": "digits_resnet", "model_kwargs": {}, "num_classes": 10**9}, "damaged description"),
        ({"track": "cnn", "arch": "digits_resnet", "model_kwargs": {}, "num_classes": 10**6}, "larger than the file"),
        ({"track": "cnn", "arch": "timm:resnet18", "model_kwargs": {"pretrained": True}}, "damaged description"),
        ({"track": "cnn", "arch": "timm:resnet18", "model_kwargs": {"checkpoint_path": "x"}}, "damaged description"),
        ({"track": "vit", "arch": "digits_vit", "model_kwargs": {"depth": 30000}}, "larger than the file"),
        ({"track": "vit", "arch": "digits_vit", "model_kwargs": {"embed_dim": 32000}}, "larger than the file"),
        ({"track": "vit", "arch": "hf-hub:timm/resnet18", "model_kwargs": {}}, "cannot be built"),
        ({"track": "cnn", "arch": "resnet18", "model_kwargs": {}}, "larger than the file|has no"),
    ],
)
def test_a_hostile_description_builds_nothing_large(
    recipe: dict[str, object], said: str, digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    save_packed(digits[0], tmp_path / "a.safetensors", {"network": recipe})
    start = time.process_time()
    with pytest.raises(PackedFileError, match=said) as error:
        load_packed(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 20


def test_what_cannot_be_saved_is_refused(digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    quantized, _ = digits
    with pytest.raises(ValueError, match="no quantized layer"):
        save_packed(nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="JSON"):
        save_packed(quantized, tmp_path / "a.safetensors", {"x": object()})
    with pytest.raises(ValueError, match="JSON"):
        save_packed(quantized, tmp_path / "a.safetensors", {"x": float("nan")})
    layer = nn.Sequential(quantized_twin(nn.Linear(2, 2), 4).module)
    with pytest.raises(ValueError, match="layer 0: the layer is not rounded"):
        save_packed(layer, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="dequantize must be"):
        load_packed(tmp_path / "a.safetensors", dequantize="never")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- all or nothing


def test_a_full_disk_leaves_the_old_file(digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; the command says so in a line and keeps the row."""
    path, results = tmp_path / "a.safetensors", tmp_path / "results.csv"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000));"
        "from logart_cnn.main import main;"
        f"sys.exit(main('--iters_w 0 --quiet --workers 0 --results {results} --save {path}'.split()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--save" in done.stderr and "Traceback" not in done.stderr
    assert path.read_bytes() == b"old" and len(results.read_text().splitlines()) == 2
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" not in p.name) == ["a.safetensors", "results.csv"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_the_old_or_the_new_file(digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files = [to_packed(digits[0], {"turn": turn, "padding": "x" * 2**18}) for turn in range(2)]
    contents = [file.to_bytes() for file in files]
    files[0].write(path)
    seen, partial = set(), 0
    for attempt in range(20):
        child = os.fork()
        if not child:
            while True:
                for file in files:
                    file.write(path)
        time.sleep(0.02 + 0.0037 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = path.read_bytes()
        assert found in contents
        seen.add(found)
        partial += len(list(tmp_path.iterdir())) > 1
        for leftover in tmp_path.glob(".*.partial"):
            leftover.unlink()
    assert len(seen) == 2 and partial  # it was killed while it wrote


@pytest.mark.parametrize("dequantize", ["once", "on-the-fly"])
@pytest.mark.parametrize("method", ["dynamic", "linear_mse"])
def test_a_loaded_network_is_approximated_like_the_one_that_was_saved(
    dequantize: str, method: str, tmp_path: Path
) -> None:
    model, images, info = named("digits_resnet")
    quantized = nearest(model, images, scale_method=method)
    save_packed(quantized, tmp_path / "a.safetensors", info)
    loaded = load_packed(tmp_path / "a.safetensors", dequantize=dequantize)
    exact = loaded(images)
    with hardware_approximation(quantized, 2), hardware_approximation(loaded, 2):
        approximated = loaded(images)
        assert torch.equal(approximated, quantized(images))
    assert torch.equal(approximated, exact) == (method == "linear_mse")
    assert torch.equal(loaded(images), exact) and torch.equal(quantized(images), exact)
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.codebook.levels, quantized_layers(quantized)[name].codebook.levels)


@pytest.mark.parametrize("bias", [None, torch.zeros(1), torch.zeros(10, dtype=torch.int64)], ids=str)
def test_a_bias_that_is_not_the_layers_is_refused(
    bias: Tensor | None, digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    file = to_packed(digits[0], RECIPE)
    rest = {**file.rest, "linear.bias": bias} if bias is not None else dict(file.rest)
    if bias is None:
        del rest["linear.bias"]
    PackedFile(file.layers, rest, file.info).write(tmp_path / "a.safetensors")
    with pytest.raises(PackedFileError, match="layer linear has (no|a) bias"):
        load_packed(tmp_path / "a.safetensors")


def test_names_that_are_no_utf8_and_long_paths_are_saved(digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("x" * 240 + ".safetensors")
    save_packed(digits[0], path, {**RECIPE, "class_names": ["caf\udce9", "ü"]})
    assert load_packed(path).packed_info["class_names"] == ["caf\udce9", "ü"]  # type: ignore[index]


def test_a_layer_that_cannot_be_approximated_leaves_the_others_as_they_were(
    digits: tuple[nn.Module, Tensor],
) -> None:
    model, images, _ = named("digits_resnet")
    quantized = nearest(model, images)
    expected = quantized(images)
    layer = quantized_layers(quantized)["linear"]
    layer.codes, kept = None, layer.codes
    with pytest.raises(AssertionError), hardware_approximation(quantized, 2):
        pass
    layer.codes = kept
    assert torch.equal(quantized(images), expected)
