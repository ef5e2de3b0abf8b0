import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from features import contents, to_first_format
from rotten import encode, pixels, write_good

import packvit
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder import layout, swapping
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_manifest, write_manifest
from packvit.corpus.folder.stores import Folder
from packvit.corpus.folder.swapping import MARK, new_of, old_of
from packvit.corpus.job import embed
from packvit.corpus.progress import Progress, Summary
from packvit.encoder import Encoder

INPUTS, ROWS = 14, 4


@pytest.fixture(scope="module")
def invariant(checkpoint: Path) -> Encoder:
    return packvit.load(checkpoint, device="cpu", invariant=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_good(folder, INPUTS)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def job(photos: Path, out: Path, encoder: Encoder, **options: Any) -> Summary:
    options = {"rows_per_part": ROWS, "workers": 1, "format": "npy", **options}
    return embed(photos, out=out, model=encoder, **options)


def later(photos: Path) -> None:
    """Add a photograph, remove one, rename one, edit one, and mend the broken one."""
    names = sorted(path.name for path in photos.glob("good*"))
    (photos / names[4]).unlink()
    (photos / names[6]).rename(photos / "aaa.jpg")
    for name, seed in (("new.jpg", 60), (names[2], 61), ("broken.jpg", 62)):
        (photos / name).write_bytes(encode(pixels(40, 60, seed), "PNG"))


@pytest.fixture
def out(tmp_path: Path, photos: Path, invariant: Encoder) -> Path:
    """A folder whose photographs have changed since."""
    job(photos, tmp_path / "out", invariant)
    later(photos)
    return tmp_path / "out"


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "two renames"])
def test_an_updated_folder_has_the_bytes_of_a_fresh_one(
    tmp_path: Path,
    photos: Path,
    out: Path,
    invariant: Encoder,
    exchanged: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if not exchanged:
        monkeypatch.setattr(swapping, "CANNOT", (errno.ENOENT, *swapping.CANNOT))
        monkeypatch.setattr(swapping, "RENAME_EXCHANGE", 1 << 10)  # a flag that no kernel knows
    job(photos, tmp_path / "fresh", invariant)
    summary = embed(
        photos, out=out, model=invariant, workers=1, update=True
    )  # parts and exports stay what they were
    assert contents(out) == contents(tmp_path / "fresh")
    assert (summary.folder, summary.rows, summary.reused) == (str(out), INPUTS + 1, INPUTS - 2)
    assert not check_folder(out).faults
    assert beside(out) == []
    job(photos, out, invariant, update=True)
    assert contents(out) == contents(tmp_path / "fresh")


def test_update_begins_a_folder_that_is_not_there_and_takes_one_of_the_first_format(
    tmp_path: Path, photos: Path, invariant: Encoder
):
    job(photos, tmp_path / "out", invariant, update=True)
    job(photos, tmp_path / "fresh", invariant)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    first = to_first_format(shutil.copytree(tmp_path / "out", tmp_path / "first"))
    assert job(photos, first, invariant, update=True).reused == INPUTS
    assert contents(first) == contents(tmp_path / "fresh")


def test_an_update_that_is_stopped_leaves_the_old_folder_and_goes_on_where_it_was(
    tmp_path: Path, photos: Path, out: Path, invariant: Encoder
):
    job(photos, tmp_path / "fresh", invariant)
    before = contents(out)

    def stop(progress: Progress) -> None:
        if progress.committed >= 2 * ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(photos, out, invariant, update=True, progress=stop)
    assert contents(out) == before
    assert len(packvit.read(out)) == INPUTS + 1
    assert beside(out) == [".out.update"]
    assert job(photos, out, invariant, update=True).kept_rows >= 2 * ROWS
    assert contents(out) == contents(tmp_path / "fresh")
    assert beside(out) == []


def test_a_begun_update_of_photographs_that_have_changed_again_starts_over(
    tmp_path: Path, photos: Path, out: Path, invariant: Encoder
):
    def stop(progress: Progress) -> None:
        if progress.committed >= ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(photos, out, invariant, update=True, progress=stop)
    (photos / "newer.jpg").write_bytes(encode(pixels(30, 50, 70), "PNG"))
    job(photos, tmp_path / "fresh", invariant)
    assert job(photos, out, invariant, update=True).kept_rows == 0
    assert contents(out) == contents(tmp_path / "fresh")


def leave_finished(out: Path) -> None:
    """Leave what a kill just before the swap leaves."""
    shutil.copytree(out, new_of(out))
    (new_of(out) / MARK).touch()


def leave_swapped(out: Path) -> None:
    """Leave what a kill just after the swap leaves: the old folder beside the new one."""
    shutil.copytree(out, new_of(out))
    (out / MARK).touch()


def leave_missing(out: Path) -> None:
    """Leave what a kill between the two renames leaves."""
    leave_finished(out)
    out.rename(old_of(out))


@pytest.mark.parametrize("leave", [leave_finished, leave_swapped, leave_missing])
@pytest.mark.parametrize("command", ["update", "embed", "read", "check"])
def test_the_next_command_finishes_what_a_kill_left_and_loses_no_change(
    tmp_path: Path,
    photos: Path,
    invariant: Encoder,
    leave: Callable[[Path], None],
    command: str,
):
    out = tmp_path / "out"
    job(photos, out, invariant)
    before = contents(out)
    leave(out)
    if command == "update":  # of a file edited under its name, which the listing does not show
        name = min(path.name for path in photos.glob("good*"))
        (photos / name).write_bytes(encode(pixels(40, 60, 61), "PNG"))
        job(photos, out, invariant, update=True)
        job(photos, tmp_path / "fresh", invariant)
        assert contents(out) == contents(tmp_path / "fresh")
    elif command == "embed":
        job(photos, out, invariant)
        assert contents(out) == before
    elif command == "read":
        assert len(packvit.read(out)) == INPUTS + 1
    else:
        assert not check_folder(out).faults
    if command == "update":
        assert beside(out) == []


def test_a_disk_that_fails_when_the_old_folder_is_removed_is_named_and_the_next_command_goes_on(
    out: Path, photos: Path, invariant: Encoder, monkeypatch: pytest.MonkeyPatch
):
    rmdir = Path.rmdir

    def fail(path: Path) -> None:
        if path == new_of(out) / "_exports":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        rmdir(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rmdir", fail)
        with pytest.raises(WriteError, match="Input/output error"):
            job(photos, out, invariant, update=True)
    assert beside(out) == [new_of(out).name]
    job(photos, out, invariant, update=True)
    assert beside(out) == []
    assert not check_folder(out).faults


def test_updates_that_would_lose_something_are_refused_and_change_nothing(
    tmp_path: Path, photos: Path, out: Path, invariant: Encoder
):
    job(photos, tmp_path / "shard", invariant, shard="1/2", format="parquet")
    before = contents(out)
    for options, said in (
        ({"max_patches": 16}, "max_patches: 1024 -> 16"),
        ({"overwrite": True}, "update cannot go with `overwrite` or `shard`"),
        ({"shard": "1/2", "format": "parquet"}, "update cannot go with `overwrite` or `shard`"),
    ):
        with pytest.raises(UsageError) as error:
            job(photos, out, invariant, update=True, **options)
        assert said in str(error.value)
        assert contents(out) == before
        assert beside(out) == []
    with pytest.raises(UsageError, match="it holds a shard alone"):
        job(photos, tmp_path / "shard", invariant, update=True)
    (out / "mine.txt").write_bytes(b"notes")
    with pytest.raises(UsageError, match=r"it holds mine\.txt and 0 other files"):
        job(photos, out, invariant, update=True)
    (out / "mine.txt").unlink()
    new_of(out).mkdir()
    (new_of(out) / "theirs.txt").write_bytes(b"notes")
    with pytest.raises(UsageError, match="is in the way of an update"):
        job(photos, out, invariant, update=True)
    assert (new_of(out) / "theirs.txt").exists()
    shutil.rmtree(new_of(out))
    with swapping.claim(out), pytest.raises(UsageError, match="Another job is writing to"):
        job(photos, out, invariant, update=True)
    manifest = read_manifest(out)
    assert manifest
    versions = {**manifest["versions"], "torch": "1.0"}
    write_manifest(out, manifest | {"versions": versions})
    with pytest.raises(UsageError, match="were written by other versions"):
        job(photos, out, invariant, update=True)


def test_an_update_that_another_command_swaps_in_first_is_not_swapped_for_nothing(
    tmp_path: Path, photos: Path, invariant: Encoder, monkeypatch: pytest.MonkeyPatch
):
    out, claim = tmp_path / "out", swapping.claim
    job(photos, out, invariant)
    leave_finished(out)
    before = contents(out)

    def late(folder: Path) -> AbstractContextManager[Folder]:
        monkeypatch.setattr(swapping, "claim", claim)
        with claim(out), claim(new_of(out)):
            swapping.put_in_place(out)
        return claim(folder)

    monkeypatch.setattr(swapping, "claim", late)
    with pytest.raises(KeyboardInterrupt), swapping.updating(out):
        raise KeyboardInterrupt
    assert contents(out) == before


def test_the_lock_of_a_folder_that_was_replaced_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, new, lock = tmp_path / "out", tmp_path / "new", fcntl.flock
    with layout.claim(out), layout.claim(new):
        pass

    def late(descriptor: int, how: int) -> None:  # an update comes before it
        assert swapping.exchange(new, out)
        shutil.rmtree(new)
        lock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(layout.fcntl, "flock", late)
        with pytest.raises(UsageError, match="Another job is writing to"), layout.claim(out):
            pass
    with layout.claim(out), pytest.raises(UsageError, match="Another job is"), layout.claim(out):
        pass


def test_unchanged_files_are_not_read_where_their_times_are_trusted(
    photos: Path, out: Path, invariant: Encoder
):
    for path in photos.iterdir():
        os.utime(path, (1e9, 1e9))
    job(photos, out, invariant, update=True, trust_mtime=True)
    name = min(path.name for path in photos.glob("good*"))
    size = (photos / name).stat().st_size
    (photos / name).write_bytes(bytes(size))
    os.utime(photos / name, (1e9, 1e9))
    assert job(photos, out, invariant, update=True, trust_mtime=True).errors == {}
    assert job(photos, out, invariant, update=True).errors == {"unidentified": 1}
