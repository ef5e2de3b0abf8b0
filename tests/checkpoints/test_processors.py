"""Rows N1 and N2 of the cases: image settings as transformers' own processors take them."""

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import towers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import packvit
from packvit import hub
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.image_settings import image_config_from
from packvit.checkpoints.processors import PROCESSORS, processor_name
from packvit.config import Exact, ImageConfig, MostPatches, PaddedPatches
from packvit.images.patches import Patches, to_patches
from packvit.model.embeddings import normalize

PATCH = 14
# Every entry must be read or be the named class's, so none may be right before.
NONSENSE = ImageConfig(PATCH, (9.0, 9.0, 9.0), (9.0, 9.0, 9.0), "box", Exact(9, 9))
MODULES = {
    "BitImageProcessor": "bit",
    "CLIPImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
    "Siglip2ImageProcessor": "siglip2",
    "ViTImageProcessor": "vit",
}
SIDES = st.integers(PATCH, 60)


def reference_class(name: str) -> Any:
    module = MODULES[name]
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}Pil")


def sizes(*, shortest: bool) -> st.SearchStrategy[Any]:
    both = st.fixed_dictionaries({"height": SIDES, "width": SIDES})
    kinds = [SIDES, both, st.tuples(SIDES, SIDES).map(list)]
    edge = SIDES.map(lambda side: {"shortest_edge": side})
    return st.one_of(*kinds, edge) if shortest else st.one_of(*kinds)


def prepared(image: Image.Image, named: dict[str, Any]) -> tuple[ImageConfig, Patches] | str:
    try:
        config = image_config_from(named, NONSENSE)
        return config, to_patches(image, config, resize="checkpoint")
    except ValueError as error:
        return str(error)


STATISTICS = st.one_of(st.floats(0.1, 0.9), st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3))
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "image_mean": STATISTICS,
        "image_std": STATISTICS,
        "resample": st.integers(0, 5),
        "size": sizes(shortest=True),
        "crop_size": sizes(shortest=False),
        "do_center_crop": st.none() | st.booleans(),
        "do_resize": st.none() | st.booleans(),
        "default_to_square": st.none() | st.booleans(),
        "max_num_patches": st.integers(1, 30),
        "do_rescale": st.just(True),
        "do_pad": st.none() | st.booleans(),
    },
)
SPELLINGS = ("{}", "{}Fast", "{}Pil")


@pytest.mark.parametrize("name", MODULES)
@given(
    drawn=SETTINGS,
    spelling=st.sampled_from(SPELLINGS),
    height=st.integers(15, 90),
    width=st.integers(15, 90),
)
@settings(max_examples=60, deadline=None)
def test_n2_drawn_settings_give_the_pixels_of_the_named_class(
    name: str, drawn: dict[str, Any], spelling: str, height: int, width: int
):
    named = drawn | {"image_processor_type": spelling.format(name), "patch_size": PATCH}
    if name == "Siglip2ImageProcessor" and not drawn.get("do_resize", True):
        height, width = (side // PATCH * PATCH for side in (height, width))  # all it can cut
    pixels = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    found = prepared(image, named)
    if isinstance(found, str):  # where the reference pads, or refuses too
        words = ("do_center_crop", "The preprocessing cuts", "hold no patch")
        assert any(word in found for word in words)
        return
    config, ours = found
    # It looks at no crop, yet refuses one without a size.
    assume(name != "Siglip2ImageProcessor" or not drawn.get("do_center_crop"))
    processor = reference_class(name).from_dict(named)
    theirs = processor(images=image, return_tensors="pt")
    if name == "Siglip2ImageProcessor":
        assert theirs["spatial_shapes"][0].tolist() == [ours.rows, ours.columns]
        values = theirs["pixel_values"][0, : ours.rows * ours.columns]
    else:
        whole = theirs["pixel_values"][0]
        assert (ours.rows, ours.columns) == (whole.shape[1] // PATCH, whole.shape[2] // PATCH)
        whole = whole[:, : ours.rows * PATCH, : ours.columns * PATCH]
        tiles = whole.reshape(3, ours.rows, PATCH, ours.columns, PATCH).permute(1, 3, 2, 4, 0)
        values = tiles.reshape(ours.rows * ours.columns, -1)
    raw = values.double().numpy().reshape(-1, 3) * config.std + config.mean
    np.testing.assert_allclose(raw * 255, ours.patches.reshape(-1, 3), atol=1e-3)


def class_attributes(name: str, path: str) -> dict[str, Any]:
    """Return a class's attributes from its source, where it cannot be imported."""
    import ast

    import transformers
    from transformers import image_utils

    source = (Path(str(transformers.__file__)).parent / path).read_text("utf-8")
    [found] = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    attributes = {}
    for node in found.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            words = ast.unparse(node.value)
            scope = vars(image_utils) | {"PILImageResampling": Image.Resampling}
            attributes[node.targets[0].id] = eval(words, scope)  # the reference's own
    return attributes


def test_n2_dinov3s_defaults_are_those_of_its_class():
    path = "models/dinov3_vit/image_processing_dinov3_vit.py"
    attributes = class_attributes("DINOv3ViTImageProcessor", path)
    named = {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    whole = {key: value for key, value in attributes.items() if key != "resample"}
    spelt = named | whole | {"resample": int(attributes["resample"])}
    assert attributes.keys() >= {"image_mean", "image_std", "size", "resample"}
    assert "crop_size" not in attributes
    assert "default_to_square" not in attributes  # so the base class's, which is true
    found = image_config_from(named, NONSENSE)
    assert found == image_config_from(spelt, NONSENSE)
    assert image_config_from(named | {"size": 300}, NONSENSE).sizing == Exact(300, 300)


def test_n2_tipsv2s_defaults_are_those_of_its_class():
    path = "models/tipsv2/image_processing_tipsv2.py"
    attributes = class_attributes("Tipsv2ImageProcessor", path)
    named = {"image_processor_type": "Tipsv2ImageProcessor"}
    assert attributes.keys() == {
        *("resample", "size", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    }
    spelt = named | attributes | {"resample": int(attributes["resample"])}
    given = replace(NONSENSE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = image_config_from(named, given, normalizes=False)
    assert found == image_config_from(spelt, given, normalizes=False)
    assert (found.sizing, found.mean) == (Exact(448, 448), (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="do_normalize False"):
        image_config_from(named, NONSENSE)


def test_n2_every_known_class_is_compared():
    alone = {"DINOv3ViTImageProcessor", "Kimi_K25ImageProcessor", "Tipsv2ImageProcessor"}
    alone |= {"KimiVLImageProcessor", "MoonViTImageProcessor"}  # not in transformers: test_kimi.py
    assert {*MODULES, "Qwen2VLImageProcessor", *alone} == PROCESSORS.keys()


PIXELS = st.integers(784, 20_000)


@given(
    drawn=st.fixed_dictionaries(
        {},
        optional={
            "image_mean": STATISTICS,
            "image_std": STATISTICS,
            "resample": st.integers(0, 5),
            "edges": st.tuples(PIXELS, PIXELS).map(sorted),
            "min_pixels": st.integers(784, 2000),
            "max_pixels": st.integers(2000, 20_000),
        },
    ),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
)
@settings(max_examples=60, deadline=None)
def test_drawn_settings_of_qwen_give_its_processors_pixels(
    drawn: dict[str, Any], height: int, width: int
):
    named = drawn | {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": PATCH}
    least, most = named.pop("edges", (784, 20_000))
    named["size"] = {"shortest_edge": least, "longest_edge": most}
    least, most = named.get("min_pixels", least), named.get("max_pixels", most)
    pixels = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    if least > most:
        with pytest.raises(ValueError, match="more than max_pixels"):
            image_config_from(named, replace(NONSENSE, multiple=2))
        return
    config = image_config_from(named, replace(NONSENSE, multiple=2))
    ours = to_patches(image, config, resize="checkpoint")
    processor: Any = Qwen2VLImageProcessorPil.from_dict(copy.deepcopy(named))
    theirs = processor(images=image, return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, ours.rows, ours.columns]]
    raw = torch.from_numpy(ours.patches)
    values = normalize(raw, config.mean, config.std, channels_last=True)
    order = towers.block_order(1, ours.rows, ours.columns)
    assert torch.equal(towers.to_theirs(values, PATCH)[order], theirs["pixel_values"])


def test_settings_of_kimi_are_read():
    named = {"image_processor_type": "Kimi_K25ImageProcessor", "patch_size": PATCH}
    whole = {"max_patches": 99, "size": {"max_height": 20, "max_width": 20}, "merge_size": 2}
    default = replace(NONSENSE, multiple=2)
    assert image_config_from(named, default).sizing == PaddedPatches(16384, 512)
    assert image_config_from(named | whole, default).sizing == PaddedPatches(99, 20)
    with pytest.raises(ValueError, match="both sides must be equal"):
        image_config_from(named | {"size": {"max_height": 20, "max_width": 21}}, default)
    with pytest.raises(ValueError, match="merge_size 3, but the model merges squares of 2"):
        image_config_from(named | {"merge_size": 3}, default)


@pytest.mark.parametrize("name", MODULES)
def test_n2_a_name_alone_gives_the_class_defaults(name: str):
    config = image_config_from({"image_processor_type": name}, NONSENSE)
    written = reference_class(name)().to_dict() | {"patch_size": PATCH}
    assert image_config_from(written, NONSENSE) == config
    assert written["image_processor_type"] == name
    assert config.mean == tuple(written["image_mean"])
    assert config.std == tuple(written["image_std"])
    old = name.replace("ImageProcessor", "FeatureExtractor")
    assert image_config_from({"feature_extractor_type": old}, NONSENSE) == config


def test_n2_a_siglip_processor_does_not_crop_unless_told():
    said = {"image_processor_type": "SiglipImageProcessor", "crop_size": 20}
    assert image_config_from(said, NONSENSE).sizing == Exact(224, 224)
    told = said | {"do_center_crop": True}
    assert image_config_from(told, NONSENSE).sizing == Exact(224, 224, (20, 20))


def test_n2_an_absent_number_of_patches_is_the_classs():
    said = {"image_processor_type": "Siglip2ImageProcessorFast", "size": 300}
    assert image_config_from(said, NONSENSE).sizing == MostPatches(256)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"},
         "x.json has the image processor ConvNextImageProcessor, but packvit knows Bit"),
        ({"do_pad": True, "pad_size": {"height": 30, "width": 30}}, "but our encoders never pad"),
        ({"size": 0, "image_processor_type": "ViTImageProcessor"}, "height 0, but it must be 1 or"),
        ({"crop_size": -1, "do_center_crop": True}, "height -1, but it must be 1"),
        ({"max_num_patches": 0}, "max_num_patches 0, but it must be 1"),
        ({"resample": True}, "resample True, but Pillow's filters"),
    ],
)  # fmt: skip
def test_n2_settings_that_we_could_only_imitate_wrongly_are_refused(
    said: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words):
        image_config_from(said, NONSENSE, file="x.json")


def test_n2_kosmos_square_sizes_are_clips():
    said = {"use_square_size": True, "size": {"shortest_edge": 40}, "do_center_crop": False}
    theirs = reference_class("CLIPImageProcessor").from_dict(said)
    named = said | {"image_processor_type": "CLIPImageProcessor"}
    assert dict(theirs.size) == {"height": 224, "width": 224}
    assert image_config_from(named, NONSENSE).sizing == Exact(224, 224)


# ------------------------------------------------------------------- N1: nested settings, in files

NESTED = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 2,
    "size": {"height": 56, "width": 42},
}
FLAT = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.7, 0.7, 0.7]}


def checkpoint(folder: Path, **files: dict[str, Any]) -> Path:
    reference.build("siglip").save_pretrained(folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"processor_config": {"image_processor": NESTED, "processor_class": "SiglipProcessor"}},
        {"processor_config": {"image_processor": NESTED}, "preprocessor_config": FLAT},
        {"processor_config": {"processor_class": "SiglipProcessor"}, "preprocessor_config": NESTED},
        {"processor_config": {"image_processor": None}, "preprocessor_config": NESTED},
        {"preprocessor_config": NESTED},
    ],
    ids=["nested alone", "nested first", "not nested", "null", "flat"],
)
def test_n1_nested_settings_are_read_as_transformers_reads_them(
    tmp_path: Path, files: dict[str, Any]
):
    encoder = packvit.load(checkpoint(tmp_path, **files), device="cpu")
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path)
    assert (encoder.images.mean, encoder.images.std) == (theirs.image_mean, theirs.image_std)
    assert encoder.images.sizing == Exact(56, 42)
    assert dict(theirs.size) == {"height": 56, "width": 42}
    assert encoder.images.resample == "bilinear"


def test_n1_what_a_transformers_5_processor_saves_survives_every_way_of_writing(tmp_path: Path):
    saved = SiglipImageProcessorPil(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 56, "width": 42}
    ).to_dict()
    source = checkpoint(tmp_path / "a", processor_config={"image_processor": saved})
    encoder = packvit.load(source, device="cpu")
    encoder.save_pretrained(tmp_path / "b")
    hub.convert(source, tmp_path / "c", "transformers")
    for name in "bc":
        again = packvit.load(tmp_path / name, device="cpu")
        assert again.images == encoder.images
        theirs = SiglipImageProcessorPil.from_pretrained(tmp_path / name)
        assert theirs.image_mean == again.images.mean
    encoder.save_pretrained(source)  # over what it was read from
    assert packvit.load(source, device="cpu").images == encoder.images


def test_n1_nested_settings_in_the_way_of_others_stop_the_writing(tmp_path: Path):
    encoder = packvit.load(checkpoint(tmp_path / "a", preprocessor_config=FLAT), device="cpu")
    for name, loaded in (("b", encoder), ("c", type(encoder).from_transformers(
        reference.build("siglip")))):  # fmt: skip
        checkpoint(tmp_path / name, processor_config={"image_processor": NESTED})
        with pytest.raises(CheckpointError, match=r"already has processor_config\.json with other"):
            loaded.save_pretrained(tmp_path / name)


def test_n1_messages_name_the_file_that_was_read(tmp_path: Path):
    wrong = {"processor_config": {"image_processor": NESTED | {"do_rescale": False}}}
    with pytest.raises(CheckpointError, match=r"^processor_config\.json has do_rescale False"):
        packvit.load(checkpoint(tmp_path / "a", **wrong))
    with pytest.raises(CheckpointError, match=r"image_processor 3, but it must be an object"):
        packvit.load(checkpoint(tmp_path / "b", processor_config={"image_processor": 3}))


def test_n1_verify_compares_photographs_with_the_nested_settings(tmp_path: Path):
    from packvit.verification import VerifyOptions
    from packvit.verification.verify import verify_checkpoint

    nested = NESTED | {"image_processor_type": "ViTImageProcessor"}  # not the family's own class
    folder = checkpoint(tmp_path, processor_config={"image_processor": nested})
    found = verify_checkpoint(folder, VerifyOptions(quick=True, lower=()), device="cpu")
    rows = [row for row in found.rows if row.what == "pixels"]
    assert rows
    assert all(row.passed and row.limit == 0 for row in rows)


def test_an_unnamed_processor_is_no_class():
    assert processor_name({}) is None
    assert processor_name({"feature_extractor_type": "CLIPFeatureExtractor"}) == (
        "CLIPImageProcessor"
    )
