"""Text towers beside transformers', on small random weights where every tensor matters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import two_towers

import packvit
from packvit.text.encoder import TextEncoder
from packvit.verification.rule import judge

KINDS = [*two_towers.KINDS]


def loaded(folder: Path, model: Any, **options: Any) -> TextEncoder:
    model.save_pretrained(folder)
    return packvit.load_text(folder, **options)


def misses(text: TextEncoder, model: Any) -> list[str]:
    ids = two_towers.draw_texts(text.config.padded)
    lengths = [len(each) for each in ids]
    found = text.encode(torch.cat(ids).to(text.device), lengths)
    theirs = two_towers.run(model, ids)
    truth = two_towers.run(copy.deepcopy(model).double(), ids)
    ours: dict[str, Any] = {"tokens": found.tokens.split(lengths), "pooled": found.pooled.split(1)}
    if found.projected is not None:
        ours["projected"] = found.projected.split(1)
    assert [name for name in theirs if theirs[name]] == [*ours]
    return [
        f"{name}: {judged}"
        for name in ours
        for judged in judge(ours[name], theirs[name], truth[name], dtype=text.dtype, blocks=3)
        if not judged.passed
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_of_texts_equals_the_reference_on_each_text(tmp_path: Path, kind: str):
    model = two_towers.build(kind)
    text = loaded(tmp_path, model)
    assert misses(text, model) == []
    assert torch.equal(text.logit_scale, model.logit_scale.reshape(()))
    bias = getattr(model, "logit_bias", None)
    found = None if text.logit_bias is None else text.logit_bias.item()
    assert found == (None if bias is None else bias.item())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_close_to_float64_as_the_bf16_reference(tmp_path: Path, kind: str):
    model = two_towers.build(kind, hidden_size=256)
    text = loaded(tmp_path, model, dtype="bfloat16")
    assert text.logit_scale.dtype == torch.float32
    assert misses(text, model.bfloat16()) == []
