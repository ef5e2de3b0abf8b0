"""Verification must be able to fail: whatever is wrong with an encoder, it has to notice."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.encoder import Encoder
from packvit.verification import (
    Comparison,
    VerificationError,
    VerifyOptions,
    certificate,
    comparison,
    rule,
)
from packvit.verification.comparison import compare_outputs
from packvit.verification.files import compare_photographs, compare_saved
from packvit.verification.references import ReferenceModel, write_random
from packvit.verification.verify import family_names, verify_checkpoint, verify_variant, vouch

FAST = VerifyOptions(quick=True, lower=())
FAMILIES = family_names()
VARIANTS = {
    f"{name} {variant.name}": (encoder, variant)
    for name, encoder in FAMILIES.items()
    for variant in encoder.family.reference.variants
    if encoder.family.reference.library == "transformers"
}
ONE_EACH = (
    "aimv2 native",
    "siglip2 NaFlex",
    "dinov3 plain",
    "dinov2 registers",
    "siglip plain",
    "clip projected",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of small random models, written once and by transformers."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            encoder, variant = VARIANTS[name]
            written[name] = tmp_path_factory.mktemp("checkpoint")
            write_random(variant, encoder.family, written[name], seed=0)
        return written[name]

    return folder


def missed(encoder: Encoder, folder: Path, plan: VerifyOptions = FAST) -> set[str]:
    """The kinds of comparison with the files in `folder` that `encoder` does not pass."""
    rows = compare_outputs(encoder, ReferenceModel(encoder.family, folder), plan)
    return {row.what for row in rows if not row.passed}


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_other_patch_order_is_noticed(folders: Callable[[str], Path], name: str):
    encoder = packvit.load(folders(name), device="cpu", patch_order="chw")
    assert missed(encoder, folders(name)) >= {"tokens", "taps"}


@pytest.mark.parametrize("name", ONE_EACH)
def test_one_wrong_prefix_of_a_key_does_not_load(
    folders: Callable[[str], Path], tmp_path: Path, name: str
):
    tensors = load_file(folders(name) / "model.safetensors")
    wrong = next(key for key in sorted(tensors) if key.endswith("bias"))
    tensors[f"module.{wrong}"] = tensors.pop(wrong)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders(name) / "config.json").read_text())
    with pytest.raises(CheckpointError) as refused:
        packvit.load(tmp_path)
    assert f"missing: {wrong}" in str(refused.value)
    assert f"unexpected: module.{wrong}" in str(refused.value)


@pytest.mark.soak
@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_of_every_variant_matters(folders: Callable[[str], Path], name: str):
    encoder = packvit.load(folders(name), device="cpu")
    assert not missed(encoder, folders(name))
    for label, parameter in encoder.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            if label.endswith("qkv.bias"):  # attention is blind to the keys' bias
                parameter.view(3, -1)[2].zero_()
            else:
                parameter.zero_()
        rows = compare_outputs(encoder, ReferenceModel(encoder.family, folders(name)), FAST)
        assert not all(row.passed for row in rows), label  # the first miss is enough
        with torch.no_grad():
            parameter.copy_(before)


def test_an_output_that_only_one_of_them_has_is_a_miss(folders: Callable[[str], Path]):
    encoder = packvit.load(folders("siglip plain"), device="cpu")
    encoder.head = None
    assert missed(encoder, folders("siglip plain")) == {"pooled"}
    headless = packvit.load(folders("siglip headless"), device="cpu")
    assert not missed(headless, folders("siglip headless"))


def test_an_image_that_feels_its_neighbours_is_noticed(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    encoder = packvit.load(folders("aimv2 native"), device="cpu")
    embed = encoder.embeddings.forward

    def felt(*given: Any) -> Tensor:
        tokens = embed(*given)
        return tokens + 0 * tokens.sum()

    monkeypatch.setattr(encoder.embeddings, "forward", felt)
    assert missed(encoder, folders("aimv2 native")) == {"neighbours of NaN"}


def test_more_rounding_than_the_references_own_is_noticed(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    encoder = packvit.load(folders("dinov2 plain"), device="cpu")
    plan = VerifyOptions(quick=True)
    assert not missed(encoder, folders("dinov2 plain"), plan)
    lower = comparison.lower

    def coarse(encoder: Encoder, dtype: torch.dtype) -> Encoder:
        lowered = lower(encoder, dtype)
        for parameter in lowered.parameters():
            parameter.data = parameter.data * 1.01  # rounds to one step of bfloat16, or none
        return lowered

    monkeypatch.setattr(comparison, "lower", coarse)
    rows = list(
        compare_outputs(encoder, ReferenceModel(encoder.family, folders("dinov2 plain")), plan)
    )
    assert {row.dtype for row in rows if not row.passed} == {"bfloat16"}


def test_a_small_mistake_of_ours_is_not_excused_by_the_references_own_error(
    folders: Callable[[str], Path],
):
    encoder = packvit.load(folders("siglip2 NaFlex"), device="cpu")
    encoder.get_parameter("norm.bias").data += 2e-5
    reference = ReferenceModel(encoder.family, folders("siglip2 NaFlex"))
    rows = [row for row in compare_outputs(encoder, reference, FAST) if row.what == "tokens"]
    assert {row.measure for row in rows} == {"rms", "largest"}
    for row in rows:
        assert row.passed is (row.measure == "largest" and row.worst < 20 * 10 * 2**-24 * 2)
        assert row.own is not None
        assert 0 < row.own < 1e-5


@pytest.mark.parametrize("order", ["alone", "among others", "reordered"])
def test_an_image_that_is_wrong_in_one_kind_of_pack_alone_is_noticed(
    folders: Callable[[str], Path], order: str, monkeypatch: pytest.MonkeyPatch
):
    encoder = packvit.load(folders("siglip2 NaFlex"), device="cpu")
    ask = comparison.ask_in

    def wrong(asked: str, *of: Any):
        said = dict(ask(asked, *of))
        if asked == order:
            said["tokens"] = [x + 1e-3 for x in said["tokens"]]
        return said

    monkeypatch.setattr(comparison, "ask_in", wrong)
    rows = compare_outputs(encoder, ReferenceModel(encoder.family, folders("siglip2 NaFlex")), FAST)
    wanted = {("tokens", order)}
    if order == "among others":  # which is what the pack beside NaN is compared with
        wanted.add(("neighbours of NaN", order))
    assert {(row.what, row.pack) for row in rows if not row.passed} == wanted


def test_images_for_which_the_reference_says_nan_are_left_out_and_named(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    encoder = packvit.load(folders("aimv2 native"), device="cpu")
    run, broken, spared = comparison.run, {(1, 5, 1)}, 1

    def broken_run(model, patches, grid, *, interpolate):
        said = dict(run(model, patches, grid, interpolate=interpolate))
        if next(model.parameters()).dtype == torch.bfloat16:
            bad = [i for i, place in enumerate(grid) if place in broken]
            bad = bad[: len(bad) - spared]
            said["tokens"] = [
                x * torch.nan if i in bad else x for i, x in enumerate(said["tokens"])
            ]
        return said

    monkeypatch.setattr(comparison, "run", broken_run)
    reference, plan = (
        ReferenceModel(encoder.family, folders("aimv2 native")),
        VerifyOptions(quick=True),
    )

    def judged() -> list[Comparison]:
        rows = compare_outputs(encoder, reference, plan)
        return [row for row in rows if row.dtype == "bfloat16" and row.own is not None]

    rows = judged()
    assert rows
    assert all(row.passed for row in rows)
    lost = [row.where for row in rows if "returns NaN" in row.where]
    assert lost[0] == "5 x 1, without 3 for which the reference returns NaN"
    assert all(where.startswith("5 x 1") for where in lost)
    spared = 0
    rows = judged()
    assert {row.where[:5] for row in rows if not row.passed} == {"5 x 1"}


def test_the_encoder_is_left_as_it_was(folders: Callable[[str], Path]):
    encoder = packvit.load(folders("clip projected"), device="cpu")
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    assert not missed(encoder, folders("clip projected"), VerifyOptions(quick=True))
    assert (encoder.backend, encoder.embeddings.interpolate) == ("auto", False)
    assert encoder.dtype == torch.float32
    assert all(torch.equal(before[name], x) for name, x in encoder.state_dict().items())


def test_a_difference_in_preprocessing_is_noticed(folders: Callable[[str], Path]):
    folder = folders("clip projected")
    encoder = packvit.load(folder, device="cpu")
    rows = list(compare_photographs(encoder, folder, FAST))
    assert [row.worst for row in rows] == [0.0] * 4
    encoder.images = replace(encoder.images, resample="bilinear")
    assert not any(row.passed for row in compare_photographs(encoder, folder, FAST))
    encoder.images = replace(encoder.images, sizing=None)
    rows = list(compare_photographs(encoder, folder, FAST))
    assert [row.worst for row in rows] == [torch.inf] * 4


def test_wrong_weights_or_settings_in_what_we_save_are_noticed(folders: Callable[[str], Path]):
    folder = folders("dinov2 plain")
    encoder = packvit.load(folder, device="cpu")
    reference = ReferenceModel(encoder.family, folder)
    assert all(row.passed for row in compare_saved(encoder, reference))
    encoder.config = replace(encoder.config, norm_eps=1e-3)
    rows = compare_saved(encoder, reference)
    assert [row.passed for row in rows] == [True, False, False, False]
    encoder.get_parameter("norm.weight").data[0] += 1e-6
    weights, *_ = compare_saved(encoder, reference)
    assert (weights.worst, weights.passed) == (1.0, False)


def test_the_original_layout_is_verified_as_it_was_converted(
    folders: Callable[[str], Path], tmp_path: Path
):
    packvit.load(folders("aimv2 fixed"), device="cpu").save_pretrained(tmp_path, "original")
    found = verify_checkpoint(tmp_path, FAST, device="cpu")
    assert not found.missed
    assert found.remarks[0].startswith("transformers does not read this layout")


def test_a_checkpoint_that_names_no_reference_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
):
    packvit.load(folders("dinov2 plain"), device="cpu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for named in (["Dinov2ForImageClassification"], None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
        with pytest.raises(CheckpointError, match=r"Dinov2Model, Dinov2WithRegistersModel\.$"):
            verify_checkpoint(tmp_path, FAST)


def test_without_transformers_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'packvit\[reference\]'"):
        verify_checkpoint("tiny", FAST)


def checkpoint_of(encoder: Encoder):
    assert encoder.checkpoint
    return encoder.checkpoint


def test_a_certificate_vouches_for_what_it_covers_and_nothing_else(tmp_path: Path):
    encoder, variant = VARIANTS["aimv2 headless"]
    write_random(variant, encoder.family, tmp_path, seed=0)
    made = certificate.certify(
        [verify_checkpoint(tmp_path, VerifyOptions(quick=True), device="cpu")]
    )
    checkpoint = checkpoint_of(packvit.load(tmp_path, device="cpu"))
    weights, job = checkpoint.sha256(), {"device": "cpu", "dtype": "bfloat16", "backend": "sdpa"}
    assert made["passed"] is True
    assert certificate.why_not(made, checkpoint, weights, **job) is None
    older = made | {"machine": made["machine"] | {"torch": "2.11.0"}}
    other = replace(checkpoint, config={**checkpoint.config, "rms_norm_eps": 1e-6})
    for found, of, digest, changes, reason in (
        (made | {"format": "?"}, checkpoint, weights, {}, "another format"),
        (made | {"passed": False}, checkpoint, weights, {}, "failed"),
        (older, checkpoint, weights, {}, "made with torch 2.11.0, and this is"),
        (made, checkpoint, "0" * 64, {}, "other weights"),
        (made, other, weights, {}, "another config.json"),
        (made, checkpoint, weights, {"dtype": "float16"}, "does not cover float16 on cpu"),
        (made, checkpoint, weights, {"device": "cuda"}, "does not cover bfloat16 on cuda"),
    ):
        assert reason in (certificate.why_not(found, of, digest, **job | changes) or "")


def test_a_certificate_beside_the_checkpoint_is_taken_over_unless_it_is_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, variant = VARIANTS["aimv2 headless"]
    write_random(variant, encoder.family, tmp_path, seed=0)
    made = certificate.certify(
        [verify_checkpoint(tmp_path, VerifyOptions(quick=True), device="cpu")]
    )
    certificate.write(tmp_path / certificate.NAME, made | {"date": "then"})
    loaded = packvit.load(tmp_path, device="cpu")
    assert vouch(loaded, checkpoint_of(loaded).sha256())["date"] == "then"

    write_random(variant, encoder.family, tmp_path, seed=1)
    loaded = packvit.load(tmp_path, device="cpu")
    anew = vouch(loaded, checkpoint_of(loaded).sha256())
    assert anew["date"] != "then"
    assert anew["models"][0]["weights"] == checkpoint_of(loaded).sha256()

    monkeypatch.setattr(rule, "RMS_TIMES", 0.0)
    monkeypatch.setattr(rule, "floor_of", lambda dtype, blocks: 0.0)
    with pytest.raises(VerificationError, match=r"is not verified: \d+ of \d+ comparisons with"):
        vouch(loaded, checkpoint_of(loaded).sha256())


def test_a_difference_that_is_no_number_is_a_miss_and_is_written_as_null(tmp_path: Path):
    row = Comparison("tokens", "1 x 1", "rms", "alone", "float32", "sdpa", float("nan"), 5e-6)
    assert not row.passed
    assert certificate.row_object(row)["worst"] is None
    certificate.write(tmp_path / "c.json", {"rows": [certificate.row_object(row)]})
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["passed"] is False


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_passes_on_a_gpu(name: str):
    encoder, variant = VARIANTS[name]
    found = verify_variant(encoder, variant, VerifyOptions(quick=True), "cuda")
    assert [row.said for row in found.missed] == []
    assert {row.backend for row in found.rows} >= {"sdpa", "torch"}


@pytest.mark.soak
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_passes_the_full_grid(name: str):
    encoder, variant = VARIANTS[name]
    found = verify_variant(encoder, variant, VerifyOptions(), "cpu")
    assert [row.said for row in found.missed] == []
    assert {"64 x 64", "64 x 64, interpolated"} & {row.where for row in found.rows} or (
        "fixed" in name or "LiT" in name
    )
