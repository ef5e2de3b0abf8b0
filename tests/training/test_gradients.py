"""The gradient of every parameter, of every family, against transformers, image by image."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

import packvit

ODD = [(1, 1, 1), (1, 1, 23), (1, 19, 1), (1, 3, 17), (2, 4, 6), (1, 5, 5), (1, 17, 3)]
OWN = [(1, 5, 5), (3, 5, 5), (1, 5, 5)]
BENT = {"interpolate_pos_encoding": True}  # how references are asked for another grid
ONE_GRID = ("aimv2", "siglip", "clip")
CASES = {
    "aimv2, native": ("aimv2", {"is_native": True}, ODD, {}),
    "aimv2, biases": ("aimv2", {"qkv_bias": True, "mlp_bias": True}, OWN, {}),
    **{
        kind: (kind, {}, OWN if kind.split(",")[0] in ONE_GRID else ODD, {})
        for kind in reference.KINDS
    },
    "siglip, bent": ("siglip", {}, ODD, BENT),
    "clip, bent": ("clip, projected", {}, ODD, BENT),
}
RELATIVE = 1e-5
# A key bias's gradient is zero in exact arithmetic, so it is held to its query bias's. Its rounding
# alone is 5e-7 of that in fp32, on either side; float64 can be held to 1e-8.
KEY_BIAS = {torch.float32: 1.0, torch.float64: 1e-3}


@pytest.mark.parametrize("dtype", KEY_BIAS, ids=["fp32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_references(tmp_path: Path, case: str, dtype: torch.dtype):
    kind, changes, grid, options = CASES[case]
    model = reference.build(kind, **changes).to(dtype)
    model.save_pretrained(tmp_path / "model")
    bent = "interpolate" if options else "checkpoint"
    encoder = packvit.load(tmp_path / "model", positions=bent, dtype=dtype)
    patches = reference.draw_patches(grid, encoder.config.patch_dim)

    expected = reference.forward(model, patches, grid, **options)
    found = encoder.encode(
        patches, torch.tensor(grid), taps=[1], projected=expected.projected is not None
    )
    pairs = (
        (found.tokens, expected.tokens),
        (found.taps[1], expected.hidden_states[1]),
        (found.prefix, expected.prefix),
        (found.pooled, expected.pooled),
        (found.projected, expected.projected),
    )
    ours, theirs = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    pull(ours).backward()
    pull(theirs).backward()

    # Our gradients, written as a checkpoint is: in the reference's names and shapes.
    written = copy.deepcopy(encoder)
    for parameter, own in zip(written.parameters(), encoder.parameters(), strict=True):
        assert own.grad is not None
        parameter.data = own.grad
    written.save_pretrained(tmp_path / "gradients")
    gradients = dict(type(model).from_pretrained(tmp_path / "gradients").named_parameters())
    expected_gradients = {name: x.grad for name, x in model.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert name.endswith("mask_token")  # carried, and used by no forward
            continue
        size = gradient.norm()
        query = expected_gradients.get(query_of(name))
        if query is not None:
            size = max(size, KEY_BIAS[dtype] * query.norm())
        assert (gradients[name] - gradient).norm() <= RELATIVE * size, name


def pull(outputs: Sequence[Tensor | None]) -> Tensor:
    """Weigh every number that comes out differently, and sum."""
    generator = torch.Generator().manual_seed(1)
    terms = [
        (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
        for out in outputs
        if out is not None
    ]
    return torch.stack(terms).sum()


def query_of(name: str) -> str:
    """Name what stands beside a key bias as its query bias; anything else has none."""
    if name == "head.k_proj.bias":
        return "head.cls_token"  # AIMv2's query is learned as it is
    module, _, kind = name.rpartition(".")
    path, _, last = module.rpartition(".")
    queries = {"k_proj": "q_proj", "key": "query"}
    return f"{path}.{queries[last]}.bias" if kind == "bias" and last in queries else ""
