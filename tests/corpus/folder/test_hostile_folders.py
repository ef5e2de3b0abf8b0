"""Feature folders that someone else has made, or tampered with (S6): one sentence, and no hang."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rotten import write_good

import packvit
from packvit.cli import main
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.layout import read_manifest, write_manifest
from packvit.corpus.folder.names import CURRENT
from packvit.corpus.job import embed
from packvit.encoder import Encoder

MANIFEST, LOG = CURRENT.manifest, CURRENT.commits
PART = CURRENT.part(0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 3)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    embed(photos, out=out, model=encoder, format="npy")
    return out


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link(path: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside.name)


def change(**entries: Any) -> Callable[[Path], None]:
    """Return what changes a manifest and its checksum."""

    def act(out: Path) -> None:
        write_manifest(out, (read_manifest(out) or {}) | entries)

    return act


def nest(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_bytes(b"[" * 100_000 + b"\n")


RECORD = {"bytes": 1, "sha256": "0" * 64}
ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe as the manifest": (lambda out: to_pipe(out / MANIFEST), MANIFEST),
    "a link as the manifest": (lambda out: to_link(out / MANIFEST), MANIFEST),
    "a pipe as the log": (lambda out: to_pipe(out / LOG), "not a regular file"),
    "a link as the log": (lambda out: to_link(out / LOG), "it is a link"),
    "brackets as the manifest": (nest(MANIFEST), MANIFEST),
    "brackets as the log": (nest(LOG), LOG),
    "nested entries": (change(more=json.loads("[" * 300 + "]" * 300)), MANIFEST),
    "very many inputs": (change(inputs=10**12), "15,625,000,000 parts"),
    "inputs as text": (change(inputs="3"), "inputs"),
    "no rows in a part": (change(rows_per_part=0), "rows"),
    "an export outside": (change(exports={"../secret": RECORD}), "../secret"),
    "an export without size": (change(exports={CURRENT.pooled: {}}), CURRENT.pooled),
    "a part that is a link": (lambda out: to_link(out / PART), "it is a link"),
    "a part that is a pipe": (lambda out: to_pipe(out / PART), "not a regular file"),
    "data that is a link": (lambda out: to_link(out / "data"), "data is a link"),
    "a part of many digits": (
        lambda out: (out / LOG).write_text(
            (out / LOG).read_text().replace("part-00000", f"part-{'1' * 5000}")
        ),
        LOG,
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_check_answers_in_a_sentence(tmp_path: Path, whole: Path, name: str):
    """S6"""
    out = shutil.copytree(whole, tmp_path / "out")
    act, word = ATTACKS[name]
    act(out)
    shown = CliRunner().invoke(main, ["check", str(out)])
    assert shown.exit_code in (1, 2)
    assert isinstance(shown.exception, SystemExit)
    assert word in shown.output


@pytest.mark.parametrize("name", ATTACKS)
def test_embed_answers_in_a_sentence_or_does_its_work(
    tmp_path: Path, whole: Path, photos: Path, encoder: Encoder, name: str
):
    """S6"""
    out = shutil.copytree(whole, tmp_path / "out")
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    ATTACKS[name][0](out)
    try:
        summary = embed(photos, out=out, model=encoder)
    except (UsageError, WriteError):
        pass
    else:
        assert summary.ok == 3
        assert not (out / PART).is_symlink()
    assert secret.read_text() == "untouched"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, photos: Path, encoder: Encoder):
    """S6"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="could not be written"):
        embed(photos, out=tmp_path / "out", model=encoder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", [PART, CURRENT.pooled])
@pytest.mark.parametrize("replace", [to_pipe, to_link])
def test_what_is_read_from_a_folder_is_no_pipe_and_no_link(
    tmp_path: Path, whole: Path, name: str, replace: Callable[[Path], None]
):  # case S6
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert len(packvit.read(out).ids) == 3
    replace(out / name)
    with pytest.raises(UsageError, match=r"damaged"):
        packvit.read(out)


@pytest.mark.parametrize(
    "entries",
    [
        {"model": {}},
        {"revision": 5},
        {"preprocessing": None},
        {"positions": []},
        {"token_budget": 0},
    ],
)
def test_a_search_in_a_folder_that_does_not_say_how_to_embed_answers_in_a_sentence(
    tmp_path: Path, whole: Path, photos: Path, entries: dict[str, Any]
):
    """S6"""
    out = shutil.copytree(whole, tmp_path / "out")
    write_manifest(out, (read_manifest(out) or {}) | entries)
    shown = CliRunner().invoke(main, ["search", str(out), str(next(photos.iterdir()))])
    assert shown.exit_code == 2
    assert f"{MANIFEST} is missing or damaged" in shown.stderr


@pytest.mark.parametrize("name", ["revision", "weights_sha256"])
def test_a_search_in_a_folder_that_does_not_say_whose_features_it_has_answers_in_a_sentence(
    tmp_path: Path, whole: Path, photos: Path, name: str
):
    """S6"""
    out = shutil.copytree(whole, tmp_path / "out")
    manifest = read_manifest(out) or {}
    del manifest[name]
    write_manifest(out, manifest)
    shown = CliRunner().invoke(main, ["search", str(out), str(next(photos.iterdir()))])
    assert shown.exit_code == 2
    assert f"{MANIFEST} has no {name}, so the weights that wrote the features are" in shown.stderr


def test_vectors_of_another_width_than_the_manifest_says_are_damage(tmp_path: Path, whole: Path):
    """S6"""
    out = shutil.copytree(whole, tmp_path / "out")
    manifest = read_manifest(out) or {}
    wider = {**manifest["config"], "width": manifest["config"]["width"] + 1}
    write_manifest(out, manifest | {"config": wider, "exports": {}})
    with pytest.raises(UsageError, match=rf"{PART} is missing or damaged"):
        packvit.read(out)
