"""What a run of either command needs to take half a second: files, command lines, and what a run left."""

from __future__ import annotations

import csv
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import logart.runs.run
from logart.cli import key_values
from logart.networks.weights import file_sha256
from logart.quantization.surgery import quantized_layers
from logart.runs.claims import CLAIMED_ELSEWHERE, claimed
from logart.runs.columns import SETTINGS
from logart.runs.results_file import new_run_id
from logart_vit.models import DIGITS_VIT_KWARGS

SMALL, SMALL_DEEP = "resnetv2_50", "resnetv2_50d"  # the second has three convolutions for a stem
SMALL_KWARGS = "layers=(1,1) channels=(16,32) stem_chs=8 preact=False"  # 3,740 weights, norms that fold
VIT = "vit_tiny_patch16_224"
VIT_KWARGS = "img_size=16 patch_size=8 embed_dim=12 depth=2 num_heads=2"  # 6,232 parameters
SWIN = "swin_tiny_patch4_window7_224"
SWIN_KWARGS = "img_size=32 window_size=4 embed_dim=8 depths=(1,1) num_heads=(1,2)"
SURROUNDINGS = {  # columns that two equal runs need not share
    "utc_time", "search_seconds", "reconstruction_seconds", "total_seconds", "peak_memory_mb", "run_id", "command",
}  # fmt: skip


def rows(results: Path) -> list[dict[str, str]]:
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def seeded(build: Callable[[], nn.Module], path: Path, seed: int = 0) -> Path:
    """A network's random weights as a file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = build().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def with_average(plain: Path, averaged: Path, path: Path) -> Path:
    """A checkpoint with both files' weights, as training scripts write it."""
    torch.save({"model": load_file(plain), "model_ema": torch.load(averaged), "epoch": 3}, path)
    return path


def small(name: str = SMALL) -> nn.Module:
    """Of timm's, for 4 classes."""
    model: nn.Module = timm.create_model(name, num_classes=4, **key_values(SMALL_KWARGS.split(), "words"))
    return model


def small_transformer(name: str = VIT, words: str = VIT_KWARGS) -> nn.Module:
    """Of timm's, for 4 classes; `words` as after --model_kwargs."""
    model: nn.Module = timm.create_model(name, num_classes=4, **key_values(words.split(), "words"))
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)  # timm's start has logits that hardly differ
        if key.endswith("qkv.weight"):
            parameter.data[: len(parameter) // 3] *= 4  # queries need levels of their own
    return model


class ImageFiles:
    """Image folders that the tests of both commands read."""

    def __init__(self, folder: Path, images: Path, make_image_folder: Callable[..., Path]) -> None:
        self.images = images
        self.others = make_image_folder(folder / "others", train=3, size=48)
        self.numbered = make_image_folder(folder / "numbered")
        for path in self.numbered.glob("*/class*"):
            path.rename(path.with_name({"0": "1", "1": "2", "2": "9", "3": "10"}[path.name[-1]]))
        classes = {f"class{index}": 3 - index for index in range(4)}
        self.classes = folder / "classes.json"
        self.classes.write_text(json.dumps(classes))
        self.classes_digest = "map:" + sha256(json.dumps(sorted(classes.items())).encode()).hexdigest()[:16]


class Files(ImageFiles):
    """Checkpoints and image folders that the tests of the CNN command read."""

    def __init__(self, folder: Path, images: Path, digits: Path, make_image_folder: Callable[..., Path]) -> None:
        super().__init__(folder, images, make_image_folder)
        self.digits = digits
        self.small = seeded(small, folder / "small.safetensors")
        self.again = seeded(small, folder / "again.pth", seed=1)
        self.again_sha256 = file_sha256(self.again)
        self.both = with_average(self.small, self.again, folder / "both.pth")
        self.deep = seeded(lambda: small(SMALL_DEEP), folder / "deep.pth")
        self.deep_sha256 = file_sha256(self.deep)

    def on_images(self) -> list[str]:
        """A whole run on the small folder of images, in a second or less."""
        return [*self.unlearned(), *"--iters_w 8 --calib_samples 6 --batch_size 4 --calib_lr 0.1".split()]

    def unlearned(self) -> list[str]:
        """The same without the flags of LLR."""
        return [
            *("--data_path", str(self.images), "--arch", f"timm:{SMALL}", "--checkpoint", str(self.small)),
            *("--model_kwargs", *SMALL_KWARGS.split(), "--num_classes", "4", "--input_size", "32"),
            *"--device cpu --workers 0".split(),
        ]


class VitFiles(ImageFiles):
    """Checkpoints, configs and image folders that the tests of the ViT command read."""

    def __init__(self, folder: Path, images: Path, make_image_folder: Callable[..., Path]) -> None:
        super().__init__(folder, images, make_image_folder)
        self.small = seeded(small_transformer, folder / "small.safetensors")
        self.again = seeded(small_transformer, folder / "again.bin", seed=1)
        self.again_sha256 = file_sha256(self.again)
        self.both = with_average(self.small, self.again, folder / "both.pth")
        self.swin = seeded(lambda: small_transformer(SWIN, SWIN_KWARGS), folder / "swin.pth")
        self.digits = seeded(lambda: timm.create_model(VIT, **DIGITS_VIT_KWARGS), folder / "digits.pth")
        self.config = folder / "mine.py"
        self.config.write_text("class Config:\n    w_bit = 3\n    optim_metric = 'mae'\n")

    def on_images(self) -> list[str]:
        """A whole run on the small folder of images, in half a second."""
        return [*self.unlearned(), *"--optimize --iters_w 8 --optim_size 6 --optim_batch_size 4 --lr 0.1".split()]

    def unlearned(self) -> list[str]:
        """The same without the flags of LLR."""
        return [
            *("--dataset", str(self.images), "--model", f"timm:{VIT}", "--checkpoint", str(self.small)),
            *("--model_kwargs", *VIT_KWARGS.split(), "--num_classes", "4"),
            *"--device cpu --num_workers 0".split(),
        ]


def printed(capture: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without the lines on memory, which depend on the machine."""
    printed = capture.readouterr().out
    return re.sub(r"^captured inputs and targets .*\n", "", printed, flags=re.MULTILINE).splitlines()


class Outcome(NamedTuple):
    """What a run left: its row, and what the core did (every code, every LLR loss)."""

    row: dict[str, str]
    codes: list[tuple[str, list[int]]]
    losses: list[tuple[float, ...]]

    def settings(self) -> dict[str, str]:
        """The row without what is measured, but with how many images it is measured on."""
        return {k: v for k, v in self.row.items() if k in {*SETTINGS, "val_images"}}


@contextmanager
def kept_results() -> Iterator[list[Any]]:
    """A list that holds what the last run's `quantize_model` gave: the network and the report."""
    original, last = logart.runs.run.quantize_model, []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        last[:] = original(*args, **kwargs)
        return tuple(last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logart.runs.run, "quantize_model", keeping)
        yield last


@contextmanager
def outcomes(main: Callable[[list[str]], int], results: Path) -> Iterator[Callable[..., Outcome]]:
    """A function that runs the command, each command line once; rows go to `results`."""
    known: dict[tuple[str, ...], Outcome] = {}
    with kept_results() as last:

        def run(*argv: str, again: bool = False) -> Outcome:
            if again or argv not in known:
                assert main([*argv, "--results", str(results)]) == 0
                layers = quantized_layers(last[0])
                codes = [(name, layer.codes.flatten().tolist()) for name, layer in layers.items()]  # type: ignore[union-attr]
                known[argv] = Outcome(rows(results)[-1], codes, [block.losses for block in last[1].blocks])
            return known[argv]

        yield run


class Effect(NamedTuple):
    """What giving a flag changes.

    Attributes:
        flags: the flag and its value.
        row: the settings columns of the results row that change, with their new values.
        codes: whether the codes or the losses of LLR change.
        given: flags that both runs are given.
        unlearned: whether both runs lack the flags of LLR.
    """

    flags: str
    row: dict[str, str] = {}
    codes: bool = True
    given: str = ""
    unlearned: bool = False

    def check(self, files: Any, outcome: Callable[..., Outcome]) -> None:
        """Run the command without the flag and with it; braces in texts are attributes of `files`."""
        given, flags = (text.format_map(vars(files)).split() for text in (self.given, self.flags))
        argv = [*(files.unlearned() if self.unlearned else files.on_images()), *given]
        before, after = outcome(*argv), outcome(*argv, *flags)
        changed = {k: v for k, v in after.settings().items() if before.settings()[k] != v}
        assert changed == {column: value.format_map(vars(files)) for column, value in self.row.items()}
        assert ((before.codes, before.losses) != (after.codes, after.losses)) == self.codes


def assert_refused(main: Callable[[list[str]], int], argv: list[str], line: str, capfd: Any) -> None:
    """The command ends with code 2 and one line on stderr that starts with `line`, before any accuracy."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    out, err = capfd.readouterr()
    err = re.sub(r'\ADownloading: "[^\n]*\n', "", err)  # torch's own, which older ones write there
    assert stopped.value.code == 2
    assert err.startswith(line), err
    assert err.endswith("\n") and err.count("\n") == 1 and "\r" not in err
    assert "Acc@" not in out


def check_once(main: Callable[[list[str]], int], argv: list[str], other: str, results: Path, capfd: Any) -> None:
    """`--once` runs what no row is like, the very row that is written; `other` is a flag that makes another row."""
    argv = [*argv, "--rounding", "nearest", "--results", str(results), "--once"]
    for count, words in enumerate((argv, [*argv, other], [*argv, "--seed", "1"]), 1):
        assert main(words) == 0 and len(rows(results)) == count
    capfd.readouterr()
    for words in (argv, [*argv, other], [*argv, "--seed", "1", "--quiet"]):
        assert main(words) == 0 and len(rows(results)) == 3
        out, err = capfd.readouterr()
        assert f"{results} has this row already, of 20" in out and "Acc@" not in out and err == ""
    assert main([word for word in argv if word != "--once"]) == 0 and len(rows(results)) == 4
    settings = {name: rows(results)[0][name] for name in SETTINGS}
    with claimed(results, new_run_id({**settings, "seed": 7})):
        assert main([*argv, "--seed", "7"]) == CLAIMED_ELSEWHERE and len(rows(results)) == 4


def check_run_folder(main: Callable[[list[str]], int], argv: list[str], folder: Path) -> None:
    """A run that is resumed behind its first learned block gives the same file, byte for byte, and the same row."""
    run, again, results = folder / "run", folder / "again", folder / "results.csv"
    assert main([*argv, "--quiet", "--results", str(results), "--run_dir", str(run)]) == 0
    shutil.copytree(run, again)
    for path in [again / "report.json", again / "packed.safetensors", *sorted(again.glob("blocks/LLR-*"))[1:]]:
        path.unlink()
    other = folder / "other.csv"
    assert main(["--resume", str(again), "--quiet", "--results", str(other)]) == 0
    assert (again / "packed.safetensors").read_bytes() == (run / "packed.safetensors").read_bytes()
    first, second = ({k: v for k, v in row.items() if k not in SURROUNDINGS} for row in rows(results) + rows(other))
    assert first == second
    assert rows(results)[0]["run_id"] == rows(other)[0]["run_id"]


def check_cache(argv: list[str], outcome: Callable[..., Outcome]) -> None:
    """Host memory and disk hold what the device does; half precision rounds it."""
    device = outcome(*argv, "--cache", "device")
    for place in ("auto", "cpu", "disk"):
        assert outcome(*argv, "--cache", place)[1:] == device[1:]
    half = outcome(*argv, "--cache", "half")
    assert half.losses != device.losses
    assert half.losses[0][0] == pytest.approx(device.losses[0][0], rel=0.05)


@contextmanager
def disk_with(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: the operating system then writes a part, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def quiet_main(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """A command as the target of another process."""
    raise SystemExit(main(argv))
