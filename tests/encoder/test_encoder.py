"""The door: what comes in is checked and answered in words, what goes out keeps its promises."""

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import packvit
from packvit.config import check_choice
from packvit.families.aimv2 import AIMv2Packing
from packvit.model.options import LoadKeywords, LoadOptions

GRID = [(1, 3, 4), (2, 2, 5), (1, 1, 7), (1, 3, 4)]


@pytest.fixture(scope="module")
def encoder() -> AIMv2Packing:
    return AIMv2Packing.from_transformers(reference.aimv2(is_native=True))


def packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.draw_patches(GRID, 588, seed), torch.tensor(GRID)


def raw(seed: int = 0, tokens: int = 51) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tokens, 588), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("change", [lambda x: x * 3 + 1, lambda x: x * float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_image_0_leaves_all_others_bit_identical(encoder, change, dtype):
    encoder = AIMv2Packing.from_transformers(reference.aimv2(is_native=True).to(dtype))
    patches, grid = packed()
    before = encoder.encode(patches, grid, taps=(0, 2))
    patches[:12] = change(patches[:12])
    after = encoder.encode(patches, grid, taps=(0, 2))
    assert not torch.equal(before.tokens[:12], after.tokens[:12])
    assert torch.equal(before.tokens[12:], after.tokens[12:])
    assert before.pooled is not None
    assert after.pooled is not None
    assert torch.equal(before.pooled[1:], after.pooled[1:])
    assert all(torch.equal(before.taps[k][12:], after.taps[k][12:]) for k in (0, 2))


def test_reordering_images_permutes_the_outputs(encoder):
    patches, grid = packed()
    order = [2, 0, 3, 1]
    parts = patches.split([12, 20, 7, 12])
    there = encoder.encode(patches, grid)
    back = encoder.encode(torch.cat([parts[i] for i in order]), grid[order])
    for place, image in enumerate(order):
        torch.testing.assert_close(
            back.per_image()[place], there.per_image()[image], atol=2e-6, rtol=0
        )


def test_bookkeeping_follows_the_images(encoder):
    patches, grid = packed()
    found = encoder.encode(patches, grid, taps=(-1, 0, -3))
    assert [tuple(one.shape) for one in found.per_image()] == [(*row, 64) for row in GRID]
    assert torch.equal(torch.cat([one.flatten(0, 2) for one in found.per_image()]), found.tokens)
    assert found.segment_image.tolist() == [0, 1, 1, 2, 3]
    assert (found.pooled.shape, found.prefix.shape) == ((5, 64), (5, 0, 64))
    assert found.taps.keys() == {0, 2}
    assert torch.equal(encoder(patches, grid), found.tokens)
    assert encoder.encode(patches, grid).taps == {}
    assert found.projected is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_raw_pixels_are_normalised_to_the_last_bit_as_transformers_does(device: str):
    encoder = AIMv2Packing.from_transformers(reference.aimv2(is_native=True).to(device))
    image = np.random.default_rng(0).integers(0, 256, (42, 98, 3), dtype=np.uint8)
    assert all(set(range(256)) == set(channel.flat) for channel in image.transpose(2, 0, 1))
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    [pixels] = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    tiles = pixels.reshape(3, 3, 14, 7, 14).transpose(1, 3, 2, 4, 0).reshape(21, 588)
    pack = encoder.pack([image])
    assert pack.hidden_states.dtype == torch.uint8
    values = torch.from_numpy(tiles).to(device)
    assert torch.equal(encoder.to_values(pack.hidden_states), values)
    found = encoder(pack.hidden_states, pack.grid_thw)
    assert torch.equal(found, encoder(values, pack.grid_thw))


def test_channel_first_callers_get_the_same_numbers():
    model = reference.aimv2(is_native=True)
    hwc = AIMv2Packing.from_transformers(model)
    chw = AIMv2Packing.from_transformers(model, patch_order="chw")
    grid = torch.tensor([(1, 3, 17)])
    last = raw()
    first = last.unflatten(1, (196, 3)).transpose(1, 2).flatten(1)
    assert reference.scaled_difference(chw(first, grid), hwc(last, grid)) <= 5e-6
    floats = hwc.to_values(last)
    again = floats.unflatten(1, (196, 3)).transpose(1, 2).flatten(1)
    assert reference.scaled_difference(chw(again, grid), hwc(floats, grid)) <= 5e-6
    assert reference.scaled_difference(chw(last, grid), hwc(last, grid)) > 0.1
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    one, other = (e(*unpack(e.pack([image], resize="native"))) for e in (hwc, chw))
    assert reference.scaled_difference(other, one) <= 5e-6


def unpack(pack: packvit.Pack) -> tuple[torch.Tensor, torch.Tensor]:
    return pack.hidden_states, pack.grid_thw


def test_paths_images_and_arrays_make_the_same_pack(encoder, tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 256, (50, 33, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    sources = [tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(array), array]
    pack = encoder.pack(sources, resize="native")
    assert pack.grid_thw.tolist() == [[1, 4, 2]] * 4
    assert all(torch.equal(part, pack.hidden_states[:8]) for part in pack.hidden_states.split(8))


def test_the_first_bad_image_is_named(encoder, tmp_path: Path):
    (tmp_path / "x.jpg").write_text("no photograph")
    good = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(packvit.ImageError) as caught:
        encoder.pack([good, tmp_path / "x.jpg", tmp_path / "absent.jpg"])
    assert (caught.value.index, caught.value.code) == (1, "unidentified")
    with pytest.raises(ValueError, match="images is empty"):
        encoder.pack([])


@pytest.mark.parametrize(
    ("patches", "error", "answer"),
    [
        (torch.zeros(51, 587), ValueError, r"is \[51, 587\], but must be \[total_patches, 588\]"),
        (torch.zeros(51, 588, 1), ValueError, r"is \[51, 588, 1\], but must be"),
        (
            torch.zeros(51, 588, dtype=torch.int64),
            TypeError,
            "holds torch.int64, but must be uint8",
        ),
        (torch.zeros(51, 588, dtype=torch.bool), TypeError, "holds torch.bool, but must be uint8"),
        (torch.zeros(50, 588), ValueError, "holds 50 patches, but grid_thw describes 51"),
        (torch.zeros(51, 588, device="meta"), ValueError, "is on meta, but the encoder is on cpu"),
    ],
)
def test_patches_that_do_not_fit_are_answered_in_words(encoder, patches, error, answer):
    with pytest.raises(error, match=answer):
        encoder(patches, torch.tensor(GRID))


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(encoder, layer: int):
    with pytest.raises(ValueError, match=f"asks for layer {layer}, but this encoder has 3: 0 to 2"):
        encoder.encode(*packed(), taps=(layer,))


def test_a_projection_that_is_not_there_is_refused(encoder):
    with pytest.raises(ValueError, match="this AIMv2 checkpoint has no projection"):
        encoder.encode(*packed(), projected=True)


def test_options_are_checked_when_loading():
    with pytest.raises(ValueError, match='patch_order is "whc", but must be "hwc" or "chw"'):
        check_choice("patch_order", "whc", ("hwc", "chw"))
    model = reference.aimv2()
    with pytest.raises(ValueError, match='backend "torch" cannot run: it needs CUDA tensors'):
        AIMv2Packing.from_transformers(model, attention="torch")
    with pytest.raises(
        packvit.CheckpointError,
        match="takes a model of transformers, or one that timm created, not a Linear",
    ):
        AIMv2Packing.from_transformers(torch.nn.Linear(2, 2))


def test_load_options_are_the_same_wherever_they_are_taken():
    fields = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    taken = {
        name: one.default
        for name, one in inspect.signature(packvit.load).parameters.items()
        if name not in ("name_or_folder", "revision")
    }
    assert taken == fields
    types = [get_type_hints(each) for each in (LoadOptions, LoadKeywords, packvit.load)]
    assert all({name: found[name] for name in fields} == types[0] for found in types)
    assert types[1] == types[0]


def test_loading_never_shares_memory_with_the_source():
    model = reference.aimv2()
    encoder = AIMv2Packing.from_transformers(model)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert all(bool(parameter.any()) for parameter in model.parameters())


def test_any_dtype_comes_in_and_the_encoders_goes_out(tmp_path: Path):
    reference.aimv2(is_native=True).save_pretrained(tmp_path)
    encoder = packvit.load(tmp_path, dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        patches, grid = packed()
        assert encoder(patches.to(dtype), grid).dtype == torch.bfloat16
    assert packvit.load(tmp_path).dtype == torch.float32  # where there is no GPU
    assert not encoder.training


def test_bf16_is_as_close_to_the_fp32_reference_as_the_bf16_reference():
    model = reference.aimv2(is_native=True)
    patches, grid = packed()
    exact = reference.run(model, patches, GRID)
    half = reference.run(model.bfloat16(), patches, GRID)
    found = AIMv2Packing.from_transformers(model).encode(patches, grid)
    pairs: list[tuple[Any, Any, Any]] = [
        (found.tokens, half.tokens, exact.tokens),
        (found.pooled, half.pooled, exact.pooled),
    ]
    for ours, theirs, truth in pairs:
        error, own = ((x.float() - truth).norm() for x in (ours, theirs))
        assert error <= 1.2 * own


def test_an_encoder_can_be_copied_and_sent_elsewhere(tmp_path: Path):
    reference.aimv2(is_native=True).save_pretrained(tmp_path / "model")
    encoder = packvit.load(tmp_path / "model")
    patches, grid = packed()
    sent = pickle.dumps(encoder)
    copied = copy.deepcopy(encoder)
    shutil.rmtree(tmp_path / "model")  # as on another machine
    for other in (copied, pickle.loads(sent)):
        assert torch.equal(other(patches, grid), encoder(patches, grid))


def test_an_encoder_loaded_for_inference_can_be_trained(tmp_path: Path):
    reference.aimv2().save_pretrained(tmp_path)
    with torch.inference_mode():
        encoder = packvit.load(tmp_path)
    patches = reference.draw_patches([(1, 5, 5)], 588)
    encoder(patches, torch.tensor([(1, 5, 5)])).sum().backward()
    assert encoder.embeddings.positions.grad is not None


def test_a_copied_model_is_not_kept_alive():
    model = reference.aimv2()
    gone = weakref.ref(model.encoder.layers[0].ffn.up_proj.weight)
    encoder = AIMv2Packing.from_transformers(model)
    del model
    gc.collect()
    assert gone() is None
    assert encoder.checkpoint is None


def test_one_image_is_no_list_of_images(encoder):
    with pytest.raises(TypeError, match=r"images is one str, but must be a list of them"):
        encoder.pack("cat.jpg")


@pytest.mark.parametrize(
    ("file", "entry", "said"),
    [
        ("config.json", {"num_attention_heads": 0}, "every size is 1 or more"),
        ("config.json", {"num_attention_heads": 5}, "5 heads for a width of 64"),
        ("config.json", {"hidden_size": -64}, "hidden_size"),
        ("config.json", {"patch_size": 0}, '"patch_size": 0, but'),
        ("config.json", {"patch_size": [0, 0]}, '"patch_size": 0, but'),
        ("config.json", {"num_hidden_layers": 10**8}, "100000000 layers, but there are"),
        ("config.json", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("preprocessor_config.json", {"size": "big"}, "preprocessor_config.json"),
        ("preprocessor_config.json", {"image_mean": "0.5"}, "preprocessor_config.json"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std"),
        ("preprocessor_config.json", {"resample": [2]}, "preprocessor_config.json"),
    ],
)
def test_nonsense_in_a_checkpoints_json_is_answered_in_words(
    tmp_path: Path, file: str, entry: dict[str, Any], said: str
):
    reference.aimv2().save_pretrained(tmp_path)
    path = tmp_path / file
    whole = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(whole | entry))
    with pytest.raises(packvit.CheckpointError, match=said):
        packvit.load(tmp_path)


def test_the_old_name_of_projected_still_works_and_warns(encoder):
    with (
        pytest.warns(DeprecationWarning, match="write projected="),
        pytest.raises(ValueError, match="projected=True asks for a space shared with text"),
    ):
        encoder.encode(*packed(), projection=True)
