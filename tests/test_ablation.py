"""The ablation: which commands it runs, what it does about rows that are there, held by others, or failing."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from small_runs import rows

from logart_cnn.command import build_config, build_parser
from logart_vit.command import build_parser as build_vit_parser
from logart_vit.command import build_settings

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "ablation.py"
GRIDS = [
    ("log_2", None),
    ("log_sqrt2", None),
    ("dynamic", "tensor_wise"),
    ("dynamic", "layer_wise"),
    ("dynamic", "block_wise"),
]
# Little work in each row, and rows that differ in nothing else from the sweep's own.
SMALL = {
    "EXTRA": "--workers 0 --quiet", "EXTRA_LLR": "--calib_samples 64", "ITERS": "2", "DEVICE": "cpu",
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module
    spec.loader.exec_module(module)
    return module


def start(folder: Path, *words: str, program: tuple[str, ...] = (sys.executable,), **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **SMALL, **env}
    command = [*program, *(words or (str(SCRIPT), "cnn"))]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def settings(results: Path) -> list[tuple[str, str, str]]:
    return [(row["scale_method"], row["search_method"], row["rounding"]) for row in rows(results)]


ALL_TEN = sorted((grid, by or "", how) for grid, by in GRIDS for how in ("nearest", "learned"))


@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_the_ten_rows_are_the_paper_s(ablation: ModuleType, track: str) -> None:
    env = {"BITS": "4 3", "SEEDS": "0 1", "ITERS": "7", "RESULTS": "r.csv", "EXTRA": "--model-kwargs 'a=b c'"}
    made = ablation.sweep(track, "DATA", ["net", "other"], env | {"EXTRA_LLR": "--warmup 0.1"}, "cpu")
    assert len(made) == 10 * 2 * 2 * 2
    order = [(net, bits, seed) for net in ("net", "other") for bits in (4, 3) for seed in (0, 1)]
    for index, row in enumerate(made):
        net, bits, seed = order[index // 10]
        grid, by = GRIDS[index % 10 // 2]
        assert row.words[0] == f"logart_{track}.main"
        if track == "cnn":
            args = build_parser().parse_args(row.words[1:])
            config, data, name = build_config(args), args.data_path, args.arch
        else:
            args = build_vit_parser().parse_args(row.words[1:])
            (config, _), data, name = build_settings(args), args.dataset, args.model
        assert (data, name, config.n_bits, config.seed) == ("DATA", net, bits, seed)
        assert (args.device, args.results, args.once, args.model_kwargs) == ("cpu", "r.csv", True, ["a=b c"])
        assert config.channel_wise and config.scale_method == grid and config.learns == bool(index % 2)
        assert by is None or (config.search_method.value, config.search_samples) == (by, 32)
        assert not config.learns or (config.iters, config.calib_samples, config.warmup) == (7, 1024, 0.1)
        assert config.method.uses_dbs and config.first_last_bits is None


def test_left_to_itself_it_is_the_built_in_network_at_four_bits(ablation: ModuleType) -> None:
    for track, net in (("cnn", "digits_resnet"), ("vit", "digits_vit")):
        titles = [row.title for row in ablation.sweep(track, "digits", [], {}, "auto")]
        assert titles[0] == f"{net}, 4 bits, seed 0: base 2" and titles[-1] == titles[0][:-6] + "dynamic, BW, LLR"
        assert len(titles) == 10 and not any("--iters_w" in r.words for r in ablation.sweep(track, "d", [], {}, ""))


@pytest.mark.parametrize(
    ("words", "env", "line"),
    [
        (["gnn"], {}, "ablation: track: invalid choice: 'gnn'"),
        ([], {}, "ablation: the following arguments are required: track"),
        (["cnn"], {"BITS": "4,3"}, "ablation: BITS: '4,3'; expected numbers with spaces between"),
        (["cnn"], {"SEEDS": "-1"}, "ablation: SEEDS: '-1'"),
        (["vit"], {"ITERS": "many"}, "ablation: ITERS: 'many'"),
        (["vit"], {"ITERS": "1 2"}, "ablation: ITERS: '1 2'; expected one number"),
        (["vit"], {"EXTRA": "'"}, 'ablation: EXTRA: "\'" (No closing quotation)'),
    ],
)
def test_wrong_calls(
    ablation: ModuleType, words: list[str], env: dict[str, str], line: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ablation, "run_row", None)
    with pytest.raises(SystemExit) as stopped:
        ablation.main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(line) and err.count("\n") == 1


class Rows:
    """Stands in for the processes: gives each row the exit codes listed for it, then 0."""

    def __init__(self, **codes: list[int]) -> None:
        self.codes, self.ran = codes, ""

    def __call__(self, words: list[str]) -> int:
        self.ran += words[0]
        return self.codes[words[0]].pop(0) if self.codes.get(words[0]) else 0


def run_stubbed(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, stub: Rows, wait: bool = False) -> list[str]:
    monkeypatch.setattr(ablation, "run_row", stub)
    monkeypatch.setattr(ablation, "WAIT_SECONDS", 0)
    both = ablation.run_all([ablation.Row(name, [name]) for name in "abcd"], Path("nowhere"), wait)
    return ["".join(row.title for row in part) for part in both]


def test_failing_rows_are_told_and_the_others_run(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Rows(b=[1], d=[-9])
    assert run_stubbed(ablation, monkeypatch, stub) == ["bd", ""] and stub.ran == "abcd"


def test_a_first_row_that_is_refused_ends_the_sweep(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Rows(a=[2])
    with pytest.raises(ablation.Refused):
        run_stubbed(ablation, monkeypatch, stub)
    assert stub.ran == "a"
    stub = Rows(b=[2])
    assert run_stubbed(ablation, monkeypatch, stub) == ["b", ""] and stub.ran == "abcd"


def test_rows_of_others_are_looked_at_again_while_that_brings_anything(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Rows(a=[75, 75, 75, 75], c=[75])
    assert run_stubbed(ablation, monkeypatch, stub) == ["", "a"] and stub.ran == "abcd" + "ac" + "a"
    stub = Rows(a=[75, 75, 75, 1])
    assert run_stubbed(ablation, monkeypatch, stub, wait=True) == ["a", ""] and stub.ran == "abcd" + "a" * 3


def test_workers_begin_at_different_rows_and_leave_none_out(ablation: ModuleType) -> None:
    rows_of = [ablation.Row(str(i), []) for i in range(10)]
    assert ablation.own_order(rows_of, {}) == rows_of
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        orders = [ablation.own_order(rows_of, {rank: str(i), count: "3"}) for i in (0, 1, 2, 5)]
        assert [order[0].title for order in orders] == ["0", "3", "6", "6"]
        assert all(sorted(order) == rows_of for order in orders)


def test_under_torchrun_each_worker_takes_its_own_gpu(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, asked, device in [(True, "auto", "cuda:1"), (True, "cuda:0", "cuda:0"), (False, "auto", "auto")]:
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert ablation.worker_device({"LOCAL_RANK": "1", "DEVICE": asked}) == device
        assert ablation.worker_device({"DEVICE": asked}) == asked and ablation.worker_device({}) == "auto"


@pytest.mark.slow
def test_a_sweep_is_interrupted_goes_on_and_is_shared_by_three(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    first = start(tmp_path)
    while not results.exists() or len(rows(results)) < 2:
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM, out
    done = len(rows(results))
    assert 2 <= done < 10
    workers = [start(tmp_path, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    texts = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], texts
    assert sorted(settings(results)) == ALL_TEN  # the first rows too are done once
    assert not (tmp_path / "results.csv.claims").exists()
    before = results.read_bytes()
    last = start(tmp_path)
    out, _ = last.communicate()
    assert last.returncode == 0 and out.count("has this row already") == 10 and results.read_bytes() == before
    assert re.search(r"^10 of 10 rows are in results.csv \(\d+ s\)$", out, re.MULTILINE)


def test_torchrun_s_workers_divide_the_rows(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    process = start(tmp_path, "--nproc-per-node", "2", str(SCRIPT), "vit", program=torchrun,
                    EXTRA="--num_workers 0 --quiet", EXTRA_LLR="--optim_size 32")  # fmt: skip
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert sorted(settings(tmp_path / "results.csv")) == ALL_TEN
    assert "others are at" not in out and out.count("10 of 10 rows are in results.csv") == 2


def test_the_slurm_script_s_body_runs_a_worker(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    (project / "scripts" / "ablation_vit.sh").write_text('echo "$SLURM_ARRAY_TASK_ID" "$PWD" "$@"\n')
    script = str(ROOT / "scripts" / "ablation.slurm")
    subprocess.run(["bash", "-n", script], check=True)

    def body(*words: str, **env: str) -> tuple[int, str]:
        process = start(tmp_path, script, *words, program=("bash",), SLURM_ARRAY_TASK_ID="1", **env)
        out, _ = process.communicate()
        return process.returncode, out

    code, out = body("vit", "DATA", SLURM_SUBMIT_DIR=str(project))
    line = f"no .venv in {project}, and no active environment with logart; make one with: bash scripts/demo.sh\n"
    assert (code, out) == (2, line)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    code, out = body("vit", "DATA", "two words", SLURM_SUBMIT_DIR=str(project))
    assert (code, out) == (0, f"1 {project} DATA two words\n")
    for words, env in (((), {"SLURM_SUBMIT_DIR": str(project)}), (("vit",), {"SLURM_SUBMIT_DIR": ""})):
        code, out = body(*words, **env)
        assert code != 0 and out.count("\n") == 1


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, EXTRA="--nonsense")
    out, _ = process.communicate()
    *_, line = out.splitlines()
    assert process.returncode == 2 and line == "logart-cnn: unrecognized arguments: --nonsense", out
    assert len(out.splitlines()) == 3 and out.startswith("[1/10] ")  # no other row was tried
