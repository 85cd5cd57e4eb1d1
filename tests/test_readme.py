"""Commands and Python of the README and of docs/ run, on small data where they ask for ImageNet; flags are the code's.

A command that no rule below covers fails: whoever adds one says here how it is run.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import timm
import torch
from small_runs import SMALL, SMALL_KWARGS, SWIN_KWARGS, VIT_KWARGS, rows, seeded, small, small_transformer

from logart.cli import key_values
from logart.export.command import build_parser as build_export_parser
from logart.export.command import main as export_main
from logart.networks.digits import DIGITS
from logart.packed.inspect import build_parser as build_inspect_parser
from logart.packed.inspect import main as inspect_main
from logart.report.command import build_parser as build_report_parser
from logart.report.command import main as report_main
from logart.report.compare import build_parser as build_compare_parser
from logart.report.compare import main as compare_main
from logart_cnn import models
from logart_cnn.command import build_config, build_parser, main
from logart_vit.command import build_parser as build_vit_parser
from logart_vit.command import build_settings
from logart_vit.main import main as vit_main
from logart_vit.models import ENTRIES

ROOT = Path(__file__).parents[1]
GENERATED = ("cli.md", "networks.md", "results_csv.md", "experiments.md")  # from the code, or dated measurements
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED)]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}
EVERYTHING = "\n".join(TEXTS.values())
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", EVERYTHING)
CNN, VIT = ["python", "-m", "logart_cnn.main"], ["python", "-m", "logart_vit.main"]
MAINS: dict[str, Callable[[list[str]], int]] = {CNN[2]: main, VIT[2]: vit_main}
# Run as they stand, after the commands that make what they read.
TOOLS: dict[str, Callable[[list[str]], int]] = {
    "logart.inspect": inspect_main,
    "logart.export": export_main,
    "logart.report": report_main,
    "logart.compare": compare_main,
}
CLASSES = 4
ABLATION = re.compile(r"scripts/ablation(?:_(cnn|vit))?\.(?:sh|py|slurm)")
NEEDS_VENV = pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="would install everything into a new .venv")


def commands(block: str) -> list[list[str]]:
    """The words of every command in a block of shell."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def fenced(language: str) -> list[tuple[str, str]]:
    """(page, block) of every block in a language."""
    return [(name, block) for name, text in TEXTS.items() for kind, block in FENCED.findall(text) if kind == language]


SHELL = [commands(block) for _, block in fenced("bash")]
IN_PROSE = [shlex.split(code) for code in re.findall(r"`([^`]+)`", PROSE) if re.match(r"(python|bash|pip) ", code)]
NOT_RUN = (["pip", "install"], ["pip", "download"])  # installs into the environment that runs the tests
RUNS = [[words for words in block if words[2:3] and words[2] in MAINS | TOOLS] for block in SHELL]
SCRIPT_RUNS = [words for block in SHELL for words in block if words[0] == "bash"]


def test_every_command_has_a_rule() -> None:
    known = tuple(f"python -m {name}" for name in MAINS | TOOLS)
    known += tuple(f"bash scripts/{name}.sh" for name in ("demo", "test", "test_browser", "test_rtl"))
    known += ("python scripts/docs.py", "python -m logart.runs.columns", "python run.py")
    known += ("torchrun --nproc-per-node 2 -m logart_cnn.main",)  # see tests/logart/test_ranks.py
    known += ("python benchmarks/families.py",)  # see tests/test_benchmarks.py
    for words in [words for block in SHELL for words in block] + IN_PROSE:
        if any(map(ABLATION.fullmatch, words)) or words[:2] in NOT_RUN:
            continue
        assert shlex.join(words).startswith(known), f"no rule runs {shlex.join(words)!r}; add one to {__file__}"
    assert {kind for text in TEXTS.values() for kind, _ in FENCED.findall(text)} <= {"bash", "python", "text"}
    assert SHELL[0] == [["bash", "scripts/demo.sh"], ["bash", "scripts/test.sh"]]  # what a newcomer reads first


def test_the_front_page_is_one() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert missing == [], page


def script(words: list[str], *extra: str) -> str:
    done = subprocess.run([*words, *extra], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@NEEDS_VENV
@pytest.mark.parametrize("words", [w for w in SCRIPT_RUNS if w[1] == "scripts/demo.sh"], ids=shlex.join)
def test_the_demo_runs(words: list[str], tmp_path: Path) -> None:
    out = script(words, "--iters_w", "2", "--results", str(tmp_path / "results.csv"))
    made = rows(tmp_path / "results.csv")
    assert [(row["arch"], row["preset"], row["iters_w"]) for row in made] == [
        (arch, *preset) for arch in ("digits_resnet", "digits_vit") for preset in (("fast", "0"), ("paper", "2"))
    ]
    assert all(row["data"] == DIGITS and float(row["float_Acc@1"]) > 95 for row in made)
    assert all(float(row["Acc@1"]) > float(row["float_Acc@1"]) - 3 for row in made if row["preset"] == "fast")
    assert all(text in out for text in ("after compensated rounding", "after DBS", "after LLR", "side by side"))


@NEEDS_VENV
@pytest.mark.parametrize("words", [w for w in SCRIPT_RUNS if w[1] == "scripts/test.sh"], ids=shlex.join)
def test_the_test_script_lints_checks_types_and_collects(words: list[str]) -> None:
    # To run the tests here would run this one again; and that all of them can be collected, it shows by running.
    out = script(words, "--collect-only", "-q", __file__)
    assert "All checks passed!" in out and "Success: no issues found" in out
    assert f"tests/{Path(__file__).name}" in out


@pytest.mark.parametrize(
    "words", [w for block in SHELL for w in block if any(map(ABLATION.fullmatch, w))], ids=shlex.join
)
def test_the_ablation_s_rows_are_accepted(words: list[str]) -> None:
    """The rows themselves run in test_ablation.py; here every command they come to is parsed and its settings made."""
    (at,) = (index for index, word in enumerate(words) if ABLATION.fullmatch(word))
    assert (ROOT / words[at]).exists()
    before = [word for word in words[:at] if not re.fullmatch(r"[A-Z_]+=.*", word)]
    assert before in (["bash"], ["sbatch"], ["torchrun", "--nproc-per-node", "8"])
    found = ABLATION.fullmatch(words[at])
    assert found is not None
    track, *rest = words[at + 1 :] if found[1] is None else [found[1], *words[at + 1 :]]
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "scripts" / "ablation.py")
    assert spec is not None and spec.loader is not None
    ablation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    environment = dict(word.split("=", 1) for word in words[:at] if re.fullmatch(r"[A-Z_]+=.*", word))
    made = ablation.sweep(track, rest[0] if rest else DIGITS, rest[1:], environment, "auto")
    assert len(made) % 10 == 0 and len(made) >= 10
    for row in made:
        if track == "cnn":
            args = build_parser().parse_args(row.words[1:])
            build_config(args)
            assert args.arch in models.ENTRIES or args.arch == "digits_resnet"
        else:
            args = build_vit_parser().parse_args(row.words[1:])
            build_settings(args)
            assert args.model in ENTRIES


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder as the working directory, and one beside it as torch's hub."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copytree(ROOT / "configs", folder / "here" / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "_hub_dir", str(folder / "hub"))
        patch.chdir(folder / "here")
        yield folder


def shrunk(argv: list[str], images: Path, folder: Path) -> list[str]:
    """The same command on small images, in seconds; flags that could not act are left out."""
    args = build_parser().parse_args(argv)
    config = build_config(args)
    more = f"--device cpu --workers 0 --results {folder / 'results.csv'}".split()
    if config.learns:
        more += ["--iters_w", "2"]
    if config.method.calibrates:
        more += "--calib_samples 4 --batch_size 2".split()
    if config.scale_method == "dynamic" and config.method.uses_dbs:
        more += ["--search_samples", "2"]
    if (args.data_path or DIGITS) != DIGITS:
        more += ["--data_path", str(images), "--num_classes", str(CLASSES), "--input_size", "32"]
        if not config.method.uses_dbs:  # its matrices are as large as the layers, however small the images
            path = seeded(small, folder / "small.pth")
            more += ["--arch", f"timm:{SMALL}", "--checkpoint", str(path), "--model_kwargs", *SMALL_KWARGS.split()]
        else:
            more += weights(args.arch, args.checkpoint, args.model_kwargs, folder)
    return [*argv, *more]


def shrunk_vit(argv: list[str], images: Path, folder: Path) -> list[str]:
    """The same command on small images and a small network of its kind."""
    args = build_vit_parser().parse_args(argv)
    config, _ = build_settings(args)
    more = f"--device cpu --num_workers 0 --results {folder / 'results.csv'}".split()
    if config.learns:
        more += ["--iters_w", "2"]
    if config.method.calibrates:
        more += "--optim_size 4 --optim_batch_size 2".split()
    if config.searches_data:
        more += ["--calib_size", "2"]
    words = SWIN_KWARGS if "swin" in args.model else VIT_KWARGS
    name = args.model.removeprefix(models.TIMM)
    name = ENTRIES[name].timm if name in ENTRIES else name
    path = seeded(lambda: small_transformer(name, words), folder / "transformer.pth")
    more += ["--dataset", str(images), "--num_classes", str(CLASSES), "--checkpoint", str(path)]
    return [*argv, *more, "--model_kwargs", *words.split()]


SHRINK = {CNN[2]: shrunk, VIT[2]: shrunk_vit}


def weights(arch: str, checkpoint: str | None, model_kwargs: list[str] | None, folder: Path) -> list[str]:
    """Random weights where the command looks for trained ones, or the flags that name them."""
    name = arch.removeprefix(models.TIMM)
    path = folder / f"{name}.pth"
    if arch.startswith(models.TIMM):
        words = model_kwargs or (["channels=(8,8,8,8)", "stem_width=8"] if name == "resnet10t" else [])
        options = key_values(words, "--model_kwargs")
        seeded(lambda: timm.create_model(name, num_classes=CLASSES, **options), path)
        return ["--checkpoint", str(path), *(["--model_kwargs", *words] if words else [])]
    if checkpoint is None:
        path = folder / "hub" / "checkpoints" / Path(urlparse(models.ENTRIES[arch].weights).path).name
    seeded(lambda: models.ENTRIES[arch].build({}, CLASSES), path)
    return [] if checkpoint is None else ["--checkpoint", str(path)]


@pytest.mark.parametrize("block", [block for block in RUNS if block], ids=lambda block: f"{len(block)} commands")
def test_the_commands_of_a_block_run_one_after_the_other(
    block: list[list[str]], workplace: Path, image_folder: Path
) -> None:
    results = workplace / "results.csv"
    results.unlink(missing_ok=True)
    done = 0
    for words in block:
        program, argv = words[2], words[3:]
        if program in TOOLS:
            argv = [str(results) if word == results.name else word for word in argv]
            assert TOOLS[program](argv) == 0, shlex.join(words)
            continue
        command = SHRINK[program](argv, image_folder, workplace)
        assert MAINS[program](command) == 0, shlex.join(words)
        done += 1
        assert len(rows(results)) == done
        asked = {"--arch": "digits_resnet"} | dict(zip(command, command[1:], strict=False))  # the last of equal flags
        assert rows(results)[-1]["arch"] == (asked["--arch"] if program == CNN[2] else asked["--model"])


def test_commands_in_the_prose_print_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in [words for words in IN_PROSE if words in (CNN, VIT)]:
        with pytest.raises(SystemExit) as stopped:
            MAINS[words[2]](["--help"])
        assert stopped.value.code == 0 and ("--n_bits_w" if words == CNN else "--w_bit") in capsys.readouterr().out


@pytest.mark.parametrize(("page", "block"), fenced("python"), ids=lambda text: text[:20].split()[0])
def test_the_python_runs(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(block, page, "exec"), names)
    out = capsys.readouterr().out
    assert "report" not in names or len(names["report"].layers) == 2
    for path in tmp_path.glob("*.safetensors"):  # the size that `save_packed` told
        assert f"{path.stat().st_size}" in out.replace(",", "")


TUTORIAL = TEXTS["tutorial.md"]
OPTIONS = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \|.*\|$", TUTORIAL, re.MULTILINE)


@pytest.mark.parametrize("flags", OPTIONS)
def test_the_options_by_purpose_act_together_on_both_tracks(flags: str) -> None:
    assert len(OPTIONS) == 6
    assert (
        build_config(build_parser().parse_args(shlex.split(flags))) != build_config(build_parser().parse_args([]))
        or "--run_dir" in flags
    )
    build_settings(build_vit_parser().parse_args(shlex.split(flags)))


def test_the_places_are_those_of_the_cache_flag() -> None:
    (flag,) = (action for action in build_parser()._actions if "--cache" in action.option_strings)
    assert set(re.findall(r"^\| `(\w+)` \|", TEXTS["long_runs.md"], re.MULTILINE)) == set(flag.choices or ())


def test_every_flag_named_exists() -> None:
    tools = build_inspect_parser, build_export_parser, build_report_parser, build_compare_parser
    builders = build_parser, build_vit_parser, *tools
    parsers = [build() for build in builders]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", EVERYTHING))
    unknown = {flag for flag in named if not any(parser.accepts(flag) for parser in parsers)}
    assert len(named) > 15 and unknown == {"--nproc-per-node", "--no-index", "--find-links"}  # of torchrun and pip


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^[A-Z]+$|@@\w+@@", EVERYTHING, re.MULTILINE) == []
