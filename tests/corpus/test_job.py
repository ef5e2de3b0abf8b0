import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from features import contents
from PIL import Image
from rotten import encode, pixels, write_good, write_rotten
from small_checkpoint import LAYERS, WIDTH, write_checkpoint

import packvit
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import fingerprint, read_commits, read_manifest
from packvit.corpus.job import embed
from packvit.corpus.progress import Progress, Shares
from packvit.corpus.settings import choose_rows
from packvit.encoder import Encoder
from packvit.packs.features import image_means


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 30)
    return folder


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Read what the log says is whole, and believe no other file."""
    rows = []
    for entry in read_commits(out):
        data = (out / entry.part).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        rows += pq.read_table(out / entry.part, page_checksum_verification=True).to_pylist()
    return rows


def difference(found: Any, expected: torch.Tensor) -> float:
    """Return the scaled difference: of two ways to the same numbers in float32."""
    expected = expected.double()
    largest = float((torch.as_tensor(np.array(found)).double() - expected).abs().max())
    return largest / max(1.0, float(expected.abs().max()) / 4)


def test_every_input_ends_as_the_row_that_says_what_became_of_it(tmp_path: Path, encoder: Encoder):
    codes = write_rotten(tmp_path / "photos")
    summary = embed(tmp_path / "photos", out=tmp_path / "out", model=encoder)
    rows = read_rows(tmp_path / "out")
    written = {os.fsencode(name).decode(errors="backslashreplace"): c for name, c in codes.items()}
    assert {row["id"]: row["status"] for row in rows} == written
    assert len(rows) == len(codes) == summary.rows
    for row in rows:
        good = row["status"] == "ok"
        assert (row["stage"] is None) == good == (row["pooled"] is not None)
        assert not good or np.isfinite(row["pooled"]).all()
        read = row["stage"] not in ("list", "read")
        assert (row["sha256"] is not None) == read
        if read:
            path = os.fsencode(tmp_path / "photos") + b"/" + row["id"].encode()
            data = Path(os.fsdecode(path.replace(rb"\xe9", b"\xe9"))).read_bytes()
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
    stages = {row["id"]: row["stage"] for row in rows}
    assert stages["pipe.jpg"] == stages["broken-link.jpg"] == "list"
    assert stages["unreadable.jpg"] == "read"
    assert stages["bomb.png"] == stages["text.jpg"] == "header"
    assert stages["cut-70-png.png"] == "decode"
    assert summary.errors == {
        code: sum(found == code for found in codes.values()) for code in summary.errors
    }
    assert summary.ok + sum(summary.errors.values()) == summary.rows
    assert written[summary.examples["truncated"]] == "truncated"


@pytest.mark.parametrize("budget", [64, 100, 16384])
def test_features_are_those_of_each_image_alone_in_the_order_of_the_inputs(
    tmp_path: Path, photos: Path, encoder: Encoder, budget: int
):
    embed(
        photos,
        out=tmp_path / "out",
        model=encoder,
        max_patches=64,
        token_budget=budget,
        tokens=True,
        taps=(-1, 0),
        dtype_out="float32",
    )
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == sorted(os.listdir(photos))
    for row in rows:
        with Image.open(photos / row["id"]) as image:
            assert (row["width"], row["height"]) == image.size
        alone = encoder.pack([photos / row["id"]], max_patches=64)
        assert [[row["frames"], row["rows"], row["columns"]]] == alone.grid_thw.tolist()
        with torch.inference_mode():
            expected = encoder.encode(alone.hidden_states, alone.grid_thw, taps=(0, LAYERS - 1))
        assert expected.pooled is not None
        assert difference(row["pooled"], expected.pooled[0]) <= 5e-6
        assert difference(row["tokens"], expected.tokens) <= 5e-6
        assert difference(row["tap_0"], expected.taps[0]) <= 5e-6
        assert difference(row[f"tap_{LAYERS - 1}"], expected.taps[LAYERS - 1]) <= 5e-6


def test_the_same_job_gives_the_same_bytes_on_any_number_of_workers(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    for workers in (1, 4):
        embed(photos, out=tmp_path / str(workers), model=checkpoint, workers=workers, tokens=True)
    assert sorted(contents(tmp_path / "1")) == [
        ".lock",
        "_commits.jsonl",
        "_manifest.json",
        "data/part-00000.parquet",
    ]
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


@pytest.mark.gpu
def test_the_same_job_on_a_gpu_gives_the_same_bytes(tmp_path: Path, photos: Path, checkpoint: Path):
    for name in ("first", "again"):
        done = embed(photos, out=tmp_path / name, model=checkpoint, device="cuda", tokens=True)
        assert done.ok == 30
    part = "data/part-00000.parquet"
    assert (tmp_path / "first" / part).read_bytes() == (tmp_path / "again" / part).read_bytes()
    assert (read_manifest(tmp_path / "first") or {})["dtype"] == "bfloat16"


def test_parts_hold_a_fixed_number_of_inputs_and_nothing_is_lost_between_them(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    (tmp_path / "many").mkdir()
    for number in range(150):
        os.link(photos / "good-0000.jpg", tmp_path / "many" / f"{number:03}.jpg")
    embed(tmp_path / "many", out=tmp_path / "out", model=encoder, taps=(1,))
    assert [entry.rows for entry in read_commits(tmp_path / "out")] == [64, 64, 22]
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"{number:03}.jpg" for number in range(150)]
    embed(tmp_path / "many", out=tmp_path / "pooled", model=encoder, rows_per_part=100)
    assert [entry.rows for entry in read_commits(tmp_path / "pooled")] == [100, 50]


def test_rows_per_part_are_written_down_and_taken_up_again_and_others_are_refused(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    out = tmp_path / "out"
    embed(photos, out=out, model=encoder, rows_per_part=7)
    whole = contents(out)
    assert (read_manifest(out) or {})["rows_per_part"] == 7
    (out / "data" / "part-00001.parquet").unlink()
    embed(photos, out=out, model=encoder)
    assert contents(out) == whole
    with pytest.raises(UsageError, match=r"another job(.|\n)*rows_per_part: 7 -> 8\n"):
        embed(photos, out=out, model=encoder, rows_per_part=8)
    with pytest.raises(UsageError, match=r"rows_per_part is 0, but must be 1 or more"):
        embed(photos, out=tmp_path / "none", model=encoder, rows_per_part=0)


@pytest.mark.parametrize(
    ("device", "inputs", "large", "rows"),
    [
        ("cpu", 1_000_000, False, 64),
        ("cuda", 1_000_000, False, 1024),
        ("cuda", 1_000_000, True, 64),
        ("cuda", 15 * 1024 + 1, False, 1024),  # 16 parts
        ("cuda", 15 * 1024, False, 512),
        ("cuda", 1000, False, 64),
        ("cuda", 1, False, 64),
    ],
)
def test_parts_are_small_on_a_cpu_with_tokens_and_where_there_would_be_few(
    device: str, inputs: int, large: bool, rows: int
):
    assert choose_rows(torch.device(device), inputs, large=large) == rows


def test_where_a_checkpoint_has_no_head_the_mean_of_the_tokens_is_pooled_and_said_so(
    tmp_path: Path, photos: Path
):
    headless = packvit.load(write_checkpoint(tmp_path / "headless", head=False), device="cpu")
    embed(photos, out=tmp_path / "out", model=headless, tokens=True, dtype_out="float32")
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert manifest["pooled"] == "mean of tokens"
    for row in read_rows(tmp_path / "out"):
        mean = torch.tensor(row["tokens"], dtype=torch.float64).mean(0)
        assert difference(row["pooled"], mean) <= 5e-6


def means_differ(device: str) -> float:
    lengths = [1, 700, 3, 64]
    tokens = torch.randn(sum(lengths), 48, generator=torch.Generator().manual_seed(0)).to(device)
    found = image_means(tokens, lengths)
    assert torch.equal(found, image_means(tokens, lengths))
    expected = torch.stack([part.double().mean(0) for part in tokens.cpu().split(lengths)])
    return float((found.double().cpu() - expected).abs().max())


def test_means_are_exact_to_float32():
    assert means_differ("cpu") < 1e-6


@pytest.mark.gpu
def test_means_are_exact_to_float32_and_the_same_each_time_on_a_gpu():
    assert means_differ("cuda") < 1e-6


def test_an_image_beyond_the_budget_travels_alone_where_nothing_bounds_it(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    common = {"model": encoder, "resize": "checkpoint"}
    embed(photos, out=tmp_path / "small", token_budget=10, **common)
    embed(photos, out=tmp_path / "large", **common)
    small, large = read_rows(tmp_path / "small"), read_rows(tmp_path / "large")
    assert max(row["rows"] * row["columns"] for row in small) > 10
    for left, right in zip(small, large, strict=True):
        assert difference(left["pooled"], torch.tensor(right["pooled"])) <= 5e-6


def test_features_that_are_no_numbers_are_errors_and_nothing_of_them_is_written(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    broken = packvit.load(checkpoint, device="cpu")
    with torch.no_grad():
        broken.state_dict()["norm.weight"][0] = torch.nan
    summary = embed(photos, out=tmp_path / "out", model=broken, tokens=True)
    assert (summary.ok, summary.errors) == (0, {"non_finite": 30})
    for row in read_rows(tmp_path / "out"):
        assert (row["stage"], row["pooled"], row["tokens"]) == ("encode", None, None)
        assert row["rows"]


def test_tokens_too_large_for_float16_are_errors_that_name_it_and_float32_holds_them(
    tmp_path: Path, photos: Path
):
    loud = write_checkpoint(tmp_path / "loud", scale=1e6)
    summary = embed(photos, out=tmp_path / "half", model=loud, device="cpu", tokens=True)
    assert summary.errors == {"overflow": 30}
    assert {row["note"] for row in read_rows(tmp_path / "half")} == {"beyond float16"}
    whole = embed(
        photos, out=tmp_path / "full", model=loud, device="cpu", tokens=True, dtype_out="float32"
    )
    pooled = embed(photos, out=tmp_path / "pooled", model=loud, device="cpu")
    assert whole.ok == pooled.ok == 30


def test_progress_grows_until_every_row_is_committed(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    told: list[Progress] = []
    write_rotten(tmp_path / "rotten")
    summary = embed(
        [tmp_path / "rotten", photos],
        out=tmp_path / "out",
        model=encoder,
        taps=(0,),
        progress=told.append,
    )
    assert replace(told[0], shares=Shares()) == Progress(summary.rows)
    for before, after in pairwise(told):
        for name in ("settled", "errors", "tokens", "committed"):
            assert getattr(before, name) <= getattr(after, name)
    errors = sum(summary.errors.values())
    last = Progress(summary.rows, summary.rows, errors, summary.tokens, summary.rows)
    assert replace(told[-1], shares=Shares()) == last
    assert summary.tokens == sum(entry.tokens for entry in read_commits(tmp_path / "out"))


def test_the_manifest_says_what_was_run_and_counts_what_was_written(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    summary = embed(photos, out=tmp_path / "out", model=checkpoint, device="cpu")
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert manifest["complete"] is True
    tokens = sum(row["rows"] * row["columns"] for row in read_rows(tmp_path / "out"))
    counts = {"rows": 30, "ok": 30, "errors": {}, "tokens": tokens, "parts": 1}
    assert manifest["counts"] == counts
    assert manifest["model"] == str(checkpoint)
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    line = f"{digest}  model.safetensors\n"
    assert manifest["weights_sha256"] == hashlib.sha256(line.encode()).hexdigest()
    assert manifest["pooled"] == "checkpoint"
    assert manifest["token_budget"] == 16384
    assert manifest["preprocessing"]["resize"] == "native"
    assert manifest["preprocessing"]["max_patches"] == 1024
    assert (manifest["device"], manifest["dtype"]) == ("cpu", "float32")
    assert manifest["attention"] == "sdpa"
    assert manifest["versions"]["torch"] == version("torch")
    other = ("format", "complete", "fingerprint", "model", "inputs", "ignored", "counts")
    other += ("certificate_sha256", "exports", "retries", "device_names", "root")
    settings = {name: value for name, value in manifest.items() if name not in other}
    assert len(manifest["device_names"]) == 1
    assert manifest["retries"] == {"pauses": [0.5, 2.0, 8.0], "longest": 20.0}
    assert manifest["fingerprint"] == summary.fingerprint == fingerprint(settings)


@pytest.mark.parametrize(
    "change",
    [
        {"token_budget": 2048},
        {"max_patches": 16},
        {"tokens": True},
        {"max_pixels": 1_000_000},
        {"dtype": "bfloat16"},
        {"resize": "checkpoint"},
    ],
)
def test_the_fingerprint_changes_with_whatever_decides_the_numbers(
    tmp_path: Path, photos: Path, checkpoint: Path, change: dict[str, Any]
):
    photo = photos / "good-0000.jpg"
    first, again = (
        embed(photo, out=tmp_path / name, model=checkpoint, device="cpu", workers=workers)
        for name, workers in (("first", 1), ("again", 2))
    )
    other = embed(photo, out=tmp_path / "other", model=checkpoint, device="cpu", **change)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_an_encoder_in_memory_is_known_by_the_weights_it_has_now(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    encoder = packvit.load(checkpoint, device="cpu")
    photo = photos / "good-0000.jpg"
    before = embed(photo, out=tmp_path / "before", model=encoder)
    with torch.no_grad():
        encoder.state_dict()["norm.weight"][0] += 1
    after = embed(photo, out=tmp_path / "after", model=encoder)
    assert before.fingerprint != after.fingerprint


def refuse(message: str, out: Path, photos: str | Path | Sequence[str], **options: Any) -> None:
    with pytest.raises(UsageError, match=message):
        embed(photos, out=out, **options)
    assert not out.exists()


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    tmp_path: Path, photos: Path, checkpoint: Path, encoder: Encoder
):
    out = tmp_path / "out"
    for options, message in (
        ({"token_budget": 0}, "token_budget is 0, but must be 1 or more"),
        ({"workers": -1}, "workers is -1, but must be 1 or more"),
        ({"token_budget": 512}, "may have 1024 patches, but token_budget .* 512. Raise"),
        ({"taps": [LAYERS]}, f"taps asks for layer {LAYERS}, but this encoder has {LAYERS}"),
        ({"max_patches": 9, "resize": "checkpoint"}, "max_patches is 9, but this checkpoint's own"),
        ({"device": "cpu"}, "model is a loaded encoder, whose device, dtype"),
    ):
        refuse(message, out, photos, model=encoder, **options)
    for options, message in (
        ({"dtype": "float8"}, 'dtype is "float8", but must be one of: float32, bfloat16, float16'),
        ({"device": "toaster"}, 'device "toaster" cannot be used: .* Try `device="cpu"`'),
        ({"device": "meta"}, 'device "meta" cannot be used: it holds no numbers'),
        ({"device": "cpu", "attention": "torch"}, '"torch" cannot run: it needs CUDA tensors'),
        ({"device": "cpu", "attention": "fast"}, 'No attention backend is called "fast"'),
    ):
        refuse(message, out, photos, model=checkpoint, **options)
    refuse("No photographs were found", out, checkpoint, model=checkpoint)
    with pytest.raises(packvit.CheckpointError, match="There is no folder"):
        embed(photos, out=out, model=tmp_path / "nowhere")
    assert not out.exists()


def test_grids_without_learned_positions_are_refused_unless_interpolated(
    tmp_path: Path, photos: Path
):
    fixed = write_checkpoint(tmp_path / "fixed", native=False)
    common = {"model": fixed, "device": "cpu"}
    assert embed(photos, out=tmp_path / "own", **common).ok == 30
    assert {row["rows"] for row in read_rows(tmp_path / "own")} == {2}
    refuse(
        "learned positions for 2 x 2 patches", tmp_path / "out", photos, resize="native", **common
    )
    done = embed(photos, out=tmp_path / "out", resize="native", positions="interpolate", **common)
    assert done.ok == 30


def test_without_a_chosen_model_a_thousand_inputs_are_the_most(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number in range(1001):
        (tmp_path / "photos" / f"{number}.jpg").touch()
    refuse(
        "1001 inputs were found, .* at most 1000 .* Choose", tmp_path / "out", tmp_path / "photos"
    )


def test_photographs_of_a_single_pixel_and_of_a_single_row_have_features(
    tmp_path: Path, encoder: Encoder
):
    for name, (height, width) in {"dot": (1, 1), "row": (1, 5000), "column": (5000, 1)}.items():
        (tmp_path / f"{name}.png").write_bytes(encode(pixels(height, width), "PNG"))
    embed(tmp_path, out=tmp_path / "out", model=encoder)
    found = {row["id"]: (row["rows"], row["columns"]) for row in read_rows(tmp_path / "out")}
    assert found == {"dot.png": (1, 1), "row.png": (1, 357), "column.png": (357, 1)}
    assert len(json.dumps(read_rows(tmp_path / "out")[0]["pooled"]).split(",")) == WIDTH
