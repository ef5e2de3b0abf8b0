import pytest
import torch
from torch import Tensor

from packvit.checkpoints import parameters as weights
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.rules import (
    conv_to_linear,
    fuse,
    layers,
    permute_patches,
    prefixed,
    rename,
    reshape,
)

RULES = (
    conv_to_linear("patches.weight", "stem.weight"),
    *layers("blocks.{i}.", "h.{i}.", {"qkv": "q k v", "out": "o"}),
    reshape("positions", "pos", 1),
    rename("norm.weight", "ln.weight"),
)
SHAPES = {
    "patches.weight": torch.Size([6, 12]),
    "blocks.0.qkv.weight": torch.Size([18, 6]),
    "blocks.11.qkv.weight": torch.Size([18, 6]),
    "positions": torch.Size([4, 6]),
    "norm.weight": torch.Size([6]),
}


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"stem.weight": (6, 3, 2, 2), "ln.weight": (6,), "pos": (1, 4, 6)}
    shapes |= {f"h.{i}.{part}.weight": (6, 6) for i in (0, 11) for part in "qkv"}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_loading_and_storing_are_inverse_bit_for_bit(prefix: str):
    theirs = {prefix + name: tensor for name, tensor in checkpoint().items()}
    rules = prefixed(RULES, prefix)
    back = weights.store(weights.load(SHAPES, theirs, rules), rules)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_thirds_of_the_fused_matrix_are_q_k_and_v():
    theirs = checkpoint()
    fused = weights.load(SHAPES, theirs, RULES)["blocks.11.qkv.weight"]
    for third, part in zip(fused.split(6), "qkv", strict=True):
        assert torch.equal(third, theirs[f"h.11.{part}.weight"])


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_a_linear_layer_on_flattened_patches_is_their_convolution(order):
    generator = torch.Generator().manual_seed(1)
    for side, rows, columns in [(2, 2, 3), (14, 1, 5), (16, 3, 2)]:
        conv = torch.randn(6, 3, side, side, generator=generator)
        image = torch.randn(3, rows * side, columns * side, generator=generator)
        [rule] = [conv_to_linear("w", "c")]
        ours = permute_patches(rule.load([conv]), order)
        tiles = image.unflatten(1, (rows, side)).unflatten(3, (columns, side))  # C r y c x
        within = (1, 3, 2, 4, 0) if order == "hwc" else (1, 3, 0, 2, 4)
        patches = tiles.permute(*within).flatten(2).flatten(0, 1)
        expected = torch.nn.functional.conv2d(image, conv, stride=side).flatten(1).T
        torch.testing.assert_close(patches @ ours.T, expected, atol=5e-5, rtol=1e-5)
        assert torch.equal(rule.store(permute_patches(ours, order, back=True))[0], conv)


def test_everything_that_does_not_fit_is_told_at_once():
    theirs = checkpoint()
    del theirs["h.11.k.weight"]
    theirs["ln.weight"] = torch.zeros(7)
    theirs["pos"] = torch.zeros(1, 4, 6, dtype=torch.int64)
    theirs["head.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        weights.load(SHAPES, theirs, RULES, unread=lambda name: name == "other.weight")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: h.11.k.weight (our blocks.11.qkv.weight)",
        "  not floating point: pos holds torch.int64",
        "  misshapen: ln.weight is [7], expected [6]",
        "  unexpected: head.weight",
    ]


def test_parts_of_unequal_shape_do_not_make_up_for_each_other():
    theirs = checkpoint()
    theirs["h.0.q.weight"], theirs["h.0.k.weight"] = torch.zeros(5, 6), torch.zeros(7, 6)
    with pytest.raises(CheckpointError) as caught:
        weights.load(SHAPES, theirs, RULES)
    assert str(caught.value).splitlines()[1:] == [
        "  misshapen: h.0.q.weight is [5, 6], expected [6, 6]",
        "  misshapen: h.0.k.weight is [7, 6], expected [6, 6]",
    ]


def test_a_parameter_without_a_rule_is_refused_even_if_its_name_contains_one():
    with pytest.raises(ValueError, match=r"0 rules claim our parameter final\.norm\.weight"):
        weights.load({"final.norm.weight": torch.Size([6])}, checkpoint(), RULES)


def test_a_parameter_with_two_rules_is_refused():
    rules = (*RULES, fuse("norm.weight", "a", "b"))
    with pytest.raises(ValueError, match=r"2 rules claim our parameter norm\.weight"):
        weights.load(SHAPES, checkpoint(), rules)
