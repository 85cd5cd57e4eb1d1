"""quantize_model: the whole way on a small network; what it returns and reports, and that every setting acts."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from codebooks import n_base2
from networks import fingerprint, small_resnet, small_vit, smooth_images
from torch import Tensor, nn

from logart import QuantConfig, Report, quantize_model
from logart.grids import logarithmic
from logart.grids.grid import ScaleSearch
from logart.grids.registry import GRIDS
from logart.grids.rounding import nearest
from logart.quantization import compensate
from logart.quantization.activation_quantizer import quantizers
from logart.quantization.surgery import quantized_layers

BASE: dict[str, Any] = {
    "n_bits": 3,
    "iters": 25,
    "calib_samples": 16,
    "search_samples": 8,
    "batch_size": 8,
    "lr": 0.05,
    "rrweight": 0.5,
}


def run(seed: int = 0, **settings: Any) -> tuple[nn.Module, Report]:
    model, images = small_resnet(seed)
    return quantize_model(model, QuantConfig(**{**BASE, **settings}), images, block_types=["ResidualBlock"])


@pytest.mark.parametrize("search_method", ["tensor_wise", "layer_wise", "block_wise"])
def test_the_report_agrees_with_the_network(search_method: str) -> None:
    seen: dict[str, nn.Module] = {}
    model, images = small_resnet()
    quantized, report = quantize_model(
        model,
        QuantConfig(**BASE, search_method=search_method),  # type: ignore[arg-type]
        images,
        block_types=["ResidualBlock"],
        on_stage_end=lambda stage, network: seen.update({stage: network}),
    )
    layers = quantized_layers(quantized)
    assert [layer.name for layer in report.layers] == ["stem", *LAYERS_OF_BLOCKS, "head"] and len(layers) == 7
    assert [layer.block for layer in report.layers] == ["stem", *["blocks.0"] * 2, *["blocks.1"] * 3, "head"]
    assert report.folded == ["bn", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]
    assert report.skipped == []
    assert [block.name for block in report.blocks] == ["stem", "blocks.0", "blocks.1", "head"]
    errors = block_errors(seen["float"], quantized, images[: BASE["calib_samples"]])
    for block, error in zip(report.blocks, errors, strict=True):
        found = {"before": block.error_before, "learned": block.error_learned}
        assert error == pytest.approx(found[block.kept], rel=1e-5) and error <= min(found.values()) * (1 + 1e-5)
    for entry in report.layers:
        layer, w = layers[entry.name], seen["float"].get_submodule(entry.name).weight
        assert isinstance(w, Tensor) and layer.codes is not None
        w = w.detach()
        assert entry.shape == tuple(w.shape) and entry.n_bits == layer.n_bits == 3
        assert entry.base_mix == Counter(n_base2(layer.codebook).tolist())
        assert sum(entry.base_mix.values()) == len(w)
        plain = nearest(w.flatten(1), layer.codebook)
        assert entry.n_changed_codes == int((layer.codes.flatten(1) != plain).sum())
        q = layer.codebook.levels.gather(1, plain.long())
        energy = w.double().square().sum()
        error_nearest = float((q - w.flatten(1)).square().sum() / energy)
        assert entry.error_nearest == pytest.approx(error_nearest, rel=1e-6)
        assert entry.error == pytest.approx(float((layer.weight - w).double().square().sum() / energy), rel=1e-6)
        assert entry.error >= entry.error_nearest * (1 - 1e-6)
    assert sum(entry.n_changed_codes for entry in report.layers) > 10


BLOCKS = ["stem", "blocks.0", "blocks.1", "head"]


def block_errors(reference: nn.Module, quantized: nn.Module, images: Tensor) -> list[float]:
    """What LLR minimises in each block: its squared error behind the quantized prefix, summed over channels, meant over
    the rest.
    """
    seen: dict[tuple[str, str], Tensor] = {}
    for kind, network in (("float", reference), ("quantized", quantized)):
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda module, args, output, key=(kind, name): seen.update({key: output.detach().clone()})
            )
            for name in BLOCKS
        ]
        network(images)
        for handle in handles:
            handle.remove()
    return [float((seen["quantized", name] - seen["float", name]).double().square().sum(1).mean()) for name in BLOCKS]


LAYERS_OF_BLOCKS = [f"blocks.{name}" for name in ("0.conv1", "0.conv2", "1.conv1", "1.conv2", "1.down")]


def test_stages_are_observed_in_order_and_the_last_is_returned() -> None:
    model, images = small_resnet()
    seen: list[tuple[str, Tensor]] = []
    quantized, _ = quantize_model(
        model,
        QuantConfig(**BASE),
        images,
        block_types=["ResidualBlock"],
        on_stage_end=lambda stage, network: seen.append((stage, network(images).detach())),
    )
    assert [stage for stage, _ in seen] == ["float", "searched", "rounded"]
    logits = model(images).detach()
    errors = [float((output - logits).square().mean()) for _, output in seen]
    assert errors[0] < 1e-9 < errors[2] < 0.5 * errors[1]
    assert torch.equal(quantized(images), seen[2][1])
    assert not quantized.training


def test_without_iterations_rounding_is_to_nearest() -> None:
    quantized, report = run(iters=0)
    assert report.blocks == [] and set(report.seconds) == {"searched"}
    assert all(
        layer.n_changed_codes == 0 and layer.error == pytest.approx(layer.error_nearest) for layer in report.layers
    )
    for layer in quantized_layers(quantized).values():
        assert layer.codes is not None
        assert torch.equal(layer.codes.reshape(layer.n_codebooks, -1), nearest(layer.rows, layer.codebook))


def test_the_result_is_deterministic() -> None:
    assert fingerprint(run()[0]) == fingerprint(run()[0])


CHANGES: list[dict[str, Any]] = [
    {"n_bits": 4},
    {"first_last_bits": 8},
    {"channel_wise": False},
    {"scale_method": "log_2"},
    {"scale_method": "log_sqrt2"},
    {"scale_method": "linear_minmax"},
    {"scale_method": "linear_mse"},
    {"search_method": "layer_wise"},
    {"search_method": "block_wise"},
    {"calib_samples": 12},
    {"batch_size": 4},
    {"iters": 0},
    {"iters": 24},
    {"rrweight": 0.05},
    {"lr": 0.02},
    {"b_start": 10.0},
    {"b_end": 6.0},
    {"warmup": 0.5},
    {"recon_input": "float"},
    {"recon_input": "mixed"},
    {"recon_input": "mixed", "drop_prob": 0.8},
    {"recon_metric": "mae"},
    {"recon_metric": "hessian_perturb"},
    {"recon_metric": "hessian_perturb", "temperature": 1.0},
    {"head_kl": True, "lr": 0.1},
    {"lr": 0.1},
    {"hardware_terms": 2},
    {"hardware_terms": 3},
    {"hardware_terms": 4},
    {"scale_search": "grid"},
    {"scale_search": "half_step"},
    {"asymmetric": True},
    {"zero_code": True},
    {"asymmetric": True, "zero_code": True},
    {"rounding": "compensated"},
    {"rounding": "compensated", "scale_search": "grid"},
    {"rounding": "compensated", "asymmetric": True},
    {"rounding": "compensated", "zero_code": True},
    {"rounding": "compensated", "wide_gap": True},
    {"rounding": "compensated", "calib_samples": 5, "crops": 1},
    {"rounding": "compensated", "calib_samples": 12},
    {"seed": 1},
    {"layer_bits": {"stem": 5}},
    {"skip": ["head"]},
    {"bits_budget": 3.5},
    {"size_budget": 1100},
    {"rounding": "compensated", "damping": 0.3},
    {"rounding": "compensated", "mirror": True},
    {"n_bits_a": 4},
    {"n_bits_a": 5},
    {"n_bits_a": 4, "input_bits_a": 8},
    {"n_bits_a": 4, "head_bits_a": 8},
    {"n_bits_a": 4, "act_scale": "pow2"},
    {"n_bits_a": 4, "calibrate_with_act": True},
    {"n_bits_a": 4, "iters_a": 10},
    {"n_bits_a": 4, "iters_a": 10, "calibrate_with_act": True},
    *({"n_bits_a": 4, "softmax_grid": grid} for grid in ("uniform", "log_2", "log_sqrt2")),
]


def result(**settings: Any) -> str:
    """Codes and levels of every weight, and the levels of every activation; of a transformer to see softmax."""
    model, images = small_vit(n_images=16) if "softmax_grid" in settings else small_resnet()
    config = QuantConfig(**{**BASE, **settings})
    quantized, _ = quantize_model(model, config, images, block_types=["ResidualBlock", "Block"])
    levels = {
        name: {own: tensor.tolist() for own, tensor in quantizer.tensors().items()}
        for name, quantizer in quantizers(quantized).items()
    }
    return str((fingerprint(quantized), levels))


def test_every_field_changes_the_result() -> None:
    settings = [{}, *CHANGES, {**LW}, {**LW, "search_samples": 4}, {**BW}, {**BW, "seed": 5}]
    settings += [{**BW, "search_batch_size": 3}]
    found = [result(**change) for change in settings]
    same = [(a, b) for i, a in enumerate(settings) for j, b in enumerate(settings) if i < j and found[i] == found[j]]
    assert same == []
    named = {name for change in settings for name in change}
    assert named == set(QuantConfig.__dataclass_fields__)


LW, BW = {"search_method": "layer_wise", "iters": 0}, {"search_method": "block_wise", "iters": 0, "n_bits": 5}


def test_nearest_is_no_steps() -> None:
    assert fingerprint(run(rounding="nearest")[0]) == fingerprint(run(iters=0)[0])
    assert fingerprint(run(rounding="both", iters=0)[0]) == fingerprint(run(rounding="compensated")[0])


def test_first_and_last_layer_follow_the_order_they_run() -> None:
    quantized, report = run(first_last_bits=6, iters=0)
    bits = {layer.name: layer.n_bits for layer in report.layers}
    assert bits == {**dict.fromkeys(bits, 3), "stem": 6, "head": 6}
    assert {name: layer.codebook.levels.shape[1] for name, layer in quantized_layers(quantized).items()} == {
        name: 2**n for name, n in bits.items()
    }


@pytest.mark.parametrize("search_method", ["tensor_wise", "layer_wise", "block_wise"])
def test_one_codebook_per_layer(search_method: str) -> None:
    quantized, report = run(channel_wise=False, search_method=search_method)
    for name, layer in quantized_layers(quantized).items():
        assert layer.n_codebooks == 1
        assert len(layer.weight.unique()) <= 2**3, name
    assert all(sum(layer.base_mix.values()) == 1 for layer in report.layers)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("method", list(GRIDS))
def test_no_channel_ever_has_more_values_than_its_bits_can_name(method: str, n_bits: int) -> None:
    """With many weights a channel, zeros and tiny ones among them, after learning, for every approximation of √2."""
    torch.manual_seed(n_bits)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3 * 16, 300), nn.ReLU(), nn.Linear(300, 3))
    for layer in (model[0], model[2], model[4]):
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.flatten(1)[:, ::7] *= 1e-6  # type: ignore[operator]
            layer.weight[1] = 0  # type: ignore[index]
            layer.weight.flatten(1)[0, :2] = torch.tensor([0.0, -0.0])  # type: ignore[operator]
    images = torch.randn(4, 3, 6, 6)
    for terms in (0, 2, 3, 4) if method in ("dynamic", "log_sqrt2") else (0,):
        config = QuantConfig(
            n_bits, scale_method=method, hardware_terms=terms, iters=2, calib_samples=4, batch_size=4, lr=0.5
        )
        quantized, _ = quantize_model(model, config, images)
        for name, layer in quantized_layers(quantized).items():
            most = max(len(channel.unique()) for channel in layer.weight)
            assert most <= 2**n_bits, (name, terms)
            assert layer.levels is not None and layer.levels.shape[1] == 2**n_bits
            if name == "4":
                assert most >= min(2 ** (n_bits - 1), 20)  # there were weights for many levels
            assert bool((layer.weight[1] == 0).all())


class TinyModel(nn.Sequential):
    """One layer whose channels lean to either sign, have one sign only, or are all zero."""

    def __init__(self, n_bits: int) -> None:
        torch.manual_seed(n_bits)
        layer = nn.Linear(min(2**n_bits + 8, 40), 5)
        with torch.no_grad():
            layer.weight.normal_().mul_(torch.randn_like(layer.weight).exp())
            layer.weight[0].clamp_(max=0.1)
            layer.weight[1].clamp_(min=-0.01)
            layer.weight[2].abs_()
            layer.weight[3] = 0
            layer.weight[4, :2] = torch.tensor([0.0, -0.0])
        super().__init__(nn.Flatten(), layer)
        self.images = torch.randn(4, 1, 1, layer.in_features)


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_no_option_spends_more_codes_than_there_are(n_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of them; with a few of the mixes, for which one wins does not matter here."""
    original, few = logarithmic.log_candidates, (0, 2 ** (n_bits - 2), 2 ** (n_bits - 1))

    def some(absmax: Tensor, n_bits: int, n_base2: Sequence[int] | None = None, **options: Any) -> Any:
        return original(absmax, n_bits, few if n_base2 is None else n_base2, **options)

    monkeypatch.setattr(logarithmic, "log_candidates", some)
    monkeypatch.setattr(logarithmic, "SCALES", (0.4375, 1.0))
    monkeypatch.setattr(logarithmic, "HALF_STEPS", (-3, 0))
    model, learning = TinyModel(n_bits), {"iters": 1, "calib_samples": 4, "batch_size": 4, "lr": 0.5}
    used: Counter[int] = Counter()
    for scale_search, asymmetric, zero_code, terms in itertools.product(
        ScaleSearch, (False, True), (False, True), (0, 2, 3, 4)
    ):
        options = {"scale_search": scale_search, "asymmetric": asymmetric, "zero_code": zero_code}
        for rounding in ("nearest", "both"):  # which runs the other two
            config = QuantConfig(n_bits, hardware_terms=terms, rounding=rounding, **options, **learning)  # type: ignore[arg-type]
            quantized, _ = quantize_model(model, config, model.images)
            (layer,) = quantized_layers(quantized).values()
            assert layer.codes is not None and layer.levels is not None
            assert layer.levels.shape[1] == 2**n_bits, (options, terms)
            assert torch.equal(layer.weight, layer.levels.gather(1, layer.codes.long()).float())
            values = [len(channel.unique()) for channel in layer.weight]
            assert max(values) <= 2**n_bits and bool((layer.weight[3] == 0).all()), (options, terms, rounding)
            used.update(values)
            assert bool((layer.levels[4] == 0).any()) or not zero_code
    assert max(used) > min(2 ** (n_bits - 1), 20)  # there were weights for many levels


# ---------------------------------------------------------------- compensated rounding


def output_error(quantized: nn.Module, model: nn.Module, images: Tensor) -> float:
    return float((quantized(images) - model(images)).detach().square().mean())


@pytest.mark.parametrize("block_types", [["ResidualBlock"], []])
@pytest.mark.parametrize("n_bits", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_compensated_rounding_beats_nearest_at_the_output(block_types: list[str], n_bits: int, seed: int) -> None:
    """Block by block or layer by layer; and on images it has not seen."""
    model, images = small_resnet(seed, n_images=48)
    seen, fresh = images[:32], images[32:]
    errors: dict[str, list[float]] = {}
    for rounding in ("nearest", "compensated"):
        config = QuantConfig(**BASE | {"n_bits": n_bits, "rounding": rounding, "calib_samples": 32})
        quantized, _ = quantize_model(model, config, seen, block_types=block_types)
        errors[rounding] = [output_error(quantized, model, part) for part in (seen, fresh)]
    assert errors["compensated"][0] < 0.6 * errors["nearest"][0]
    assert errors["compensated"][1] < 0.9 * errors["nearest"][1]


def test_the_bias_takes_up_the_mean() -> None:
    """So that the mean output of each channel is the float one's."""
    model, images = small_resnet()
    quantized, _ = quantize_model(model, QuantConfig(**BASE | {"rounding": "compensated"}), images)
    down, head = quantized.get_submodule("blocks.1.down"), quantized.get_submodule("head")
    assert not torch.equal(head.bias, model.head.bias)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(down.bias, model.blocks[1].down.bias)  # type: ignore[arg-type, index, union-attr]
    assert torch.allclose(quantized(images).mean(0), model(images).mean(0), atol=1e-5)
    plain, _ = quantize_model(model, QuantConfig(**BASE | {"rounding": "nearest"}), images)
    assert not torch.allclose(plain(images).mean(0), model(images).mean(0), atol=1e-2)


def test_a_layer_without_a_bias_gets_one_and_the_users_stays_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=False))
    images = smooth_images(32, 3, 6).float() + 0.5
    config = QuantConfig(2, rounding="compensated", calib_samples=32)  # type: ignore[arg-type]
    quantized, _ = quantize_model(model, config, images)
    for name in ("0", "3"):
        bias = quantized.get_submodule(name).bias
        assert isinstance(bias, nn.Parameter) and bias.dtype is torch.float32 and bool((bias != 0).all())
        assert model.get_submodule(name).bias is None
        assert name + ".bias" in quantized.state_dict()
    assert torch.allclose(quantized(images).mean(0), model(images).mean(0), atol=1e-5)
    nearest_too, _ = quantize_model(model, QuantConfig(2, rounding="nearest"), images)  # type: ignore[arg-type]
    assert nearest_too.get_submodule("0").bias is None
    assert output_error(quantized, model, images) < 0.6 * output_error(nearest_too, model, images)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("rounding", ["compensated", "both"])
def test_grouped_and_depthwise_convolutions_are_compensated(groups: int, rounding: str) -> None:
    torch.manual_seed(groups)
    middle = nn.Conv2d(6, 12, 3, 2, padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), middle, nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    images = smooth_images(48, 3, 6, 3).float()
    errors = []
    for how in ("nearest", rounding):
        config = QuantConfig(2, rounding=how, calib_samples=48, iters=10, batch_size=16, lr=0.05)  # type: ignore[arg-type]
        quantized, report = quantize_model(model, config, images)
        assert report.layers[1].shape == (12, 6 // groups, 3, 3)
        errors.append(output_error(quantized, model, images))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("per_layer", [False, True])
def test_dead_inputs_do_no_harm(per_layer: bool) -> None:
    """Inputs that are always zero, in a layer and in the one behind; and a layer that sees nothing else."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(36, 5))
    with torch.no_grad():
        first.bias[:3] = -100.0  # dead behind the ReLU
    images = smooth_images(32, 3, 6).float()
    images[:, 1] = 0
    errors = []
    for rounding in ("nearest", "compensated"):
        config = QuantConfig(2, rounding=rounding, calib_samples=32, channel_wise=not per_layer)  # type: ignore[arg-type]
        quantized, _ = quantize_model(model, config, images)
        assert all(bool(layer.weight.isfinite().all()) for layer in quantized_layers(quantized).values())
        errors.append(output_error(quantized, model, images))
    assert errors[1] < 0.6 * errors[0]
    with torch.no_grad():
        first.bias[:] = -100.0
    quantized, _ = quantize_model(model, config, images)
    assert torch.allclose(quantized(images), model(images), atol=1e-5)  # there is only the bias behind it


def test_equal_runs_of_compensated_rounding_give_equal_codes_and_biases() -> None:
    (model, images), states = small_resnet(), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # the global generator is not to matter, nor the setting
        config = QuantConfig(**BASE | {"rounding": "compensated", "seed": seed})
        quantized, report = quantize_model(model, config, images, block_types=["ResidualBlock"])
        states.append((fingerprint(quantized), quantized.state_dict()))
        assert report.blocks == [] and set(report.seconds) == {"rounded"}
    for codes, state in states[1:]:
        assert codes == states[0][0]
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        assert all(torch.equal(tensor, states[0][1][name]) for name, tensor in tensors.items())


def test_both_keeps_what_has_the_lower_block_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning that goes wrong leaves the closed form as it was, bit for bit; where that is poor, learning stays."""
    count = BASE["calib_samples"]
    held_out = slice(count * 7 // 8, count)
    compensated = run(rounding="compensated", calib_samples=held_out.start)[0]
    undone, report = run(rounding="both", lr=100.0, rrweight=1e6, iters=3)
    assert [block.kept for block in report.blocks] == ["before"] * 4
    assert all(block.error_learned > block.error_before > 0 for block in report.blocks)
    assert fingerprint(undone) == fingerprint(compensated)
    kept = compensated.state_dict()
    tensors = {name: value for name, value in undone.state_dict().items() if isinstance(value, Tensor)}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
    monkeypatch.setattr(compensate, "round_compensated", lambda t, a, codebook, factor: nearest(t, codebook))
    model, images = small_resnet()
    float_network: list[nn.Module] = []
    quantize_model(
        model, QuantConfig(rounding="nearest"), images, on_stage_end=lambda _, network: float_network.append(network)
    )
    errors = block_errors(float_network[0], undone, images[held_out])
    assert errors == pytest.approx([block.error_before for block in report.blocks], rel=1e-4)
    seen: dict[str, nn.Module] = {}
    config = QuantConfig(**BASE | {"rounding": "both", "iters": 200})
    learned, report = quantize_model(
        model, config, images, block_types=["ResidualBlock"], on_stage_end=lambda stage, n: seen.update({stage: n})
    )
    assert [block.kept for block in report.blocks[:3]] == ["learned"] * 3
    errors = block_errors(seen["float"], learned, images[held_out])
    for block, error in zip(report.blocks, errors, strict=True):
        assert error == pytest.approx(min(block.error_before, block.error_learned), rel=1e-4)
    assert all(block.error_learned < block.error_before for block in report.blocks[:3])


def test_both_starts_from_the_closed_form_and_not_from_nearest() -> None:
    before = {how: run(rounding=how)[1].blocks[0].error_before for how in ("learned", "both")}
    assert before["both"] < 0.8 * before["learned"]


@pytest.mark.parametrize("rounding", ["compensated", "both"])
def test_stages_observed_where_rounding_is_compensated(rounding: str) -> None:
    model, images = small_resnet()
    stages: list[str] = []
    config = QuantConfig(**BASE | {"rounding": rounding})
    quantize_model(model, config, images, on_stage_end=lambda stage, network: stages.append(stage))
    assert stages == ["float", "rounded"]


@pytest.mark.parametrize("method", list(GRIDS))
def test_any_grid_can_be_compensated(method: str) -> None:
    settings = {"scale_method": method, "first_last_bits": 4}
    errors = [output_error(run(rounding=how, **settings)[0], *small_resnet()) for how in ("nearest", "compensated")]
    assert errors[1] < 0.6 * errors[0]
