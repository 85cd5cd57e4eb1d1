"""The shell scripts, run for real beside a stub interpreter that writes down what it was asked to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logart.runs.results_file import append_row

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
# Logs its arguments, makes the .venv that `-m venv` asks for, and fails where $FAIL is among its arguments.
STUB = """#!{bash}
if [[ $1 == -c && $2 != *importlinter* ]]; then exit {old}; fi
if [[ $1 == */_active.py ]]; then [[ $2 == "{active}" ]]; exit; fi
echo "$*" >> "{log}"
if [[ "$*" == "-m venv"* ]]; then mkdir -p "${{!#}}/bin"; cp "{ready}" "${{!#}}/bin/python"; fi
if [[ -n "${{FAIL:-}}" && "$*" == *"$FAIL"* ]]; then exit 3; fi
"""
HELP = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[2], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "mkdir")


class Project:
    """A copy of the scripts in a folder of its own, with stubs for every interpreter on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.elsewhere = folder / "a project", folder / "bin", folder / "elsewhere"
        self.log = folder / "log"
        self.log.touch()
        for path in (self.root, self.bin, self.elsewhere):
            path.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.interpreter("ready")

    def interpreter(self, name: str, old: bool = False, active: str = "no extras") -> None:
        """Put an interpreter on PATH; an old one fails the question for its version.

        Args:
            active: the extras that it has the project with.
        """
        stub = self.bin / name
        stub.write_text(
            STUB.format(bash=self.bin / "bash", log=self.log, old=int(old), active=active, ready=self.bin / "ready")
        )
        stub.chmod(0o755)

    def run(self, script: str, *args: str, fail: str = "") -> subprocess.CompletedProcess[str]:
        """Run a script from a foreign folder."""
        command = [str(self.bin / "bash"), str(self.root / script), *args]
        env = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", ""), "FAIL": fail}
        return subprocess.run(command, cwd=self.elsewhere, env=env, capture_output=True, text=True)

    def calls(self) -> list[str]:
        """What the interpreters were asked since the last look."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.interpreter("python3")
    return made


def installs(calls: list[str]) -> list[str]:
    return [call.split()[-1] for call in calls if call.startswith("-m pip install")]


def test_there_are_scripts_and_each_one_parses() -> None:
    known = {"_venv.sh", "demo.sh", "test.sh", "test_oldest.sh", "ablation_cnn.sh", "ablation_vit.sh"}
    known |= {"test_browser.sh", "run"}
    assert known <= {script.name for script in SCRIPTS}
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        if script.name != "_venv.sh":
            assert "\nset -euo pipefail\n" in script.read_text(), script


def test_ci_runs_exactly_the_test_script(project: Project) -> None:
    (project.root / "scripts" / "test.sh").write_text('echo "tests in $PWD with $# arguments"; exit 4\n')
    done = project.run(".ci/run")
    assert done.stdout == f"tests in {project.root} with 0 arguments\n"
    assert done.returncode == 4
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[:4] == ["#!/usr/bin/env bash", "set -euo pipefail", lines[2], "bash scripts/test.sh"]
    assert "    bash scripts/test_rtl.sh" in lines[4:]


def test_demo_on_an_empty_machine_makes_installs_and_runs(project: Project) -> None:
    done = project.run("scripts/demo.sh", "--seed", "3", "two words")
    assert done.returncode == 0, done.stderr
    venv, pip, install, demo = project.calls()
    assert venv == f"-m venv --clear {project.root}/.venv"
    assert pip == "-m pip --version"
    assert install.startswith("-m pip install --quiet") and install.endswith(" -e .")
    assert demo == f"{project.root}/scripts/demo.py --seed 3 two words"


@pytest.mark.parametrize(
    ("script", "extras", "last"),
    [
        ("demo.sh", "", "demo.py --quiet"),
        ("ablation_vit.sh", "", "ablation.py vit --quiet"),
        ("test.sh", "test,report,docs", "-m pytest -q -n 2 --dist worksteal --quiet"),
    ],
)
def test_an_active_environment_that_has_all_is_used(project: Project, script: str, extras: str, last: str) -> None:
    project.interpreter("python", active=extras)
    done = project.run(f"scripts/{script}", "--quiet")
    calls = project.calls()
    assert done.returncode == 0 and calls[-1].endswith(last) and installs(calls) == []
    assert not (project.root / ".venv").exists()
    project.interpreter("python", active="others")
    project.run(f"scripts/{script}")
    assert len(installs(project.calls())) == 1


@pytest.mark.parametrize("extras", ["", "report", "test,report,docs"])
def test_an_environment_is_enough_if_the_project_is_there_with_its_extras(
    extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = runpy.run_path(str(ROOT / "scripts" / "_active.py"))["ready"]
    known = {"torch", "filelock", "matplotlib"}
    needed = ["torch>=2.6", "filelock", 'matplotlib; extra == "report"', 'pytest ; extra == "test"']
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)

    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    assert ready(set(extras.split(","))) == ("test" not in extras)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "logart" else name)
    assert not ready(set(extras.split(",")))


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.suffix == ".sh" and path.name[0] != "_"])
def test_help_installs_nothing(project: Project, script: str, word: str) -> None:
    done = project.run(f"scripts/{script}", word)
    calls = project.calls()
    assert done.returncode == 0, done.stderr
    assert not (project.root / ".venv").exists() and not any("pip" in call or "venv" in call for call in calls)
    if calls:
        assert word in calls[-1].split()
    else:
        assert "arguments go on to pytest" in " ".join(done.stdout.split())


def test_help_needs_nothing_but_python_s_own_library() -> None:
    for script in ("demo.py", "ablation.py"):
        command = [sys.executable, "-I", "-S", "-c", HELP, str(ROOT), str(ROOT / "scripts" / script)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_a_second_call_makes_no_pip_call(project: Project) -> None:
    project.run("scripts/demo.sh")
    project.calls()
    done = project.run("scripts/demo.sh", "--quiet")
    assert project.calls() == [f"{project.root}/scripts/demo.py --quiet"]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_pyproject_and_a_moved_project_are_installed_anew(project: Project) -> None:
    project.run("scripts/demo.sh")
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    project.calls()
    project.run("scripts/demo.sh")
    assert installs(project.calls()) == ["."]
    project.root = project.root.rename(project.root.with_name("moved"))
    project.run("scripts/demo.sh")
    assert installs(project.calls()) == ["."]


def test_demo_and_test_by_turns_install_once_each(project: Project) -> None:
    project.run("scripts/demo.sh")
    project.run("scripts/test.sh")
    assert installs(project.calls()) == [".", ".[test,report,docs]"]
    project.run("scripts/demo.sh")
    project.run("scripts/test.sh")
    assert installs(project.calls()) == []


def test_a_failed_install_ends_the_script_and_is_tried_again(project: Project) -> None:
    assert project.run("scripts/demo.sh", fail="pip install").returncode != 0
    assert "demo.py" not in "".join(project.calls())
    assert project.run("scripts/demo.sh").returncode == 0
    assert installs(project.calls()) == ["."]


def test_an_interpreter_without_pip_gets_one(project: Project) -> None:
    project.run("scripts/demo.sh", fail="pip --version")
    assert "-m ensurepip --upgrade" in project.calls()


def test_a_dangling_interpreter_is_made_anew(project: Project) -> None:
    project.run("scripts/demo.sh")
    project.calls()
    python = project.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("nowhere")
    project.run("scripts/demo.sh")
    assert project.calls()[0].startswith("-m venv --clear")


def test_the_demo_s_failure_is_the_script_s(project: Project) -> None:
    assert project.run("scripts/demo.sh", fail="demo.py").returncode == 3


@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_the_ablation_scripts_make_sure_of_the_environment_and_hand_all_on(project: Project, track: str) -> None:
    done = project.run(f"scripts/ablation_{track}.sh", "DATA", "a net")
    assert done.returncode == 0, done.stderr
    calls = project.calls()
    assert installs(calls) == ["."] and calls[-1] == f"{project.root}/scripts/ablation.py {track} DATA a net"
    assert project.run(f"scripts/ablation_{track}.sh", fail="ablation.py").returncode == 3


class Demo:
    """demo.py beside a stand-in for the commands that it runs, of which each adds a row to the results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int = -1) -> None:
        self.calls: list[list[str]] = []
        self.failing = failing
        monkeypatch.setattr("logart.runs.process.run_in_subprocess", self.ran)
        self.main = runpy.run_path(str(ROOT / "scripts" / "demo.py"))["main"]

    def ran(self, words: list[str], *also: str) -> int:
        self.calls.append(words)
        if len(self.calls) == self.failing + 1:
            return 3
        results = words[words.index("--results") + 1]
        row = {"arch": f"network {len(self.calls)}", "bits": 4, "scale_method": "dynamic", "preset": words[2]}
        append_row(results, row | {"float_Acc@1": 100, "Acc@1": 90 + len(self.calls), "rounding": "learned"})
        return 0


RUNS = [
    [f"logart_{track}.main", "--preset", *preset]
    for track in ("cnn", "vit")
    for preset in (["fast"], ["paper", "--iters_w", "5"])
]


def test_the_demo_runs_both_tracks_by_both_presets_and_shows_them_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, results = Demo(monkeypatch), str(tmp_path / "results.csv")
    append_row(results, {"arch": "of another run", "Acc@1": 1})
    assert demo.main(["--iters_w", "5", "--results", results, "--seed", "3", "--quiet"]) == 0
    assert demo.calls == [[*run, "--results", results, "--seed", "3", "--quiet"] for run in RUNS]
    *_, head, first, second, third, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["network", "bits", "method"]
    for number, line in enumerate((first, second, third, last)):
        assert line.split()[:5] == ["network", str(number + 1), "4", "preset", RUNS[number][2]]
        assert line.split()[-2:] == [f"{91 + number}.00", f"{9 - number}.00"]


@pytest.mark.parametrize("failing", range(4))
def test_the_failure_of_a_command_ends_the_demo_and_is_its_own(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = Demo(monkeypatch, failing)
    assert demo.main(["--iters_w", "5", "--results", str(tmp_path / "results.csv")]) == 3
    assert len(demo.calls) == failing + 1 and "side by side" not in capsys.readouterr().out


IMPORT_RULES = "-c from importlinter.cli import lint_imports_command; lint_imports_command() --no-logo"


@pytest.mark.parametrize("failing", [0, 1, 2, 3, 4, None])
def test_lint_types_imports_and_tests_run_in_order_until_one_fails(project: Project, failing: int | None) -> None:
    site = "-m mkdocs build --strict --quiet --site-dir build/site"
    steps = ["-m ruff check .", "-m mypy", IMPORT_RULES, site, "-m pytest -q -n 2 --dist worksteal -k two words"]
    project.run("scripts/demo.sh")
    fail = "" if failing is None else steps[failing]
    done = project.run("scripts/test.sh", "-k", "two words", fail=fail)
    ran = [call for call in project.calls() if call.split()[1] in ("ruff", "mypy", "from", "mkdocs", "pytest")]
    assert ran == (steps if failing is None else steps[: failing + 1])
    assert (done.returncode == 0) == (failing is None)


def test_the_oldest_releases_are_tested_in_an_environment_of_their_own(project: Project) -> None:
    done = project.run("scripts/test_oldest.sh", "-k", "two words")
    assert done.returncode == 0, done.stderr
    venv, pip, install, tests = project.calls()
    assert venv == f"-m venv --clear {project.root}/.venv-oldest"
    assert install.endswith(" -e .[test] timm==1.0.3 torch==2.6.0 torchvision==0.21.0")
    assert tests == "-m pytest -q tests/logart_vit tests/logart_cnn tests/logart -k two words"
    assert (project.root / ".venv-oldest" / "bin" / "python").exists() and not (project.root / ".venv").exists()
    project.run("scripts/test_oldest.sh")
    assert project.calls() == ["-m pytest -q tests/logart_vit tests/logart_cnn tests/logart"]
    assert project.run("scripts/test_oldest.sh", fail="pytest").returncode == 3


def test_the_browser_is_tested_in_an_environment_of_its_own(project: Project) -> None:
    done = project.run("scripts/test_browser.sh", "-k", "two words", fail="playwright install")
    assert done.returncode == 0, done.stderr
    venv, _, install, browser, tests = project.calls()
    assert venv == f"-m venv --clear {project.root}/.venv-browser"
    assert install.endswith(" -e .[test,report] playwright")
    assert browser == "-m playwright install chromium" and "trying an installed one" in done.stderr
    assert tests == "-m pytest -q -m browser tests/logart/report/test_report_browser.py -k two words"
    assert project.run("scripts/test_browser.sh", fail="pytest").returncode == 3


def test_the_oldest_releases_named_are_the_floors_of_the_project() -> None:
    floors = re.findall(r'"(timm|torch|torchvision)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    script = (ROOT / "scripts" / "test_oldest.sh").read_text()
    assert len(floors) == 3
    for name, floor in floors:
        (tested,) = re.findall(rf" {name}==(\S+)", script)
        assert tested.startswith(f"{floor}.")


def test_another_release_is_installed_anew(project: Project) -> None:
    script = project.root / "scripts" / "test_oldest.sh"
    project.run("scripts/test_oldest.sh")
    script.write_text(script.read_text().replace("timm==1.0.3", "timm==1.0.7"))
    project.calls()
    project.run("scripts/test_oldest.sh")
    (install,) = (call for call in project.calls() if call.startswith("-m pip install"))
    assert " timm==1.0.7 " in install


def test_the_oldest_python_comes_with_the_oldest_releases(project: Project) -> None:
    for name in ("python3.10", "python3.12"):
        project.interpreter(name)
    assert "with python3\n" in project.run("scripts/demo.sh").stdout
    assert "with python3.10\n" in project.run("scripts/test_oldest.sh").stdout


def test_an_old_python3_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.interpreter("python3", old=True)
    project.interpreter("python3.12")
    done = project.run("scripts/demo.sh")
    assert done.returncode == 0 and "with python3.12" in done.stdout


def test_without_a_new_enough_python_one_line_says_so(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.interpreter("python3", old=True)
    done = project.run("scripts/demo.sh")
    assert done.returncode != 0 and project.calls() == []
    assert done.stderr.count("\n") == 1 and "3.10" in done.stderr
