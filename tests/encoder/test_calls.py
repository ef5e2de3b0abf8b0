"""How an encoder may be called and loaded: packs, lists, words; W7 of the cases."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import packvit
from packvit.families.aimv2 import AIMv2Packing
from packvit.families.clip import ClipPacking

GRID = [(1, 3, 4), (2, 2, 5), (1, 1, 7)]


@pytest.fixture(scope="module")
def encoder() -> AIMv2Packing:
    return AIMv2Packing.from_transformers(reference.aimv2(is_native=True))


def photographs(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (28 + 14 * i, 42, 3), dtype=np.uint8) for i in range(count)]


def test_a_pack_is_taken_whole_or_as_its_two_tensors(encoder):
    pack = encoder.pack(photographs(3))
    hidden_states, grid_thw = pack
    tokens = encoder.forward(hidden_states, grid_thw)
    for found in (encoder(pack), encoder(*pack), encoder(hidden_states, grid_thw=grid_thw)):
        assert torch.equal(found, tokens)
    assert torch.equal(encoder.encode(pack).tokens, tokens)
    assert torch.equal(encoder.encode(*pack).tokens, tokens)
    moved = pack.to("meta")
    assert (moved.hidden_states.device.type, moved.grid_thw.device.type) == ("meta", "cpu")
    assert moved.hidden_states.shape == hidden_states.shape


def test_hooks_see_the_two_tensors_of_a_pack(encoder):
    seen = []
    handle = encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    pack = encoder.pack(photographs(2))
    encoder(pack)
    handle.remove()
    assert [tuple(args) for args in seen] == [(pack.hidden_states, pack.grid_thw)]


def test_a_grid_may_be_a_list_or_an_array(encoder):
    patches = reference.draw_patches(GRID, 588)
    tokens = encoder(patches, torch.tensor(GRID))
    for grid in (GRID, [list(row) for row in GRID], np.array(GRID), np.array(GRID, np.uint8)):
        assert torch.equal(encoder(patches, grid), tokens)
        assert torch.equal(encoder.forward(patches, grid), tokens)


def test_bytes_of_a_file_are_an_image(encoder, tmp_path: Path):
    Image.fromarray(photographs(1)[0]).save(tmp_path / "x.png")
    whole = encoder.pack([(tmp_path / "x.png").read_bytes()])
    assert torch.equal(whole.hidden_states, encoder.pack([tmp_path / "x.png"]).hidden_states)


WRONG = {
    "packvit.load('tiny', device='banana')": 'ValueError: device "banana" cannot be used: torch '
    'knows no device of that name. Try `device="cpu"`.',
    "packvit.load('tiny', device='cuda:9')": 'ValueError: device "cuda:9" cannot be used: torch '
    'finds 0 CUDA devices here. Try `device="cpu"`.',
    "packvit.load(None)": "TypeError: name_or_folder is None, but must be a hub name or a folder's",
    "packvit.load('tiny', device=3)": "TypeError: device is 3, but must be a torch.device",
    "packvit.load('tiny', dtype='int8')": 'ValueError: dtype is "int8", but must be one of: float3',
    "packvit.load('tiny', dtype=torch.int8)": 'ValueError: dtype is "torch.int8", but must be',
    "packvit.load('tiny', dtype=4)": "TypeError: dtype is 4, but must be a torch.dtype",
    "packvit.Encoder.from_pretrained('tiny')": "TypeError: Encoder is the class that all fam",
    "encoder.encode(pack, taps=[1.5])": "TypeError: taps holds 1.5, but must hold whole numbers",
    "encoder.encode(pack, taps=[True])": "TypeError: taps holds True, but must hold whole numbers",
    "encoder(pack.hidden_states)": "TypeError: grid_thw is missing, which says",
    "encoder(pack, pack.grid_thw)": "TypeError: A Pack brings its own grid_thw.",
    "encoder(pack.hidden_states, 'abc')": "TypeError: grid_thw is 'abc', but must be a tensor",
    "encoder(pack.hidden_states, [[1, 2], [3]])": "TypeError: grid_thw is [[1, 2], [3]], but must",
    "encoder(pack.hidden_states, [[1.0, 2, 2]])": "ValueError: grid_thw must hold integers, not",
    "encoder(pack.hidden_states.numpy(), pack.grid_thw)": "TypeError: hidden_states is a ndarray",
    "encoder.embed(b'')": "TypeError: images is one bytes, but must be a list of them",
    "encoder.embed([], errors='ignore')": 'ValueError: errors is "ignore", but must be "raise" or',
    "encoder.embed([], projected=True)": "ValueError: projected=True asks for a space shared with",
}


def test_what_is_wrong_with_a_call_is_said_in_one_sentence():
    """W7. In a process of its own: in ours, annotations are checked before."""
    code = (
        "import json, numpy, sys, torch, packvit\n"
        "encoder = packvit.load('tiny')\n"
        "pack = encoder.pack([numpy.zeros((28, 28, 3), numpy.uint8)])\n"
        "said = {}\n"
        "for call in json.load(sys.stdin):\n"
        "    try:\n"
        "        said[call] = f'no error: {eval(call)!r}'\n"
        "    except Exception as error:\n"
        "        said[call] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(said))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(list(WRONG)),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    said = json.loads(run.stdout)
    assert {call: said[call][: len(start)] for call, start in WRONG.items()} == WRONG
    assert all("\n" not in sentence and len(sentence) < 300 for sentence in said.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_dtype_and_a_device_may_be_words(dtype: str):
    encoder = packvit.load("tiny", device="cpu", dtype=dtype)
    assert (encoder.dtype, encoder.device.type) == (getattr(torch, dtype), "cpu")
    again = packvit.AIMv2Packing.from_pretrained("tiny", dtype=dtype, device="cpu")
    assert again.dtype == encoder.dtype


def test_the_old_name_of_projected_still_works_and_says_so():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    model = CLIPVisionModelWithProjection(config)
    encoder = ClipPacking.from_transformers(model)
    pack = encoder.pack(photographs(2))
    with pytest.warns(DeprecationWarning, match="write projected="):
        old = encoder.encode(pack, projection=True)
    new = encoder.encode(pack, projected=True)
    assert old.projected is not None
    assert new.projected is not None
    assert torch.equal(old.projected, new.projected)
    assert encoder.embed(photographs(2), projected=True).shape == (2, 8)


def vectors_of(encoder: Any, images: list[Any]) -> np.ndarray:
    """One forward for each image alone."""
    rows = []
    for image in images:
        with torch.inference_mode():
            found = encoder.encode(encoder.pack([image]))
        row = found.tokens.float().mean(0) if found.pooled is None else found.pooled[0].float()
        rows.append(row.numpy())
    return np.stack(rows)


@pytest.mark.parametrize("head", [True, False])
def test_embed_gives_one_vector_an_image_in_their_order(head: bool):
    """W11: README's first example is this call, which keeps no graph of derivatives."""
    encoder = AIMv2Packing.from_transformers(reference.aimv2(is_native=True, use_head=head))
    images = photographs(7)[::-1]
    packs = []
    handle = encoder.encoder.register_forward_pre_hook(lambda module, args: packs.append(args[0]))
    found = encoder.embed(images, token_budget=30)
    handle.remove()
    assert (found.shape, found.dtype) == ((7, 64), np.float32)
    np.testing.assert_allclose(found, vectors_of(encoder, images), atol=2e-6)
    assert 1 < len(packs) < 7  # several images a pack, and no pack beyond the budget
    assert max(len(tokens) for tokens in packs) <= 30
    assert all(tokens.is_inference() for tokens in packs)


def test_embed_of_bad_images_names_the_first_or_leaves_rows_of_nan(encoder, tmp_path: Path):
    (tmp_path / "x.jpg").write_text("no photograph")
    good = photographs(3)
    images = [good[0], tmp_path / "x.jpg", good[1], tmp_path / "absent.jpg", good[2]]
    with pytest.raises(packvit.ImageError) as caught:
        encoder.embed(images)
    assert (caught.value.index, caught.value.code) == (1, "unidentified")
    found = encoder.embed(images, errors="nan")
    assert np.isnan(found).all(1).tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(found[[0, 2, 4]], vectors_of(encoder, good), atol=2e-6)
    assert encoder.embed([]).shape == (0, 64)
    assert np.isnan(encoder.embed([tmp_path / "x.jpg"], errors="nan")).all()
