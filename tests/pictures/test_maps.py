"""Maps of a small encoder with random weights: where things stand, and what changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import rotten
import torch
from PIL import Image
from sklearn.decomposition import PCA
from small_checkpoint import write_checkpoint

import packvit
from packvit import pictures
from packvit.corpus import UsageError
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.pictures import tokens as rooms
from packvit.pictures.colours import BLANK
from packvit.pictures.maps import pca_maps, similarities
from packvit.pictures.sheet import MARGIN, TALLEST, WIDTH
from packvit.pictures.tokens import Photographs, take_photographs

SIDE = 14


def two_halves(rows: int, columns: int, seam: int, *, upright: bool) -> np.ndarray:
    """A photograph of rows x columns patches, of one texture before the seam, of another after."""
    image = rotten.pixels(rows * SIDE, columns * SIDE) // 8
    image[:, seam * SIDE :] += 180 if upright else 0
    image[seam * SIDE :] += 0 if upright else 180
    return image


def photographs(encoder: Encoder, budget: int = 16384, layer: int | None = None) -> Photographs:
    sizes = ((56, 70), (42, 98), (70, 28), (28, 28))
    images = [rotten.pixels(*size, seed=seed) for seed, size in enumerate(sizes)]
    return take_photographs(
        encoder, images, EmbedOptions(token_budget=budget, max_patches=25), layer=layer
    )


@pytest.mark.parametrize("upright", [True, False])
def test_the_map_has_its_seam_where_the_photograph_has_it(encoder: Encoder, upright: bool):
    image = two_halves(7, 12, 4, upright=upright)
    [colours] = pca_maps(take_photographs(encoder, [image], EmbedOptions())).colours.values()
    assert colours.shape == (7, 12, 3)
    steps = np.abs(np.diff(colours.astype(float), axis=1 if upright else 0))
    assert steps.mean((0, 2) if upright else (1, 2)).argmax() == 3


def test_colours_are_scikit_learns_pca_of_the_tokens_on_one_scale(encoder: Encoder):
    taken = photographs(encoder)
    found = pca_maps(taken)
    tokens = []
    for place in taken.usable:
        with torch.no_grad():
            pack = encoder.pack([taken.pixels(place)])
            tokens.append(encoder(pack.hidden_states, pack.grid_thw).double().numpy())
    values = PCA(3, svd_solver="full").fit_transform(np.concatenate(tokens))
    low, high = np.percentile(values, (1, 99), axis=0)
    wanted = 255 * ((values - low) / (high - low)).clip(0, 1)
    drawn = np.concatenate([found.colours[place].reshape(-1, 3) for place in taken.usable])
    assert np.abs(drawn - wanted).max() < 0.51


def test_order_packs_and_what_is_kept_do_not_change_the_colours(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    first = pca_maps(photographs(encoder)).colours
    monkeypatch.setattr(rooms, "KEPT", 30)  # so that most tokens are computed again
    again = pca_maps(photographs(encoder, budget=25)).colours
    turned = photographs(encoder)
    turned.prepared.reverse()
    turned_colours = pca_maps(turned).colours
    for place, colours in first.items():
        for other in (again[place], turned_colours[len(first) - 1 - place]):
            assert np.abs(colours.astype(int) - other.astype(int)).max() <= 1


def test_a_forward_takes_a_pack_and_each_image_is_encoded_once(encoder: Encoder):
    calls = []
    handle = encoder.encoder.register_forward_hook(lambda *args: calls.append(1))
    pictures.draw_pca(encoder, [rotten.pixels(42, 56, seed) for seed in range(9)])
    handle.remove()
    assert len(calls) == 1


def test_a_layer_is_that_tap(encoder: Encoder):
    taken = photographs(encoder, layer=-3)
    assert taken.source.endswith(", layer 0")
    for place, one in taken.encode():
        pack = encoder.pack([taken.pixels(place)])
        with torch.no_grad():
            tap = encoder.encode(pack.hidden_states, pack.grid_thw, taps=(0,)).taps[0]
        np.testing.assert_allclose(one.tokens, tap.numpy(), atol=2e-5)


def test_each_image_can_have_a_basis_of_its_own(encoder: Encoder):
    shared = photographs(encoder)
    own = pca_maps(shared, per_image=True)
    alone = take_photographs(encoder, [shared.pixels(1)], EmbedOptions())
    [expected] = pca_maps(alone).colours.values()
    assert np.abs(own.colours[1].astype(int) - expected.astype(int)).max() <= 1
    assert own.shares is None
    assert not np.array_equal(own.colours[1], pca_maps(shared).colours[1])


@pytest.mark.parametrize("per_image", [True, False])
def test_the_background_is_left_out_and_the_rest_has_its_own_scale(
    encoder: Encoder, per_image: bool
):
    image = rotten.pixels(8 * SIDE, 10 * SIDE) // 8
    inside = np.zeros((8, 10), bool)
    inside[2:6, 3:8] = True
    image[2 * SIDE : 6 * SIDE, 3 * SIDE : 8 * SIDE] += 190
    taken = take_photographs(encoder, [image, image[:, ::-1].copy()], EmbedOptions())
    maps = pca_maps(taken, per_image=per_image, background="remove")
    assert maps.foreground
    for place, mask in enumerate((inside, inside[:, ::-1])):
        assert (maps.foreground[place] == mask).all()
        assert (maps.colours[place][~mask] == BLANK).all()
    masks = maps.foreground
    shown = [maps.colours[place][masks[place]] for place in (0, 1)]
    for group in shown if per_image else [np.concatenate(shown)]:
        assert (group.min(0).tolist(), group.max(0).tolist()) == ([0] * 3, [255] * 3)


def test_a_patch_is_as_like_itself_as_can_be_and_the_rest_is_its_cosine(encoder: Encoder):
    taken = photographs(encoder)
    found = similarities(taken, (1, 2, 4))
    tokens = {place: one.tokens.astype(np.float64) for place, one in taken.encode()}
    chosen = tokens[1].reshape(*taken.grid(1), -1)[2, 4]
    for place, likeness in found.items():
        norms = np.linalg.norm(tokens[place], axis=1) * np.linalg.norm(chosen)
        np.testing.assert_allclose(likeness.reshape(-1), tokens[place] @ chosen / norms, atol=1e-9)
    assert found[1][2, 4] == pytest.approx(1, abs=1e-12)
    assert max(one.max() for one in found.values()) == pytest.approx(1, abs=1e-12)


def test_pictures_come_as_images_of_what_the_encoder_saw(encoder: Encoder, tmp_path: Path):
    path = tmp_path / "photo.png"
    image = two_halves(4, 6, 2, upright=True)
    Image.fromarray(image).save(path)
    sheet = pictures.draw_pca(encoder, [path, Image.fromarray(image), image])
    assert (sheet.mode, sheet.getpixel((3, 3))) == ("RGB", (255, 255, 255))
    taken = take_photographs(encoder, [path], EmbedOptions())
    assert (taken.pixels(0) == image).all()
    plain = np.asarray(pictures.draw_similarity(encoder, [image], (0, 1, 1)), int)
    mixed = np.asarray(pictures.draw_similarity(encoder, [image], (0, 1, 1), overlay=True), int)
    # The title may make the sheet wider than its pictures: it names the checkpoint's folder.
    photograph = MARGIN + round(TALLEST * WIDTH * 6 / 4)
    assert plain.shape == mixed.shape
    assert (plain[:, :photograph] == mixed[:, :photograph]).all()
    assert (plain[:, photograph:] != mixed[:, photograph:]).any()


def test_channel_first_patches_show_the_same_photograph(encoder: Encoder, tmp_path: Path):
    folder = write_checkpoint(tmp_path)
    turned = packvit.load(folder, device="cpu", patch_order="chw")
    image = rotten.pixels(42, 70)
    assert (take_photographs(turned, [image], EmbedOptions()).pixels(0) == image).all()


def test_what_cannot_be_drawn_is_said(encoder: Encoder, tmp_path: Path):
    image = rotten.pixels(28, 42)
    with pytest.raises(
        UsageError, match=r"has 2 x 3 patches, but row 2, column 0 .* columns 0 to 2"
    ):
        pictures.draw_similarity(encoder, [image], (0, 2, 0))
    with pytest.raises(UsageError, match="patch names image 1, but there are 1"):
        pictures.draw_similarity(encoder, [image], (1, 0, 0))
    with pytest.raises(UsageError, match="layer 5, but this encoder has 3"):
        pictures.draw_pca(encoder, [image], layer=5)
    with pytest.raises(
        UsageError, match="141 photographs were given, but a picture takes 1 to 140"
    ):
        pictures.draw_pca(encoder, [image] * 141)
    with pytest.raises(packvit.ImageError, match="Image 1 cannot be used: there is no file"):
        pictures.draw_pca(encoder, [image, tmp_path / "gone.jpg"])
