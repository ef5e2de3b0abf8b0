from typing import Any

import numpy as np
import pytest
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu
from sklearn.decomposition import PCA

from packvit.pictures.colours import find_range, ramp, rescale
from packvit.pictures.components import find_foreground, fit, split_in_two


def draw_tokens(seed: int = 0, count: int = 500, width: int = 24) -> np.ndarray:
    """Tokens far from the origin, of a different spread in every direction of a turned space."""
    draw = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(draw.normal(size=(width, width)))
    spread = 0.8 ** np.arange(width)
    return ((draw.normal(size=(count, width)) * spread) @ turned + 30).astype(np.float32)


def test_the_basis_is_scikit_learns_down_to_the_signs():
    tokens = draw_tokens()
    basis = fit(np.split(tokens, [7, 8, 300]))
    reference: Any = PCA(3, svd_solver="full").fit(tokens.astype(np.float64))  # it has no stubs
    np.testing.assert_allclose(basis.mean, tokens.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(basis.components, reference.components_, atol=1e-9)
    np.testing.assert_allclose(basis.variances, reference.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(basis.shares, reference.explained_variance_ratio_, rtol=1e-10)
    np.testing.assert_allclose(basis.project(tokens), reference.transform(tokens), atol=1e-8)


def test_signs_and_basis_do_not_depend_on_the_order_or_the_batches():
    tokens = draw_tokens(1)
    first = fit([tokens])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(tokens))
        again = fit(np.array_split(tokens[order], 1 + 3 * seed))
        np.testing.assert_allclose(again.components, first.components, atol=1e-10)


def test_where_nothing_varies_nothing_is_drawn():
    flat = np.full((9, 8), 3.7, np.float32)
    assert not fit([flat]).components.any()
    assert not fit([flat[:1]]).project(flat).any()
    line = flat + np.arange(9, dtype=np.float32)[:, None]
    assert np.linalg.norm(fit([line]).components, axis=1) == pytest.approx([1, 0, 0])
    low, high = find_range([np.zeros((9, 3))])
    assert (rescale(np.zeros((9, 3)), low, high) == 0.5).all()
    with pytest.raises(ValueError, match="No tokens were given"):
        fit([])


def test_the_threshold_parts_values_with_the_least_variance_within():
    draw = np.random.default_rng(2)
    values = np.concatenate([draw.normal(-4, 1, 300), draw.normal(2, 1, 90)])
    reference = threshold_otsu(values, nbins=4096)  # the middle of a bin, which may hold a value
    assert abs(int((values > split_in_two(values)).sum()) - int((values > reference).sum())) <= 1
    ordered = np.sort(values)
    within = [k * ordered[:k].var() + (390 - k) * ordered[k:].var() for k in range(1, 390)]
    assert (values <= split_in_two(values)).sum() == 1 + int(np.argmin(within))
    assert split_in_two(np.full(4, 2.0)) == 2.0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_the_rims_are_not_on_whatever_the_sign(sign: int):
    draw = np.random.default_rng(3)
    masks = [np.zeros((6, 9), bool), np.zeros((5, 5), bool)]
    masks[0][2:5, 1:7] = True  # one cluster of each image, within it
    masks[1][1:4, 2:5] = True  # this one touches a rim
    firsts = [sign * (np.where(m, 5.0, -3.0) + draw.normal(0, 0.3, m.shape)) for m in masks]
    for found, mask in zip(find_foreground(firsts), masks, strict=True):
        assert (found == mask).all()


def test_the_ramp_rises_in_even_steps_of_lightness():
    lightness = rgb2lab(ramp(np.linspace(0, 1, 33))[None])[0, :, 0]
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert lightness[0] < 15
    assert lightness[-1] > 93
    assert steps.max() < 1.6 * steps.mean()
