"""TIPSv2: what is its alone. Its outputs beside transformers' are in test_parity.py."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Tipsv2Config, Tipsv2Model, Tipsv2VisionConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import packvit

GRID = [(1, 3, 17), (2, 4, 6), (1, 5, 5), (1, 19, 1)]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("kind", ["tipsv2", "tipsv2, swiglu"])
def test_the_tower_beside_its_text_tower_is_that_by_itself(tmp_path: Path, kind: str):
    model = reference.build(kind)
    model.save_pretrained(tmp_path / "alone")
    whole = Tipsv2Model(Tipsv2Config(vision_config=model.config.to_dict(), text_config=TEXT))
    whole.vision_model.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    alone, found = (packvit.load(tmp_path / name) for name in ("alone", "whole"))
    assert found.config == alone.config
    assert "temperature" in found.skipped
    assert all(name == "temperature" or name.startswith("text_encoder.") for name in found.skipped)
    patches = reference.draw_patches(GRID, 588)
    assert torch.equal(found(patches, GRID), alone(patches, GRID))
    taken = packvit.Tipsv2VisionPacking.from_transformers(whole)
    assert torch.equal(taken(patches, GRID), alone(patches, GRID))
    found.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_second_class_token_is_the_second_row_of_the_prefix(tmp_path: Path):
    model = reference.build("tipsv2")
    encoder = packvit.Tipsv2VisionPacking.from_transformers(model)
    patches = reference.draw_patches([(1, 4, 6)], 588)
    found = encoder.encode(patches, [(1, 4, 6)])
    state = reference.run(model, patches, [(1, 4, 6)]).prefix
    assert found.prefix.shape == (1, 2, 64)
    torch.testing.assert_close(found.prefix, state, atol=1e-4, rtol=1e-4)
    assert found.pooled is not None
    assert torch.equal(found.pooled, found.prefix[:, 0])
    assert encoder.text_space == "pooled"


def test_the_configuration_of_every_published_width_survives():
    layout = packvit.Tipsv2VisionPacking.family.layouts[0]
    for width, entries in {
        768: {},
        1152: {"mlp_ratio": 4304 / 1152, "num_attention_heads": 16},
        1536: {"use_swiglu_ffn": True, "num_hidden_layers": 40, "num_attention_heads": 24},
    }.items():
        given = Tipsv2VisionConfig(hidden_size=width, **entries).to_dict()
        written = layout.write(layout.read(given, ()))
        assert {name: given[name] for name in written if name in given} == {
            name: value for name, value in written.items() if name in given
        } | {"architectures": given["architectures"]}


def test_pixels_are_those_of_the_processor_and_not_normalised():
    encoder = packvit.Tipsv2VisionPacking.from_transformers(reference.build("tipsv2"))
    noise = np.random.default_rng(0).integers(0, 256, (61, 87, 3), np.uint8)
    pack = encoder.pack([noise])
    ours = reference.image(encoder.to_values(pack.hidden_states), 5, 5, 14)
    # The reference's own processor is torchvision's, and equals Pillow's to a step of 1/255.
    processor = ViTImageProcessorPil(size={"height": 70, "width": 70}, do_normalize=False)
    theirs = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, theirs)


def test_settings_left_out_are_the_processors_defaults(tmp_path: Path):
    model = reference.build("tipsv2", image_size=448)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Tipsv2ImageProcessor"}'
    )
    assert (
        packvit.load(tmp_path).images == packvit.Tipsv2VisionPacking.from_transformers(model).images
    )
