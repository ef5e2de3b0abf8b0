"""The column of the space that images share with texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_towers
from PIL import Image
from small_checkpoint import write_checkpoint
from transformers import CLIPImageProcessorPil

import packvit
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.names import names_of
from packvit.encoder import Encoder

CLIP_IMAGES = CLIPImageProcessorPil(
    size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70}
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for place in range(5):
        pixels = draw.integers(0, 256, (80 + place, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    (folder / "2.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("clip")
    model = two_towers.build("clip")
    model.save_pretrained(folder)
    CLIP_IMAGES.save_pretrained(folder)
    return model, folder


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / names_of(folder).manifest).read_text())


def test_projected_features_are_the_references_and_an_error_has_none(
    tmp_path: Path, photos: Path, clip: tuple[Any, Path]
):
    model, checkpoint = clip
    packvit.embed(photos, out=tmp_path / "out", model=checkpoint, device="cpu", rows_per_part=2)
    assert check_folder(tmp_path / "out").faults == []
    found = packvit.read(tmp_path / "out")
    assert (found.text_space, manifest_of(tmp_path / "out")["text_space"]) == ("projected",) * 2
    assert found.projected is not None
    good = [0, 1, 3, 4]
    pixels = CLIP_IMAGES([Image.open(photos / f"{n}.png") for n in good], return_tensors="pt")
    with torch.no_grad():
        theirs = model.get_image_features(**pixels).pooler_output.numpy()
    assert found.projected.dtype == np.float32
    assert np.abs(found.projected[good] - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.isnan(found.projected[2]).all()
    kept = found.good().projected
    assert kept is not None
    assert np.array_equal(kept, found.projected[good])
    encoder = packvit.load(checkpoint, device="cpu")
    assert np.allclose(encoder.embed([photos / "0.png"]), found.matrix[:1], atol=1e-5)
    # Words find photographs by this column.
    words = packvit.load_text(checkpoint, device="cpu")
    assert words.encode(torch.tensor([5, 1]), [2]).vectors().shape[1] == theirs.shape[1]


@pytest.mark.parametrize(("kind", "space"), [("siglip", "pooled"), ("aimv2", "projected")])
def test_the_manifest_names_the_column_that_texts_compare_with(
    tmp_path: Path, photos: Path, kind: str, space: str
):
    two_towers.build(kind).save_pretrained(tmp_path / "model")
    packvit.embed(photos, out=tmp_path / "out", model=tmp_path / "model", device="cpu")
    found = packvit.read(tmp_path / "out")
    assert (found.text_space, manifest_of(tmp_path / "out")["text_space"]) == (space, space)
    assert ("projected" in found.table.column_names) == (space == "projected")
    assert (found.projected is None) == (space == "pooled")


def test_a_model_without_texts_shares_no_space(tmp_path: Path, photos: Path):
    model = write_checkpoint(tmp_path / "model")
    packvit.embed(photos, out=tmp_path / "out", model=model, device="cpu")
    assert "text_space" not in manifest_of(tmp_path / "out")
    found = packvit.read(tmp_path / "out")
    assert (found.text_space, found.projected) == (None, None)


def test_a_folder_begun_without_the_column_is_finished_without_it(
    tmp_path: Path, photos: Path, clip: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {"model": clip[1], "device": "cpu", "rows_per_part": 2}
    with monkeypatch.context() as earlier:  # as it was before the column
        earlier.setattr(Encoder, "text_space", None)
        packvit.embed(photos, out=tmp_path / "out", **options)
    names = names_of(tmp_path / "out")
    last = tmp_path / "out" / names.part(2)
    whole = {path: path.read_bytes() for path in (last, tmp_path / "out" / names.manifest)}
    last.unlink()
    packvit.embed(photos, out=tmp_path / "out", **options)
    assert {path: path.read_bytes() for path in whole} == whole
    assert check_folder(tmp_path / "out").faults == []
    assert packvit.read(tmp_path / "out").projected is None
