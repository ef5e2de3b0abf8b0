"""What happens where memory has no room for a pack."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from features import contents
from rotten import write_good

import packvit
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import Commit, decode_commit, encode_commit, read_commits
from packvit.families.aimv2 import AIMv2Packing
from packvit.packs.features import Features


class Narrow(AIMv2Packing):
    """An encoder on a device that has room for 60 tokens at a time."""

    room = 60

    def encode(self, hidden_states: Any, grid_thw: Any = None, **asked: Any) -> Features:
        if len(hidden_states) > self.room:
            raise torch.OutOfMemoryError(f"{len(hidden_states)} tokens do not fit.")
        return super().encode(hidden_states, grid_thw, **asked)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 20)
    return folder


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [
        row for entry in read_commits(out) for row in pq.read_table(out / entry.part).to_pylist()
    ]


def test_a_pack_that_does_not_fit_is_halved_and_nothing_but_an_image_too_large_is_lost(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    whole = packvit.embed(photos, out=tmp_path / "whole", model=checkpoint, device="cpu")
    expected = read_rows(tmp_path / "whole")
    sizes = sorted(row["rows"] * row["columns"] for row in expected)
    Narrow.room = max(size for size in sizes if size < sizes[-1])
    lost = sum(size > Narrow.room for size in sizes)
    assert 0 < lost < len(sizes)
    narrow = Narrow.from_pretrained(checkpoint, device="cpu")
    summary = packvit.embed(photos, out=tmp_path / "out", model=narrow)
    assert (whole.halved, summary.halved) == (0, 1)
    assert (summary.ok, summary.errors) == (20 - lost, {"out_of_memory": lost})
    (entry,) = read_commits(tmp_path / "out")
    assert entry.halved == 1
    assert json.loads((tmp_path / "out" / "_commits.jsonl").read_text())["halved"] == 1
    for row, right in zip(read_rows(tmp_path / "out"), expected, strict=True):
        if row["rows"] * row["columns"] > Narrow.room:
            assert (row["status"], row["stage"]) == ("out_of_memory", "encode")
            assert row["pooled"] is None
        else:
            assert row["status"] == "ok"
            assert np.abs(np.subtract(row["pooled"], right["pooled"])).max() <= 2e-5
    assert not check_folder(tmp_path / "out").faults
    before = contents(tmp_path / "out")
    again = packvit.embed(photos, out=tmp_path / "out", model=narrow)
    assert again.kept_rows == 20
    assert before == contents(tmp_path / "out")


def test_a_line_says_how_many_packs_were_halved_only_where_some_were():
    plain = Commit("data/part-00000.parquet", 1, 0, 9, 100, "0" * 64)
    assert "halved" not in encode_commit(plain)
    assert decode_commit(encode_commit(plain).encode() + b"\n") == plain
    halved = Commit("data/part-00000.parquet", 1, 0, 9, 100, "0" * 64, 3)
    line = encode_commit(halved)
    assert decode_commit(line.encode() + b"\n") == halved
    for wrong in ("0", "true", '"3"', "3.0"):
        assert decode_commit(line.replace(": 3}", f": {wrong}}}").encode() + b"\n") is None


def test_shares_and_fill_say_what_was_done(tmp_path: Path, photos: Path, checkpoint: Path):
    done = packvit.embed(
        photos,
        out=tmp_path / "out",
        model=checkpoint,
        device="cpu",
        token_budget=100,
        max_patches=64,
    )
    lengths = [row["rows"] * row["columns"] for row in read_rows(tmp_path / "out")]
    packs = done.tokens / (done.shares.fill * 100)
    assert packs == pytest.approx(round(packs))
    assert sum(lengths) / 100 <= packs <= len(lengths)
    for share in (done.shares.decoding, done.shares.encoding, done.shares.writing):
        assert 0 < share <= 1
    assert done.shares.slowest in ("decoding", "encoding", "writing")


@pytest.mark.gpu
def test_a_pack_that_a_gpu_has_no_room_for_is_halved(tmp_path: Path, checkpoint: Path):
    (first,) = write_good(tmp_path / "photos", 1)
    for number in range(999):
        os.link(tmp_path / "photos" / first, tmp_path / "photos" / f"{number:03}.jpg")
    encoder = packvit.load(checkpoint, device="cuda", dtype=torch.float32)
    options: dict[str, Any] = {"model": encoder, "taps": (0, 1, 2), "dtype_out": "float32"}
    packvit.embed(tmp_path / "photos" / first, out=tmp_path / "warm", **options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.memory_reserved()
    whole = packvit.embed(tmp_path / "photos", out=tmp_path / "whole", **options)
    torch.cuda.empty_cache()
    room = free + (torch.cuda.max_memory_reserved() - free) * 0.6
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        summary = packvit.embed(tmp_path / "photos", out=tmp_path / "out", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert whole.halved == 0 < summary.halved
    assert summary.ok == 1000
    for row, right in zip(read_rows(tmp_path / "out"), read_rows(tmp_path / "whole"), strict=True):
        assert np.abs(np.subtract(row["pooled"], right["pooled"])).max() <= 1e-3
