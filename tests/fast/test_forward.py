"""The fast forward is the trunk's, and an encoder without it is the plain model."""

from dataclasses import replace

import pytest
import reference
import torch

from packvit.config import Windows
from packvit.families import FAMILIES
from packvit.fast.forward import compute, embed_or_wait
from packvit.model.attention import BACKENDS
from packvit.model.trunk import plan_forward, run_trunk
from packvit.packs.segments import Segments

GRID = ((1, 3, 4), (2, 2, 5), (1, 1, 7))


@pytest.mark.parametrize("windows", [None, Windows(2, full=(1,))])
@pytest.mark.parametrize("kind", [*reference.KINDS, "aimv2, native"])
def test_what_a_gpu_computes_are_the_steps_of_the_trunk(kind: str, windows: Windows | None):
    native = {"is_native": True} if kind == "aimv2, native" else {}
    model = reference.build(kind.removesuffix(", native"), **native)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    encoder = family.from_transformers(model, positions="interpolate")
    values = reference.draw_patches([*GRID], encoder.config.patch_dim)
    config = encoder.config
    if not config.prefix:
        config = replace(config, windows=windows)
    trunk = encoder.trunk._replace(config=config)
    plan = plan_forward(config, GRID, BACKENDS[-1], [0], encoder.device)
    plain, taps = run_trunk(trunk, values, plan)  # with gradients, or blocks are the CPU's own
    rows, table, axis = embed_or_wait(trunk, values, plan)
    frames = None if table is None else torch.from_numpy(table)
    segments = Segments.from_lengths(plan.lengths)
    found, tapped = compute(trunk, plan, axis, rows, frames, segments)
    assert torch.equal(found, plain)
    assert torch.equal(tapped[0], taps[0])
    assert (table is not None) == bool(native and not windows)


@pytest.mark.gpu
def test_an_encoder_without_it_is_the_plain_model_to_the_bit():
    model = reference.build("aimv2", is_native=True).to("cuda", torch.bfloat16)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    encoder = family.from_transformers(model)
    encoder.fast = None
    patches = reference.draw_patches([*GRID], encoder.config.patch_dim).to("cuda", torch.bfloat16)
    with torch.inference_mode():
        found = encoder(patches, GRID)
        [backend] = [b for b in BACKENDS if b.name == encoder.attention]
        plan = plan_forward(encoder.config, GRID, backend, [], encoder.device)
        plain, _ = run_trunk(encoder.trunk, patches, plan)
    assert torch.equal(found, plain)
