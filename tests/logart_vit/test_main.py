"""The command line: spellings, defaults, configs, and runs from flags to a results row."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_runs import SURROUNDINGS, SWIN, SWIN_KWARGS, Outcome, VitFiles, kept_results, printed
from timm.models import VisionTransformer
from torch import Tensor, nn

import logart.quantization.block_loss
import logart.quantization.rounding_methods
import logart.runs.job
import logart.runs.run
import logart_vit.command
from logart.cli import key_values
from logart.grids.activations import ActScale, SoftmaxGrid
from logart.grids.grid import ScaleSearch
from logart.grids.losses import absolute_error, kl_divergence, squared_error
from logart.networks.weights import file_sha256
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric, SearchMethod
from logart.quantization.layers import LAYER_TYPES
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.rounding_methods import METHODS
from logart.quantization.surgery import quantized_layers
from logart.runs.columns import SETTINGS
from logart.runs.run import RunOptions
from logart_vit.command import build_parser, build_settings, main
from logart_vit.models import Plan, load_network, plan_network

ROOT = Path(__file__).parents[2]
PAPER = (
    "--dataset DATA --model vit_base --config ./configs/4bit/best.py --iters_w 20000 --scale-method dynamic "
    "--rrweight 10000 --hardware_approx --optimize"
).split()
BEST = QuantConfig(
    search_samples=128, recon_input=ReconInput.MIXED, recon_metric=ReconMetric.HESSIAN_PERTURB, head_kl=True, iters=300,
    lr=0.1,
)  # fmt: skip
NEAREST = replace(BEST, rounding="nearest")


def settings(*argv: str) -> tuple[QuantConfig, dict[str, Any]]:
    return build_settings(build_parser().parse_args(argv))


ISSUE_FLAGS = """dataset model checkpoint config optimize iters_w lr rrweight scale_method search_method w_bit
    calib-size calib-batch-size optim-size optim-batch-size optim-metric optim-mode drop-prob val-batch-size num-workers
    hardware_approx test_with_hardware_approx test-before-calibration seed device results quiet first_last_bits
    layer_bits skip bits_budget size_budget
    model-kwargs input-size crop-pct mean std interpolation num-classes
    rounding damping mirror scale_search asymmetric zero_code hardware_approx_terms preset save once run_dir resume
    wide_gap crops cache
    checkpoint_key class_map class_order calib_path calib_from_val val_limit
    a_bit qconv_a_bit qhead_a_bit act_scale softmax_grid calibrate_with_act iters_a""".split()
FIELDS_OF_A_CONFIG = {"channel_wise", "temperature", "b_start", "b_end", "warmup"}


def test_the_flags_are_those_of_the_issues_and_of_the_config() -> None:
    dests = {action.dest for action in build_parser()._actions} - {"help"}
    assert dests == {flag.replace("-", "_") for flag in ISSUE_FLAGS} | FIELDS_OF_A_CONFIG


def test_defaults(monkeypatch: pytest.MonkeyPatch, files: VitFiles, tmp_path: Path) -> None:
    called: dict[str, Any] = {}

    def load(model: str, checkpoint: Any, **kwargs: Any) -> Plan:
        called.update(model=model, checkpoint=checkpoint, kwargs=kwargs)
        return plan_network(model, files.digits)

    def run(*args: Any, **_: Any) -> None:
        called["run"] = args

    monkeypatch.setattr(logart_vit.command, "plan_network", load)
    monkeypatch.setattr(logart.runs.job, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # auto takes it
    monkeypatch.chdir(tmp_path)
    assert main(["--optimize"]) == 0
    assert (called["model"], called["checkpoint"]) == ("digits_vit", None)
    assert called["kwargs"] == dict.fromkeys(called["kwargs"]) and len(called["kwargs"]) == 8
    network, source, images, config, options, columns, _ = called["run"]
    assert source.name == "digits" and images.shape == (1024, 1, 8, 8)
    assert network.row_groups == {"qkv": 3, "in_proj_weight": 3}
    assert config == replace(BEST, rounding="learned", rrweight=0.1)
    cuda, flags = torch.device("cuda"), "--model, --checkpoint"
    assert options == RunOptions(cuda, "results.csv", 128, 2, test_before_calibration=True, network_flags=flags)
    assert (columns["checkpoint_sha256"], columns["config"]) == (file_sha256(files.digits), None)
    assert columns["preset"] is None
    assert main([]) == 0
    *_, images, config, options, _, _ = called["run"]
    assert config == NEAREST and len(images) == 2 and not options.test_before_calibration
    assert list(tmp_path.iterdir()) == []


# Configs and flags

OTHER_CONFIG = """
class Config:
    w_bit, first_last_bits, channel_wise = 3, 8, False
    scale_method, search_method, calib_size, calib_batch_size = "dynamic", "layer_wise", 64, 16
    optim_size, optim_batch_size, optim_metric, temperature = 512, 8, "hessian_perturb", 5
    optim_mode, drop_prob, iters_w, lr, rrweight = "qdrop", 0.25, 77, 0.5, 7
    b_start, b_end, warmup, val_batch_size, num_workers = 9, 3, 0.1, 50, 1
    scale_search, asymmetric, zero_code = "half_step", True, True
    a_bit, qconv_a_bit, qhead_a_bit, act_scale, softmax_grid = 6, 8, 7, "pow2", "log_2"
    calibrate_with_act, iters_a = True, 11
"""
OTHER = QuantConfig(
    3, 8, False, "dynamic", SearchMethod.LAYER_WISE, search_samples=64, search_batch_size=16,
    calib_samples=512, batch_size=8, iters=77, rrweight=7.0, lr=0.5, b_start=9.0, b_end=3.0, warmup=0.1,
    recon_input=ReconInput.MIXED, drop_prob=0.25, recon_metric=ReconMetric.HESSIAN_PERTURB, temperature=5.0,
    head_kl=True, scale_search=ScaleSearch.HALF_STEP, asymmetric=True, zero_code=True,
    n_bits_a=6, input_bits_a=8, head_bits_a=7, act_scale=ActScale.POW2, softmax_grid=SoftmaxGrid.LOG_2,
    calibrate_with_act=True, iters_a=11,
)  # fmt: skip
FLAGS_WIN = {
    "--w_bit 5": {"n_bits": 5},
    "--first_last_bits same": {"first_last_bits": None},
    "--first_last_bits 6": {"first_last_bits": 6},
    "--channel_wise": {"channel_wise": True},
    "--scale_method log_sqrt2": {"scale_method": "log_sqrt2"},
    "--search_method tensor_wise": {"search_method": SearchMethod.TENSOR_WISE},
    "--calib_size 4": {"search_samples": 4},
    "--calib_batch_size 5": {"search_batch_size": 5},
    "--optim_size 6": {"calib_samples": 6},
    "--optim_batch_size 7": {"batch_size": 7},
    "--optim_metric mae": {"recon_metric": ReconMetric.MAE},
    "--temperature 8": {"temperature": 8.0},
    "--optim_mode qinp": {"recon_input": ReconInput.QUANTIZED},
    "--optim_mode rinp": {"recon_input": ReconInput.FLOAT},
    "--drop_prob 0": {"drop_prob": 0.0},
    "--iters_w 0": {"iters": 0},
    "--lr 0.125": {"lr": 0.125},
    "--rrweight 0": {"rrweight": 0.0},
    "--weight 3": {"rrweight": 3.0},
    "--b_start 12": {"b_start": 12.0},
    "--b_end 4": {"b_end": 4.0},
    "--warmup 0": {"warmup": 0.0},
    "--hardware_approx": {"hardware_terms": 2},
    "--hardware_approx --hardware_approx_terms 4": {"hardware_terms": 4},
    "--scale_search": {"scale_search": ScaleSearch.GRID},
    "--scale_search none": {"scale_search": ScaleSearch.NONE},
    "--a_bit 5": {"n_bits_a": 5},
    "--a_bit 32": {"n_bits_a": 32},
    "--qconv_a_bit 2": {"input_bits_a": 2},
    "--qhead_a_bit 32": {"head_bits_a": 32},
    "--act_scale float": {"act_scale": ActScale.FLOAT},
    "--softmax_grid uniform": {"softmax_grid": SoftmaxGrid.UNIFORM},
    "--no-calibrate_with_act": {"calibrate_with_act": False},
    "--iters_a 0": {"iters_a": 0},
    "--rounding learned": {},
    "--rounding both": {"rounding": "both"},
    "--seed 9": {"seed": 9},
}  # the values 0 and None too, which a mere "if given" would miss


@pytest.fixture(scope="module")
def other_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configs") / "other.py"
    path.write_text(OTHER_CONFIG)
    return str(path)


def test_every_field_of_a_config_reaches_the_run(other_config: str) -> None:
    config, values = settings("--config", other_config, "--optimize")
    assert config == OTHER and (values["val_batch_size"], values["num_workers"]) == (50, 1)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_shipped_configs_reach_the_run(bits: int) -> None:
    folder = ROOT / "configs" / f"{bits}bit"
    assert settings("--config", str(folder / "best.py"), "--optimize")[0] == replace(BEST, n_bits=bits)
    plain = replace(BEST, n_bits=bits, recon_input=ReconInput.QUANTIZED, recon_metric=ReconMetric.MSE)
    assert settings("--config", str(folder / "brecq_baseline.py"), "--optimize")[0] == plain


@pytest.mark.parametrize("flag", FLAGS_WIN)
def test_a_flag_wins_over_the_config(flag: str, other_config: str) -> None:
    config, _ = settings("--config", other_config, "--optimize", *flag.split())
    assert config == replace(OTHER, **FLAGS_WIN[flag])


def test_flags_of_the_loader_win_over_the_config(other_config: str) -> None:
    _, values = settings("--config", other_config, *"--val_batch_size 1 --num_workers 0".split())
    assert (values["val_batch_size"], values["num_workers"]) == (1, 0)


def test_log_dynamic_is_dynamic() -> None:
    assert settings("--scale_method", "log_dynamic") == settings()


def test_the_paper_s_command_is_understood_and_runs_as_it_stands(
    files: VitFiles, outcome: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert settings(*PAPER)[0] == replace(BEST, iters=20000, rrweight=10000.0, hardware_terms=2)
    small = files.on_images()
    small = [*small[:2], *small[4:]]  # without the model
    row = outcome(*PAPER, *small).row
    assert (row["arch"], row["config"], row["data"]) == ("vit_base", "./configs/4bit/best.py", "pictures")
    assert (row["rrweight"], row["hardware_approx"], row["iters_w"]) == ("10000.0", "True", "8")


# Presets

FAST = replace(BEST, rounding="compensated", damping="auto", calib_samples=256)
MOST = {  # of preset best
    "rounding": "compensated", "damping": "auto", "mirror": True, "calib_samples": 1024,
    "scale_search": ScaleSearch.GRID, "iters": 300, "lr": 0.01,
}  # fmt: skip
PLAIN = {"scale_search": ScaleSearch.NONE}  # from 6 bits on
WIDE = {"wide_gap": True}  # up to 3 bits
LEARNED = WIDE | {"rounding": "both"}  # up to 3 bits
FEW = WIDE | {"n_bits": 3, "scale_search": ScaleSearch.HALF_STEP}  # of preset fast
RESOLVED = {
    "fast": (FAST, "rounding=compensated "),
    "paper": (replace(BEST, iters=20000, rrweight=10000.0), "iters_w=20000 lr=0.1 rrweight=10000.0 "),
    "best": (replace(BEST, **MOST), "rounding=compensated "),
    "best --w_bit 6": (replace(BEST, **MOST | PLAIN, n_bits=6), "zero_code=False "),
    "best --w_bit 5": (replace(BEST, **MOST, n_bits=5), "scale_search=grid asymmetric=False "),
    "best --optimize": (replace(BEST, **MOST | {"rounding": "both"}), "iters_w=300 lr=0.01 "),
    "fast --w_bit 3": (replace(FAST, **FEW), "scale_search=half_step "),
    "best --w_bit 3": (replace(BEST, **MOST | LEARNED, n_bits=3), "rounding=both damping=auto "),
    "best --bits_budget 3": (replace(BEST, **MOST | LEARNED, bits_budget=3), "rounding=both damping=auto "),
    "best --bits_budget 3.5": (replace(BEST, **MOST, bits_budget=3.5), "rounding=compensated damping=auto "),
    "best --w_bit 2 --rounding compensated": (replace(BEST, **MOST | WIDE, n_bits=2), "wide_gap=True "),
    "fast --w_bit 2 --scale_search grid --asymmetric --zero_code --optim_size 32": (
        replace(FAST, n_bits=2, scale_search=ScaleSearch.GRID, asymmetric=True, zero_code=True, calib_samples=32,
                wide_gap=True),
        "scale_search=grid asymmetric=True zero_code=True wide_gap=True optim_size=32 ",
    ),
    "fast --optimize --iters_w 7": (replace(FAST, rounding="both", iters=7), "rounding=both "),
    "paper --iters_w 5 --lr 0.5": (replace(BEST, iters=5, rrweight=10000.0, lr=0.5), "iters_w=5 lr=0.5 "),
    "paper --rounding compensated": (
        replace(BEST, rounding="compensated", iters=20000, rrweight=10000.0), "rounding=compensated "
    ),
    "best --scale_search none": (replace(BEST, **MOST | {"scale_search": ScaleSearch.NONE}), "scale_search=none "),
    "best --optimize --rounding learned": (
        replace(BEST, **MOST | {"rounding": "learned"}),
        "rounding=learned ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", RESOLVED)
def test_a_preset_s_settings_are_printed_and_any_flag_wins(
    flags: str, files: VitFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(logart.runs.job, "run", lambda *args, **_: called.extend(args))
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(files.digits), "--preset", *flags.split()]) == 0
    _, _, images, config, _, columns, _ = called
    expected, printed = RESOLVED[flags]
    assert config == expected and len(images) == expected.calib_samples
    assert (columns["preset"], columns["config"]) == (flags.split()[0], None)
    assert printed in capsys.readouterr().out.splitlines()[1] + " "


@pytest.mark.parametrize(
    ("flags", "rounding"),
    [
        ("", "nearest"),
        ("--optimize", "learned"),
        *((f"--rounding {how}", how) for how in METHODS),
        *((f"--optimize --rounding {how}", how) for how in ("learned", "both")),
    ],
)
def test_rounding_says_whether_to_learn_and_optimize_is_short_for_it(flags: str, rounding: str) -> None:
    assert settings(*flags.split())[0] == replace(BEST, rounding=rounding)


# From flags to a row


@pytest.fixture(scope="module")
def on_digits(files: VitFiles) -> list[str]:
    return ["--checkpoint", str(files.digits), "--num_workers", "0"]


def test_the_digits_are_the_default_data_and_tell_the_whole_story(
    files: VitFiles, on_digits: list[str], outcome: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    row = outcome(*on_digits, *"--optimize --iters_w 2 --optim_size 8".split()).row
    lines = printed(capsys)
    assert lines[0] == (
        "digits_vit (digits.pth) on digits: 4 bits, dynamic (tensor_wise DBS), a codebook per channel, "
        "LLR 2 steps a block (hessian_perturb, mixed 0.5 input, lr 0.1, λ 0.1), seed 0, on cpu"
    )
    assert lines[1] == (
        "w_bit=4 first_last_bits=same channel_wise=True scale_method=dynamic search_method=tensor_wise "
        "calib_size=128 calib_batch_size=32 scale_search=none asymmetric=False zero_code=False wide_gap=False "
        "optim_size=8 optim_batch_size=32 optim_metric=hessian_perturb temperature=20.0 optim_mode=qdrop drop_prob=0.5 "
        "iters_w=2 lr=0.1 rrweight=0.1 b_start=20.0 b_end=2.0 warmup=0.2 a_bit=32 qconv_a_bit=32 qhead_a_bit=32 "
        "act_scale=float softmax_grid=uniform calibrate_with_act=False iters_a=0 rounding=learned damping=0.01 "
        "mirror=False crops=0 seed=0 hardware_approx_terms=0 val_batch_size=128 num_workers=0"
    )
    assert [line.split(" Acc")[0].rstrip() for line in lines[2:5]] == ["float", "after DBS", "after LLR"]
    shown = {*SETTINGS, "val_images", "device", "mean_bits", "layers_by_bits", "quantized_weights"}
    assert {name: value for name, value in row.items() if name in shown} == {
        "class_order": "", "calib_from": "", "val_limit": "",
        "track": "vit", "arch": "digits_vit", "checkpoint": "digits.pth",
        "checkpoint_sha256": file_sha256(files.digits), "network_options": "", "data": "digits", "config": "",
        "bits": "4", "first_last_bits": "same", "channel_wise": "True", "scale_method": "dynamic",
        "search_method": "tensor_wise", "search_samples": "", "search_batch_size": "", "calib_samples": "8",
        "batch_size": "32", "iters_w": "2", "lr": "0.1", "rrweight": "0.1", "b_start": "20.0", "b_end": "2.0",
        "warmup": "0.2", "recon_input": "mixed", "recon_metric": "hessian_perturb+kl", "drop_prob": "0.5",
        "temperature": "20.0", "hardware_approx": "False", "calib_augment": "", "calib_list": "",
        "capture_precision": "", "seed": "0",
        "val_images": "500",
        "device": "cpu", "preset": "", "rounding": "learned", "scale_search": "none", "asymmetric": "False",
        "zero_code": "False", "hardware_approx_terms": "", "layer_bits": "", "skip": "",
        "bits_budget": "", "size_budget": "", "mean_bits": "4.0",
        "layers_by_bits": "4:18",
        "quantized_weights": "99.617", "damping": "", "mirror": "False", "crops": "", "wide_gap": "",
        "bits_a": "", "input_bits_a": "", "head_bits_a": "", "act_scale": "", "softmax_grid": "",
        "calibrate_with_act": "", "iters_a": "",
    }  # fmt: skip
    assert row["timm_version"] == timm.__version__
    for prefix in ("float_", "search_", ""):
        assert 0 < float(row[f"{prefix}Acc@1"]) < float(row[f"{prefix}Acc@5"]) < 100
    assert row["approx_Acc@1"] == "" and float(row["total_seconds"]) >= float(row["reconstruction_seconds"]) > 0


LLR_COLUMNS = """calib_samples batch_size lr rrweight b_start b_end warmup recon_input recon_metric drop_prob
    temperature""".split()


def test_without_optimize_the_run_ends_after_dbs(
    on_digits: list[str], outcome: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = outcome(*on_digits)
    assert [line.split(" Acc")[0].rstrip() for line in printed(capsys)[2:4]] == [
        "float", "after DBS"
    ]  # fmt: skip
    assert ran.losses == [] and {ran.row[name] for name in LLR_COLUMNS} == {""}
    assert ran.row["iters_w"] == "0" and float(ran.row["reconstruction_seconds"]) == 0
    assert ran.row["Acc@1"] == ran.row["search_Acc@1"] != ""
    learned = outcome(*on_digits, *"--optimize --iters_w 2 --optim_size 8".split()).row
    assert all(ran.row[f"{prefix}Acc@1"] == learned[f"{prefix}Acc@1"] for prefix in ("float_", "search_"))


@pytest.mark.parametrize("flags", ["", "--search_method block_wise --calib_size 4 --seed 3", "--rounding both"])
def test_the_same_command_gives_the_same_codes_and_the_same_row(
    flags: str, files: VitFiles, outcome: Callable[..., Outcome]
) -> None:
    argv = [*files.on_images(), *flags.split()]
    first = outcome(*argv)
    torch.rand(3)  # what ran before does not matter
    second = outcome(*argv, again=True)
    assert (second.codes, second.losses) == (first.codes, first.losses)
    assert {k for k in first.row if first.row[k] != second.row[k]} <= SURROUNDINGS


def test_compensated_rounding_from_flags_to_a_row(
    files: VitFiles, outcome: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*files.unlearned(), *"--rounding compensated --optim_size 6".split()]
    first = outcome(*argv)
    lines = printed(capsys)
    assert [line.split(" Acc")[0].rstrip() for line in lines[2:4]] == ["float", "after compensated rounding"]
    assert "compensated rounding, 6 images" in lines[0] and "DBS" not in lines[0] and "LLR" not in lines[0]
    empty = {*LLR_COLUMNS, "search_method", "search_Acc@1", "search_Acc@5"} - {"calib_samples", "batch_size"}
    assert {first.row[name] for name in empty} == {""} and first.losses == []
    assert (first.row["rounding"], first.row["iters_w"]) == ("compensated", "0")
    assert first.row["Acc@1"] and float(first.row["reconstruction_seconds"]) > 0 == float(first.row["search_seconds"])
    torch.rand(3)  # what ran before does not matter
    second = outcome(*argv, again=True)
    assert second.codes == first.codes != outcome(*files.unlearned()).codes
    assert {k for k in first.row if first.row[k] != second.row[k]} <= SURROUNDINGS


def test_nearest_is_the_default(files: VitFiles, outcome: Callable[..., Outcome]) -> None:
    named, default = outcome(*files.unlearned(), "--rounding", "nearest"), outcome(*files.unlearned())
    assert named.codes == default.codes and named.settings() == default.settings()
    assert named.row["rounding"] == "nearest"


def test_one_codebook_a_layer_but_three_for_q_k_v(files: VitFiles, tmp_path: Path) -> None:
    argv = [*files.on_images(), *"--no-channel_wise --w_bit 2 --results".split(), str(tmp_path / "results.csv")]
    with kept_results() as last:
        assert main(argv) == 0
    for name, layer in quantized_layers(last[0]).items():
        groups = layer.weight.detach().reshape(3 if name.endswith("qkv") else 1, -1)
        assert layer.n_codebooks == len(groups)
        values = [set(group.tolist()) for group in groups]
        assert max(map(len, values)) <= 4, name
        assert len(values) == 1 or values[0] != values[1], name


# What the core is asked to do


@pytest.mark.parametrize(
    ("metric", "function"),
    [("hessian_perturb", squared_error), ("mse", squared_error), ("mae", absolute_error)],
)
def test_the_head_is_compared_by_kl_and_the_blocks_by_the_metric(
    metric: str, function: Callable[..., Tensor], files: VitFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, Any] = {}
    original = logart.quantization.rounding_methods.learn_rounding

    def learn(*args: Any) -> Any:
        losses[args[0]] = args[6]
        return original(*args)

    monkeypatch.setattr(logart.quantization.rounding_methods, "learn_rounding", learn)
    flags = ["--optim_metric", metric, "--results", str(tmp_path / "results.csv")]
    assert main([*files.on_images(), *flags]) == 0
    assert losses.pop("head") is kl_divergence
    assert list(losses) == ["patch_embed.proj", "blocks.0", "blocks.1"]
    assert {loss.func for loss in losses.values()} == {function}
    weighed = {"importance"} if metric == "hessian_perturb" else set()
    assert {frozenset(loss.keywords) for loss in losses.values()} == {frozenset({"channel_dim"} | weighed)}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Per stage and per block of LLR, the images sent since the one before through each of the three networks."""
    seen: Counter[str] = Counter()
    log: list[tuple[str, dict[str, int]]] = []

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, VisionTransformer):
            float64 = args[0].dtype is torch.float64
            seen["float64" if float64 else "quantized" if quantized_layers(module) else "float"] += len(args[0])

    def note(name: str) -> None:
        log.append((name, dict(seen)))
        seen.clear()

    def quantize(*args: Any, on_stage_end: Callable[[str, nn.Module], None], **kwargs: Any) -> Any:
        def watched(stage: str, network: nn.Module) -> None:
            note(stage)
            on_stage_end(stage, network)
            seen.clear()  # an evaluation's

        return originals[0](*args, on_stage_end=watched, **kwargs)

    def learn(name: str, *args: Any) -> Any:
        note(name)
        return originals[1](name, *args)

    originals = logart.runs.run.quantize_model, logart.quantization.rounding_methods.learn_rounding
    monkeypatch.setattr(logart.runs.run, "quantize_model", quantize)
    monkeypatch.setattr(logart.quantization.rounding_methods, "learn_rounding", learn)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield log
    handle.remove()


@pytest.mark.parametrize(
    ("flags", "of_each", "of_importance"),
    [
        ("", {"float": 7, "quantized": 7}, 5),
        ("--optim_mode qinp", {"float": 7, "quantized": 7}, 5),
        ("--optim_mode rinp", {"float": 7}, 5),
        ("--optim_metric mse", {"float": 7, "quantized": 7}, 0),
    ],
)
def test_passes_over_the_calibration_images(
    flags: str,
    of_each: dict[str, int],
    of_importance: int,
    files: VitFiles,
    tmp_path: Path,
    passes: list[tuple[str, dict[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block takes one pass in float for input and target together and one quantized one.

    Two images go through the float network five times, to check what is folded and baked, and to see which weights are
    used and what blocks there are, and three once, to see what grows with their number; then two seven times, to see
    what blocks are made of and how much memory is needed, and once through the quantized one.
    The importance takes one in float64 in all and one a block, over its first images.
    Once, before `blocks.1`, a batch of 4 is run to where a blank without values in the place of the patches meets the
    positions; from there on blanks have values.
    """
    monkeypatch.setattr(logart.quantization.block_loss, "IMPORTANCE_IMAGES", 5)
    argv = [*files.on_images(), "--optim_size", "7", "--results", str(tmp_path / "results.csv"), *flags.split()]
    assert main(argv) == 0

    def block(times: int, more: int = 0) -> dict[str, int]:
        own = {network: images + more for network, images in of_each.items()}
        return own | ({"float64": times * of_importance} if times * of_importance else {})

    of_llr = [("patch_embed.proj", block(2)), ("blocks.0", block(1)), ("blocks.1", block(1, 4)), ("head", block(0))]
    looked = [("float", {"float": 13}), ("searched", {"quantized": 2, "float": 14})]
    assert passes[:-1] == [*looked, *of_llr] and passes[-1][1] == {}


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_blocks_are_timms_own_and_attention_stays_fused(model: str, files: VitFiles, tmp_path: Path) -> None:
    argv = [*files.on_images(), "--results", str(tmp_path / "results.csv")]
    if model == "swin":
        argv += ["--model", f"timm:{SWIN}", "--checkpoint", str(files.swin), "--model_kwargs", *SWIN_KWARGS.split()]
    args = build_parser().parse_args(argv)
    kwargs = key_values(args.model_kwargs, "")
    float_network = load_network(args.model, args.checkpoint, model_kwargs=kwargs, num_classes=4).model
    modules = dict(float_network.named_modules())
    forwards = {type(module): type(module).forward for module in modules.values()}
    with kept_results() as last:
        assert main(argv) == 0
    assert all(kind.forward is forward for kind, forward in forwards.items())
    quantized, report = last
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedWeight):
            continue
        original = modules[name]
        assert type(module) is type(original) or issubclass(type(module), LAYER_TYPES), name
        assert type(module).forward is type(original).forward and "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    fused = {name: module.fused_attn for name, module in quantized.named_modules() if hasattr(module, "fused_attn")}
    assert len(fused) == 2 and fused == {name: modules[name].fused_attn for name in fused}
    assert set(fused.values()) == {model == "vit"}  # timm's own default; Swin's is an experiment of timm's
    inner = {
        "vit": ["blocks.0", "blocks.1", "head"],
        "swin": ["layers.0.blocks.0", "layers.1.downsample.reduction", "layers.1.blocks.0", "head.fc"],
    }
    assert [block.name for block in report.blocks] == ["patch_embed.proj", *inner[model]]
    assert sum(layer.n_changed_codes for layer in report.layers) > 0 and report.folded == []


# What ends a run early


class FailsLate(nn.Module):
    """A network that is not finite for four images at once, which are all that it is calibrated with."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x * torch.nan if len(x) == 4 else x)  # type: ignore[no-any-return]


def test_a_network_that_fails_late_takes_one_line_and_gets_no_row(
    files: VitFiles, on_digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def load(*args: Any, **kwargs: Any) -> Plan:
        plan = plan_network("digits_vit", files.digits)
        strange = replace(plan.load(), model=FailsLate().eval())
        return replace(plan, load=lambda: strange)

    monkeypatch.setattr(logart_vit.command, "plan_network", load)
    argv = [*on_digits, *"--quiet --optimize --iters_w 2 --optim_size 4 --results".split(), str(tmp_path / "r.csv")]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("logart-vit: --model, --checkpoint: block head: the activations of calibration image")
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_neither_our_own_mistakes_nor_an_interrupt_leave_a_row(
    error: type[BaseException], files: VitFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*args: Any) -> None:
        raise error("ours")

    monkeypatch.setattr(logart.quantization.rounding_methods, "learn_rounding", fail)
    argv = [*files.on_images(), "--quiet", "--results", str(tmp_path / "results.csv")]
    if error is KeyboardInterrupt:
        assert main(argv) == 130
        assert capfd.readouterr().err == "logart-vit: interrupted; nothing was recorded\n"
    else:
        with pytest.raises(error, match="ours"):
            main(argv)
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_a_command_with_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "logart_vit.main", "--model", "vit_bsae"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("logart-vit: --model: no network 'vit_bsae'") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
