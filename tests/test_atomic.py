import errno
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from full_disk import no_file_over

from packvit.atomic import rename_flushed, replacing, write_flushed, write_whole

PACKAGE = Path(__file__).parents[1] / "packvit"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the disk from now on, in order; it is done as well."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_replace(old: Path, new: Path) -> None:
        seen.append(("rename", new.name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return seen


def test_the_disk_has_every_file_before_the_first_name_and_the_names_last(
    tmp_path: Path, calls: list[tuple[str, str]]
):
    with replacing(tmp_path / "b", tmp_path / "a") as temporaries:
        for path in temporaries:
            path.write_bytes(b"new")
    names = [path.name for path in temporaries]
    flushed = [("fsync", name) for name in names]
    assert calls == [*flushed, ("rename", "b"), ("rename", "a"), ("fsync", tmp_path.name)]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_is_staged_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, calls: list[tuple[str, str]]
):
    write_flushed(tmp_path / "staged", b"new")
    rename_flushed(tmp_path / "staged", tmp_path / "a")
    assert calls == [("fsync", "staged"), ("rename", "a"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_mount_without_fsync_of_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    fsync = os.fsync

    def refuse(descriptor: int, *, only: Callable[[str], bool] = os.path.isdir) -> None:
        if only(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", partial(refuse, only=os.path.isfile))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        write_whole(tmp_path / "b", b"new")
    code = errno.EIO  # a fault of the disk
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        write_whole(tmp_path / "a", b"newer")


def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "a"
    write_whole(path, b"old")
    with no_file_over(100), pytest.raises(OSError, match="File too large"):
        write_whole(path, b"x" * 101)
    with no_file_over(100), pytest.raises(OSError, match="File too large"):
        write_flushed(tmp_path / "staged", b"x" * 101)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "a"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        stopped_half_way(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def stopped_half_way(path: Path) -> None:
    with replacing(path) as (temporary,):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt


def test_nothing_else_in_the_package_gives_a_file_its_name():
    """A hand-made temporary file and rename forget the fsync of the file, or of its folder."""
    renaming = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text() for word in ("os.replace(", "os.rename(", ".rename("))
    ]
    assert renaming == ["atomic.py"]
