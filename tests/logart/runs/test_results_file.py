"""results.csv: whole rows only, one header only, and an error before anything is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from small_runs import disk_with

import logart.runs.results_file
from logart.errors import UserError
from logart.runs.claims import claims_folder
from logart.runs.columns import NAMES
from logart.runs.results_file import append_row, check_results, locked_results, read_table

HEADER = ",".join(NAMES) + "\n"
APPEND_50 = """
import sys
from logart.runs import results_file

path, writer = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for index in range(50):
    row = {"arch": f"{writer}-{index}", "config": f'{index},"' * 40, "project_version": writer}
    results_file.append_row(path, row)
"""
Refused = Callable[[Path], None]


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(params=["check", "append"])
def refused(request: pytest.FixtureRequest) -> Refused:
    """Both ways into the file, which must refuse the same things."""
    if request.param == "check":
        return check_results
    return lambda path: append_row(path, {"arch": "a"})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, which an append may leave behind."""
    files = (file for file in folder.iterdir() if file.is_file() and file.suffix != ".lock")
    return {file.name: file.read_bytes() for file in files}


def assert_refused(action: Refused, path: Path, *fragments: str) -> None:
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        action(path)
    message = str(caught.value)
    assert message.startswith("--results: ") and "\n" not in message
    for fragment in (str(folder), *fragments):
        assert fragment in message
    assert contents(folder) == before


def test_rows_come_back_with_missing_columns_empty(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_row(path, {"Acc@1": np.float64(91.25), "arch": "digits", "channel_wise": True, "seed": None})
    append_row(path, {"iters_w": 0, "Acc@1": 1 / 3, "checkpoint": Path("w.pth")})
    assert path.read_bytes().startswith(HEADER.encode()) and path.read_bytes().count(b"\n") == 3
    table = read(path)
    assert tuple(table.columns) == NAMES
    first, second = ({k: v for k, v in row.items() if v} for row in table.to_dict("records"))
    assert first == {"Acc@1": "91.25", "arch": "digits", "channel_wise": "True"}
    assert second == {"iters_w": "0", "Acc@1": repr(1 / 3), "checkpoint": "w.pth"}


@pytest.mark.parametrize("value", ["a,b", 'a"b"', "a\nb", "a\r\nb", "a\rb", "\n", '",\n"', " a ", "é√2", "'", "None"])
def test_every_text_comes_back_as_it_was(tmp_path: Path, value: str) -> None:
    path = tmp_path / "results.csv"
    append_row(path, {"checkpoint": value, "project_version": value})
    append_row(path, {"arch": "next"})
    table = read(path)
    assert list(table["checkpoint"]) == [value, ""]
    assert list(table["project_version"]) == [value, ""]
    assert list(table["arch"]) == ["", "next"]


def test_a_file_name_that_is_not_utf8_still_gives_a_row(tmp_path: Path) -> None:
    append_row(tmp_path / "results.csv", {"checkpoint": os.fsdecode(b"w\xff.pth")})
    assert read(tmp_path / "results.csv")["checkpoint"].tolist() == ["w\\udcff.pth"]


def test_an_unknown_column_is_our_mistake_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="acc1.*bitz"):
        append_row(tmp_path / "results.csv", {"bitz": 4, "arch": "a", "acc1": 3.0})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_gets_the_header(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.touch()
    check_results(path)
    append_row(path, {"arch": "a"})
    assert read(path)["arch"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (HEADER.replace("arch", "model").encode(), "has no column 'arch'"),
        (HEADER.replace("\n", ",bits\n").encode(), "two columns of one name"),
        (b"\n" + HEADER.encode(), "has no column 'utc_time'"),
        (b"\x80\x02\xff\x00", "has no column 'utc_time'"),
        (b"time,arch\n1,2\n", "has no column 'utc_time'"),
    ],
)
def test_another_file_is_refused(refused: Refused, tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    assert_refused(refused, path, fragment, "rename it or pass another path")


WHOLE = HEADER + "," * (len(NAMES) - 1) + "\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (WHOLE + "2026,cnn", 3),
        (WHOLE + "2026,cnn\n", 3),
        (WHOLE + "2026,cnn\n" + "," * (len(NAMES) - 1) + "\n", 3),
        (WHOLE + "," * (len(NAMES) - 1) + '"half a\n', 3),
        (WHOLE + "," * len(NAMES) + "\n", 3),
    ],
)
def test_a_cut_row_is_refused_with_its_line(refused: Refused, tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    assert_refused(refused, path, f"cut row at line {line}")


@pytest.mark.parametrize("content", [HEADER[:-1], WHOLE[:-1], WHOLE[:-1] + "0.1"])
def test_a_row_is_never_glued_to_a_last_line_without_an_end(refused: Refused, tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    assert_refused(refused, path, "no line end")


def test_a_file_saved_with_windows_line_ends_is_still_ours(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(WHOLE.replace("\n", "\r\n").encode())
    append_row(path, {"arch": "a"})
    assert read(path)["arch"].tolist() == ["", "a"]


OLDER = "utc_time,arch,note,track,bits,Acc@1\n" 't1,"a, b",mine,cnn,4,90.0\n' "t2,c,,vit,3,\n"


def test_an_older_file_is_extended_and_columns_of_one_s_own_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(OLDER)
    check_results(path)
    assert path.read_text() == OLDER
    append_row(path, {"arch": "new", "bits": 2, "zero_code": "True"})
    table = read(path)
    assert list(table.columns[:6]) == OLDER.splitlines()[0].split(",")
    assert set(table.columns) == {*NAMES, "note"} and len(table.columns) == len(NAMES) + 1
    first, second, third = ({k: v for k, v in row.items() if v} for row in table.to_dict("records"))
    assert first == {"utc_time": "t1", "arch": "a, b", "note": "mine", "track": "cnn", "bits": "4", "Acc@1": "90.0"}
    assert second == {"utc_time": "t2", "arch": "c", "track": "vit", "bits": "3"}
    assert third == {"arch": "new", "bits": "2", "zero_code": "True"}
    before = path.read_bytes()
    append_row(path, {"arch": "next"})  # by now it is appended to
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("cut", ["t3,c", "t3,c\n", "t3,c,,vit,3"])
def test_an_older_file_with_a_cut_row_is_refused(refused: Refused, tmp_path: Path, cut: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(OLDER + cut)
    assert_refused(refused, path, "cut row at line 4")


def test_a_disk_too_full_to_extend_an_older_file_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(OLDER)
    with disk_with(len(OLDER) + 10), pytest.raises(UserError, match="File too large"):
        append_row(path, {"arch": "b"})
    assert contents(tmp_path) == {"results.csv": OLDER.encode()}


def test_an_older_file_can_be_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(OLDER + 'cut,"\n')
    header, found = read_table(path)
    assert header == OLDER.splitlines()[0].split(",")
    assert found == [(2, ["t1", "a, b", "mine", "cnn", "4", "90.0"]), (3, ["t2", "c", "", "vit", "3", ""]),
                     (4, ['cut,"\n'])]  # fmt: skip


def test_a_file_saved_by_a_spreadsheet_is_still_ours(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(("\ufeff" + WHOLE).encode())  # with the mark that some begin UTF-8 with
    append_row(path, {"arch": "a"})
    assert read(path)["arch"].tolist() == ["", "a"] and path.read_text("utf-8-sig").startswith(HEADER)


def test_a_run_s_row_is_appended_once(tmp_path: Path) -> None:
    path, row = tmp_path / "results.csv", {"arch": "a", "run_id": "5-1"}
    assert append_row(path, row)
    before = path.read_bytes()
    assert not append_row(path, row | {"utc_time": "later"}) and path.read_bytes() == before
    assert append_row(path, row | {"run_id": "5-2"}) and append_row(path, {"arch": "a"}) and append_row(path, {})
    assert len(read(path)) == 4


def test_bad_places_are_refused(refused: Refused, tmp_path: Path) -> None:
    assert_refused(refused, tmp_path / "missing" / "results.csv", "no folder")
    assert not (tmp_path / "missing").exists()
    (tmp_path / "folder").mkdir()
    assert_refused(refused, tmp_path / "folder", "is a folder")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(refused, tmp_path / "pipe", "no regular file")
    (tmp_path / "file").touch()
    assert_refused(refused, tmp_path / "file" / "results.csv", "no folder")
    assert_refused(refused, tmp_path / ("x" * 252), "File name too long")  # only the lock's name is too long


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may write everywhere; anybody else is bound by the files' modes."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", ["folder of a new file", "folder", "old.csv", "old.csv.lock"])
def test_an_unwritable_place_is_refused(refused: Refused, closed: str) -> None:
    with tempfile.TemporaryDirectory() as made:  # unlike tmp_path, its parents are open to everybody
        folder = Path(made)
        names = ["old.csv", "old.csv.lock"] if closed.endswith(".lock") else ["old.csv"]
        for name in names:
            (folder / name).write_text(WHOLE if name == "old.csv" else "")
            (folder / name).chmod(0o444 if name == closed else 0o666)
        folder.chmod(0o555 if closed.startswith("folder") else 0o777)
        with without_rights():
            path = folder / ("new.csv" if "new" in closed else "old.csv")
            assert_refused(refused, path, "Permission denied")
        folder.chmod(0o755)


def test_a_lock_that_is_never_released_is_named(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logart.runs.results_file, "LOCK_SECONDS", 0.05)
    path = tmp_path / "results.csv"
    append_row(path, {"arch": "a"})
    with FileLock(str(path) + ".lock"):
        assert_refused(refused, path, "could not be acquired")


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    check_results(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text(WHOLE)
    check_results(path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    assert path.read_text() == WHOLE
    append_row(path, {"arch": "a"})
    written = path.read_bytes()
    check_results(path)
    assert path.read_bytes() == written


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_row(path, {"arch": "a"})
    before = path.read_bytes()
    with disk_with(len(before) + 10), pytest.raises(UserError, match="No space left"):
        append_row(path, {"arch": "b"})
    assert path.read_bytes() == before
    append_row(path, {"arch": "c"})
    assert read(path)["arch"].tolist() == ["a", "c"]


def test_eight_processes_at_once_lose_and_garble_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    command = [sys.executable, "-c", APPEND_50, str(path)]
    writers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(8)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 8
    table = read(path)
    assert path.read_text().count("utc_time") == 1
    for i in range(8):  # each writer's rows, all of them and in its order
        rows = table[table["project_version"] == str(i)]
        assert rows["arch"].tolist() == [f"{i}-{index}" for index in range(50)]
        assert rows["config"].tolist() == [f'{index},"' * 40 for index in range(50)]
    assert len(table) == 400


def test_the_module_alone_imports_neither_torch_nor_timm() -> None:
    check = "import sys, logart.runs.results_file; print(sorted({'torch', 'timm'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_a_link_and_the_file_behind_it_have_one_lock_and_one_place_for_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "elsewhere" / "link.csv"
    link.parent.mkdir()
    link.symlink_to(real)
    append_row(link, {"arch": "a"})
    append_row(real, {"arch": "b"})
    assert link.is_symlink() and list(pd.read_csv(real)["arch"]) == ["a", "b"]
    monkeypatch.setattr(logart.runs.results_file, "LOCK_SECONDS", 0.05)
    for held, other in ((link, real), (real, link)):
        with locked_results(held):
            assert {path.name for path in link.parent.iterdir()} == {"link.csv"}, "the lock lies beside the link"
            with pytest.raises(UserError):
                append_row(other, {"arch": "c"})
            with pytest.raises(UserError), locked_results(other):
                raise AssertionError("both hold it")
    check_results(link)
    assert {path.name for path in link.parent.iterdir()} == {"link.csv"} and len(pd.read_csv(real)) == 2
    assert claims_folder(link) == claims_folder(real)
