"""One run around the core: which network is measured when, what the row says, whose mistake an error is."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import printed
from torch import Tensor, nn

import logart.runs.run
from logart.errors import NonFiniteError, UserError
from logart.networks.data import ImageSource, Preprocessing, open_images
from logart.networks.evaluate import Accuracy
from logart.networks.network import Network
from logart.quantization.config import QuantConfig
from logart.quantization.layer_report import LayerReport, Report
from logart.quantization.reconstruct import BlockReport
from logart.quantization.surgery import quantized_layers
from logart.runs.columns import NAMES, Facts, settings_row
from logart.runs.preflight import check_network
from logart.runs.run import RunOptions, layer_table, run

CPU = torch.device("cpu")
QUICK = QuantConfig(iters=20, calib_samples=4, batch_size=4, lr=0.1)
ROUNDED = replace(QUICK, iters=0)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(64, 4),
        )
        return nn.Sequential(*layers).eval()


@pytest.fixture
def source(image_folder: Path) -> ImageSource:
    return open_images(str(image_folder), Preprocessing((3, 8, 8), 1.0, "bilinear", (0.5,) * 3, (0.3,) * 3), 4)


def as_network(model: nn.Module) -> Network:
    """A network as `load_network` would give it."""
    return Network("small", model, Preprocessing((3, 8, 8), 1.0, "bilinear", (0.5,), (0.5,)), 4, "", "")


class Runs:
    """Runs the command's middle part into one results file."""

    def __init__(self, source: ImageSource, results: Path) -> None:
        self.source, self.results = source, results

    def __call__(
        self,
        config: QuantConfig = QUICK,
        *,
        model: nn.Module | None = None,
        ago: float = 0.0,
        names: Sequence[str] = (),
        **options: Any,
    ) -> Report:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        settings = RunOptions(CPU, str(self.results), **{"workers": 0} | options)
        row = settings_row(Facts(config, {"track": "cnn", "arch": "small"}, settings.test_with_terms))
        started = time.perf_counter() - ago
        arguments = (as_network(model or network()), self.source, images, config, settings, row, started)
        return run(*arguments, names=names)

    def rows(self) -> list[dict[str, str]]:
        if not self.results.exists():
            return []
        with self.results.open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def runs(source: ImageSource, tmp_path: Path) -> Runs:
    return Runs(source, tmp_path / "results.csv")


class Measured:
    """Stands in for `accuracy`: every measurement has figures of its own, and the weights it saw are kept."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.networks: list[nn.Module] = []

    def __call__(self, model: nn.Module, batches: Any, device: torch.device, progress: Any) -> Accuracy:
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.weights.append([layer.weight.detach().clone() for layer in layers])
        self.networks.append(model)
        figure = 10.0 * len(self.weights)
        return Accuracy(figure + 1 / 3, figure + 5, sum(len(labels) for _, labels in batches))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    stand_in = Measured()
    monkeypatch.setattr(logart.runs.run, "accuracy", stand_in)
    return stand_in


def accuracies(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if "Acc@" in name and value}


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def is_powers(weights: list[Tensor], factor: float) -> bool:
    """Whether every weight is ± a power of two, times `factor` or not, to float32's precision."""
    magnitudes = torch.cat([w.flatten() for w in weights]).abs().double()
    near = [magnitudes.log2() - shift for shift in (0.0, float(torch.tensor(factor).double().log2()))]
    return all(min(abs(float(x) - round(float(x))) for x in pair) < 1e-6 for pair in zip(*near, strict=True))


def test_every_stage_measures_its_own_network_into_its_own_columns(runs: Runs, measured: Measured) -> None:
    runs(test_before_calibration=True, test_with_terms=2)
    (row,) = runs.rows()
    assert accuracies(row) == {
        "float_Acc@1": "10.333", "float_Acc@5": "15.0",
        "search_Acc@1": "20.333", "search_Acc@5": "25.0",
        "Acc@1": "30.333", "Acc@5": "35.0",
        "approx_Acc@1": "40.333", "approx_Acc@5": "45.0",
    }  # fmt: skip
    assert row["val_images"] == "8"
    plain, searched, learned, approximated = measured.weights
    assert same(plain[1:], [w.weight for w in (network()[3], network()[5])])  # nothing to fold after these two
    assert not quantized_layers(measured.networks[0])
    assert is_powers(searched, 2**0.5) and is_powers(learned, 2**0.5) and not same(searched, learned)
    assert is_powers(approximated, 1.5) and not is_powers(learned, 1.5) and not is_powers(approximated, 2**0.5)


def test_the_network_searched_is_measured_only_on_request(runs: Runs, measured: Measured) -> None:
    runs()
    (row,) = runs.rows()
    assert accuracies(row) == {
        "float_Acc@1": "10.333", "float_Acc@5": "15.0", "Acc@1": "20.333", "Acc@5": "25.0",
    }  # fmt: skip
    assert len(measured.weights) == 2


def test_without_learning_the_searched_network_is_the_final_one(
    runs: Runs, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(ROUNDED)
    runs(replace(ROUNDED, scale_method="log_2"))
    for row, figure in zip(runs.rows(), (20, 40), strict=True):
        assert row["Acc@1"] == row["search_Acc@1"] == f"{figure}.333"
        assert row["Acc@5"] == row["search_Acc@5"] == f"{figure + 5}.0"
        assert row["reconstruction_seconds"] == "0.0"
    out = capsys.readouterr().out
    assert "after DBS" in out and "after rounding" in out  # base 2 searches nothing


@pytest.mark.parametrize(("terms", "factor"), [(2, 1.5), (3, 1.4375), (4, 1.421875)])
def test_as_many_terms_as_asked_for_stand_for_root_two_at_test(
    terms: int, factor: float, runs: Runs, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(ROUNDED, test_with_terms=terms)
    assert is_powers(measured.weights[-1], factor) and not is_powers(measured.weights[1], factor)
    assert is_powers(measured.weights[1], 2**0.5)
    text = "with √2 ≈ 1 + 1/2" + " - 1/16" * (terms > 2) + " - 1/64" * (terms > 3) + " at test"
    assert text in capsys.readouterr().out
    assert runs.rows()[0]["hardware_approx_terms"] == str(terms)
    assert runs.rows()[0]["hardware_approx"] == "False"  # calibrated without


@pytest.mark.parametrize(("rounding", "title"), [("compensated", "after compensated rounding"), ("both", "after LLR")])
def test_compensated_rounding_has_nothing_between_float_and_final(
    rounding: str, title: str, runs: Runs, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its search is part of it; even where one asks, there is no network searched to measure."""
    report = runs(replace(QUICK, rounding=rounding), test_before_calibration=True)
    (row,) = runs.rows()
    assert accuracies(row) == {
        "float_Acc@1": "10.333", "float_Acc@5": "15.0", "Acc@1": "20.333", "Acc@5": "25.0",
    }  # fmt: skip
    assert row["rounding"] == rounding and float(row["search_seconds"]) == 0
    assert float(row["reconstruction_seconds"]) == round(report.reconstruction_seconds, 3) > 0
    out = printed(capsys)
    assert [line.split(" Acc")[0].rstrip() for line in out[:2]] == ["float", title]
    assert out[-1].startswith({"compensated": "compensate ", "both": "LLR "}[rounding])


def test_the_approximation_is_gone_after_the_test(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[nn.Module] = []
    original = logart.runs.run.quantize_model

    def keeping(*args: Any, **kwargs: Any) -> tuple[nn.Module, Report]:
        model, report = original(*args, **kwargs)
        kept.append(model)
        return model, report

    monkeypatch.setattr(logart.runs.run, "quantize_model", keeping)
    runs(test_with_terms=3)
    runs()
    first, second = ([layer.weight for layer in quantized_layers(model).values()] for model in kept)
    assert same(first, second)


def test_times_memory_and_surroundings(runs: Runs) -> None:
    report = runs(ago=1000.0)
    (row,) = runs.rows()
    assert float(row["search_seconds"]) == round(report.search_seconds, 3)
    assert float(row["reconstruction_seconds"]) == round(report.reconstruction_seconds, 3) > 0
    assert 1000 < float(row["total_seconds"]) < 1100  # from when the command began, not from here
    assert 50 < int(row["peak_memory_mb"]) < 10**6
    assert (row["device"], row["torch_version"], row["track"]) == ("cpu", version("torch"), "cnn")
    assert set(row) == set(NAMES) and row["arch"] == "small"


def test_what_is_printed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs(test_before_calibration=True)
    out = printed(capsys)
    (row,) = runs.rows()
    for line, (title, prefix) in zip(
        out, (("float", "float_"), ("after DBS", "search_"), ("after LLR", "")), strict=False
    ):
        top1, top5 = (float(row[f"{prefix}Acc@{k}"]) for k in (1, 5))
        assert line == f"{title:<28} Acc@1 {top1:6.2f} %  Acc@5 {top5:6.2f} %"
    assert out[3] == "100.00 % of the weights are quantized"
    assert out[4].startswith("layer ") and [line.split()[0] for line in out[5:8]] == ["0", "3", "5"]
    assert out[-1].startswith("DBS ") and out[-1].endswith(f"row appended to {runs.results}")


def test_quiet_prints_only_the_accuracies_and_the_share(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs(quiet=True)
    out, err = capsys.readouterr()
    assert err == "" and [line.split()[0] for line in out.splitlines()] == ["float", "after", "100.00"]
    assert len(runs.rows()) == 1


def test_options_reach_the_loader(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    original = logart.runs.run.validation_batches

    def watched(source: ImageSource, batch_size: int, workers: int) -> Any:
        asked.append((batch_size, workers))
        return original(source, batch_size, 0)

    monkeypatch.setattr(logart.runs.run, "validation_batches", watched)
    runs(ROUNDED, val_batch_size=3, workers=5)
    assert asked == [(3, 5), (3, 5)]


# Whose mistake it was


class FailsLate(nn.Module):
    """A network that is not finite for four images at once."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x * torch.nan if len(x) == 4 else x)  # type: ignore[no-any-return]


def with_nan(model: nn.Sequential) -> nn.Sequential:
    assert isinstance(model[3], nn.Conv2d)
    model[3].weight.data[0, 0, 0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.AvgPool2d(4), nn.Flatten()).eval(),
            "Sequential has no layer that can be quantized",
        ),
        (with_nan(network()), "layer 3: its weight holds NaN"),
    ],
)
def test_a_network_that_cannot_be_quantized_is_one_line(
    runs: Runs, model: nn.Module, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"^--arch, --checkpoint: {message}") as caught:
        runs(model=model)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == "" and runs.rows() == []


def test_activations_that_are_not_finite_are_one_line(runs: Runs, source: ImageSource) -> None:
    images, options = (
        torch.randn(4, 3, 8, 8),
        RunOptions(CPU, str(runs.results), workers=0, network_flags="--model"),
    )
    with pytest.raises(UserError, match="^--model: block head: the activations of calibration image") as caught:
        run(as_network(FailsLate().eval()), source, images, QUICK, options, {}, 0.0)
    assert "\n" not in str(caught.value) and runs.rows() == []


def test_a_library_s_value_error_is_ours_and_passes(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logart.runs.run, "quantize_model", lambda *_, **__: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        runs()
    assert runs.rows() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError("--data_path: cannot read it")])
def test_other_errors_pass_as_they_are(runs: Runs, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Accuracy:
        raise error

    monkeypatch.setattr(logart.runs.run, "accuracy", fail)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind) as caught:
        runs()
    assert kind is not UserError or caught.value is error
    assert runs.rows() == []


def test_an_image_that_gives_nan_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NonFiniteError("block a: the activations of calibration image 1 are not finite", 1)

    monkeypatch.setattr(logart.runs.run, "quantize_model", fail)
    with pytest.raises(UserError, match=r"^--arch, --checkpoint: block a: .* not finite \(train/b\.png\)$"):
        runs(names=["train/a.png", "train/b.png"])


# The float network against its images


def fails(message: str, model: nn.Module | Callable[[Tensor], Any], classes: int = 4, size: int = 8) -> None:
    with pytest.raises(UserError, match=f"^--arch, --checkpoint: {message}") as caught:
        check_network(model, torch.ones(3, 3, size, size), classes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_network_that_fits_its_images_passes_and_leaves_them() -> None:
    images = torch.ones(3, 3, 8, 8)

    def in_place(x: Tensor) -> Tensor:
        assert len(x) == 2 and not torch.is_grad_enabled()
        return x.mul_(2).mean((2, 3))

    check_network(in_place, images, 3)  # type: ignore[arg-type]
    assert torch.equal(images, torch.ones(3, 3, 8, 8))
    check_network(network(), images, 4, flags="--model")
    with pytest.raises(UserError, match="^--model: "):
        check_network(network(), images, 5, flags="--model")


def test_a_network_that_does_not_fit_its_images_is_one_line() -> None:
    fails(r"the network cannot run on images of 3×2×2 \(.*\); see --input_size", network(), size=2)
    fails(r"expected logits \[2, 5\] for 2 images, got \[2, 4\]", network(), classes=5)
    fails(r"expected logits \[2, 4\] for 2 images, got list", lambda x: [x])
    fails(r"expected logits \[2, 4\] for 2 images, got \[2, 3, 8, 8\]", nn.Identity())
    fails("the float network's logits are not all finite", with_nan(network()))
    fails(r"the network cannot run on .* \(AssertionError\)", asserts)


def asserts(x: Tensor) -> None:
    raise AssertionError


def test_a_mistake_in_a_network_s_code_keeps_its_traceback() -> None:
    with pytest.raises(TypeError):
        check_network(lambda x: x + None, torch.ones(2, 3, 8, 8), 4)  # type: ignore[arg-type, return-value, operator]


# The table


def test_the_table_has_a_line_for_everything_in_the_report() -> None:
    report = Report(
        layers=[
            LayerReport("stem", (8, 3, 3, 3), 8, "stem", {0: 3, 5: 5}, 0.01234, 0.02, 54),
            LayerReport("layer1.conv", (2, 4), 4, "layer1", {}, 0.5, 0.25, 0),
        ],
        skipped=[("attention", "no such type")],
        blocks=[
            BlockReport("stem", 0.1, 0.2, "before", ()),
            BlockReport("layer1", 0.2, 0.1, "learned", ()),
        ],
    )
    head, stem, conv, *rest = layer_table(report).splitlines()
    assert head.split()[:3] == ["layer", "shape", "bits"]
    assert stem.split() == ["stem", "8×3×3×3", "8", "0.01234", "0.02000", "25.0%", "0:3", "5:5"]
    assert conv.split() == ["layer1.conv", "2×4", "4", "0.50000", "0.25000", "0.0%"]
    assert head.index("shape") == stem.index("8×3×3×3") == conv.index("2×4")
    report.layers = [replace(report.layers[1], name="0")]
    head, short = layer_table(report).splitlines()[:2]
    assert head.index("shape") == short.index("2×4")
    assert rest == ["skipped attention: no such type", "block stem: LLR reverted: no improvement"]
