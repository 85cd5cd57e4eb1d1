"""Files are written whole, with the user's modes, and through links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from logart.files import real_place, write_atomically


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_file_has_the_mode_of_any_file_of_the_user(umask: int, mode: int, tmp_path: Path) -> None:
    path, there = tmp_path / "new", tmp_path / "there"
    there.touch(0o640)
    before = os.umask(umask)
    try:
        write_atomically(path, b"x")
        write_atomically(there, b"x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == there.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_a_file_written_through_a_link_leaves_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to(real)
    for data in (b"first", b"second"):
        write_atomically(link, data)
        assert link.is_symlink() and real.read_bytes() == data
    assert [path.name for path in real.parent.iterdir()] == ["real"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_only_a_link_has_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("there/file")  # which is not there yet
    assert real_place("link") == tmp_path / "there" / "file"
    assert real_place("file") == Path("file")  # as the user wrote it, for the messages
