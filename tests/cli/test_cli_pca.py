import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rotten import pixels, write_good
from small_checkpoint import write_checkpoint

import packvit
from packvit import pictures
from packvit.cli import main

pytestmark = pytest.mark.usefixtures("swift")

NOTICE = 'No --model was given, so the small "tiny" model runs.'


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 5)
    return folder


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(main, ["pca", *(str(word) for word in argv)])


def test_the_command_draws_what_the_library_draws(tmp_path: Path, photos: Path, checkpoint: Path):
    encoder = packvit.load(checkpoint, device="cpu")
    paths = sorted(photos.iterdir())
    first = paths[0]
    for argv, expected in (
        ([], pictures.draw_pca(encoder, paths)),
        (
            ["--per-image", "--layer", "1"],
            pictures.draw_pca(encoder, paths, per_image=True, layer=1),
        ),
        (
            ["--background", "remove", "--overlay", "--max-patches", "30"],
            pictures.draw_pca(encoder, paths, background="remove", overlay=True, max_patches=30),
        ),
        (["--similar-to", f"{first}:1,2"], pictures.draw_similarity(encoder, paths, (0, 1, 2))),
    ):
        out = tmp_path / "out.png"
        result = invoke(photos, "--model", checkpoint, "--device", "cpu", "--out", out, *argv)
        assert (result.exit_code, result.stderr) == (0, "")
        width, height = expected.size
        assert result.stdout == f"{out}: 5 photographs, {width} x {height} pixels\n"
        with Image.open(out) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_neighbours_take_model_and_sizes_from_the_folder(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    features = tmp_path / "features"
    packvit.embed(photos, out=features, model=checkpoint, device="cpu", max_patches=9)
    query = sorted(photos.iterdir())[1]
    argv = (query, "--neighbours", features, "--count", 3, "--device", "cpu")
    result = invoke(*argv, "--root", photos, "--out", tmp_path / "near.webp")
    assert (result.exit_code, result.stderr) == (0, "")
    result = invoke(*argv, "--root", tmp_path, "--out", tmp_path / "near.jpg")
    assert result.exit_code == 0
    assert "3 of the neighbours, for example good-000" in result.stderr
    for name, kind in (("near.webp", "WEBP"), ("near.jpg", "JPEG")):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind
    other = write_checkpoint(tmp_path / "other", scale=3.0)
    result = invoke(*argv, "--model", other, "--out", tmp_path / "near.jpg")
    assert result.exit_code == 2
    assert "so they cannot be compared. Leave --model out" in result.stderr


def test_bad_photographs_are_named_and_left_out(tmp_path: Path, photos: Path, checkpoint: Path):
    bad = tmp_path / "bad\x1b[31m.jpg"
    bad.write_bytes(b"nothing")
    out, model = ("--out", tmp_path / "out.png"), ("--model", checkpoint)
    result = invoke(bad, tmp_path / "gone.jpg", *model, *out)
    assert result.exit_code == 1
    assert "None of the 2 photographs can be drawn" in result.stderr
    assert not (tmp_path / "out.png").exists()
    result = invoke(photos, bad, tmp_path / "gone.jpg", *model, *out)
    assert result.exit_code == 3
    assert f"{tmp_path}/bad\\x1b[31m.jpg: unidentified: these bytes are no image" in result.stderr
    assert f"{tmp_path}/gone.jpg: missing: there is no file at this path\n" in result.stderr
    assert ": 5 photographs, " in result.stdout


def test_features_that_are_no_numbers_are_an_error_too(tmp_path: Path, photos: Path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", scale=2e38)
    result = invoke(photos, "--model", checkpoint, "--out", tmp_path / "out.png")
    assert result.exit_code == 1
    assert result.stderr.count(": non_finite: its features hold NaN or infinity") == 5
    assert not (tmp_path / "out.png").exists()


def test_a_mistake_is_answered_in_a_sentence_and_exit_code_2(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    first = sorted(photos.iterdir())[0]
    before = first.read_bytes()
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    out, model = ("--out", tmp_path / "out.png"), ("--model", checkpoint)
    for argv, answer in (
        ((photos,), "Missing option '--out'"),
        ((photos, "--out", tmp_path / "out.txt"), "must end in .png, .jpg, .jpeg, .webp"),
        ((photos, "--out", tmp_path / "no" / "out.png"), "does not exist. Create it first"),
        ((photos, "--out", text), "exists and is not a picture. Choose another name"),
        ((photos, "--out", first), "which is one of the photographs. Choose another name"),
        ((photos, *out, "--similar-to", "cat"), "must be PHOTO:ROW,COLUMN"),
        ((checkpoint, *out), "No photographs were found"),
        ((photos, *out, "--similar-to", "cat.jpg:1,2"), "which is not one of the 5 photographs"),
        ((photos, *out, *model, "--similar-to", f"{first}:99,0"), "but row 99, column 0 was"),
        ((photos, *out, *model, "--layer", "9"), "layer 9, but this encoder has 3"),
        ((photos, *out, "--per-image", "--neighbours", photos), "--per-image cannot be combined"),
        ((photos, *out, "--neighbours", photos), "is not a feature folder"),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr.splitlines()[0]  # the answer comes first
    assert not (tmp_path / "out.png").exists()
    assert first.read_bytes() == before
    assert text.read_text() == "not a picture"


def test_the_same_command_gives_the_same_bytes_in_place_of_the_picture_before(
    tmp_path: Path, photos: Path
):
    argv = ["pca", photos, "--device", "cpu", "--out", "out.png"]
    command = [sys.executable, "-m", "packvit", *argv]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[0] == NOTICE
    drawn = (tmp_path / "out.png").read_bytes()
    assert invoke(*argv[1:-1], tmp_path / "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes() == drawn
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_stopped_command_leaves_nothing_behind(tmp_path: Path, checkpoint: Path):
    Image.fromarray(pixels(56, 70)).save(tmp_path / "a.png")
    code = (
        "import os, signal, sys\n"
        "from packvit.pictures import maps\n"
        "maps.fit = lambda tokens: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from packvit.cli import main; main()"
    )
    argv = ["pca", "a.png", "--model", checkpoint, "--out", "out.png"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (143, "")
    assert ran.stderr == "Stopped. Run the same command again to start over.\n"
    assert os.listdir(tmp_path) == ["a.png"]
