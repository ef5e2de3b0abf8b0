"""JPEGs that the device decodes: the same rows, patches and parts as Pillow's, whatever befalls."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import embed_with, parts, read_rows, write_mixed
from PIL import Image
from rotten import encode, pixels, write_good

import packvit
from packvit.config import ImageConfig
from packvit.corpus import UsageError, starting
from packvit.corpus.decode.prepare import Decode, JpegFile, Prepared, Preprocessing
from packvit.corpus.decode.queue import Decoders
from packvit.corpus.encode.context import DecodeJpegs, EmbedContext, make_context
from packvit.corpus.encode.filling import Part, PreparedPack, Shard
from packvit.corpus.encode.jpegs import JpegStage
from packvit.corpus.encode.packs import OnDevice, collect, encode_halved, lay, submit
from packvit.corpus.folder.layout import fingerprint, read_commits
from packvit.corpus.folder.parts import Outputs
from packvit.corpus.folder.resume import differences
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Input
from packvit.corpus.manifest import describe_job
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.gpu.decoder import Decoded
from packvit.gpu.jpeg import JpegPlan, plan_jpeg
from packvit.images.decode import decode
from packvit.images.patches import cut_patches

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_mixed(folder)
    return folder


def by_pillow(refused: Sequence[int] = (), room: int = 1 << 30) -> DecodeJpegs:
    """Stand in for a GPU that decodes with Pillow, has no engine for files of the widths `refused`,
    and room for so many pixels.
    """

    def decode_jpegs(files: Sequence[bytes | np.ndarray], plans: Sequence[JpegPlan]) -> Decoded:
        if sum(plan.jpeg.height * plan.jpeg.width for plan in plans) > room:
            raise torch.OutOfMemoryError("There is no room for these planes.")
        cut, failed = [], []
        for place, (file, plan) in enumerate(zip(files, plans, strict=True)):
            if plan.jpeg.width in refused:
                failed.append(place)
                cut.append(np.zeros((plan.patches, 588), np.uint8))
                continue
            size = plan.size
            image = decode(bytes(file)).image.resize(
                (size.width, size.height), Image.Resampling.BICUBIC
            )
            cut.append(cut_patches(np.asarray(image), 14))
        return Decoded(torch.from_numpy(np.concatenate(cut)), tuple(failed))

    return decode_jpegs


def test_a_workers_answer_for_a_jpeg_is_its_row_as_pillow_writes_it_its_bytes_and_its_plan(
    photos: Path,
):
    preprocessing = Preprocessing(IMAGES, "hwc", "native", 64, 100_000_000)
    inputs = list(list_inputs([str(photos)]))
    handed = 0
    with Decoders(2) as decoders:
        theirs = list(decoders.prepare_all(inputs, preprocessing, 1 << 24))
        ours = list(decoders.prepare_all(inputs, replace(preprocessing, decode="gpu"), 1 << 24))
    for source, found, right in zip(inputs, ours, theirs, strict=True):
        if found.jpeg is None:
            assert found.row == right.row
            assert (found.patches is None) == (right.patches is None)
            if found.patches is not None and right.patches is not None:
                assert np.array_equal(found.patches, right.patches)
            continue
        handed += 1
        assert found.row == right.row
        assert found.patches is None
        assert right.patches is not None
        data = Path(source.path).read_bytes()
        assert found.jpeg.source == source
        assert bytes(found.jpeg.data) == data
        plan = plan_jpeg(data, IMAGES, resize="native", max_patches=64)
        assert found.jpeg.plan == plan
        assert found.row.patches == found.jpeg.plan.patches == len(right.patches)
    assert handed > 30


def test_parts_are_the_same_bytes_whoever_decodes(tmp_path: Path, encoder: Encoder, photos: Path):
    spent = [
        embed_with(encoder, photos, tmp_path / name, decode_jpegs)
        for name, decode_jpegs in (("pil", None), ("gpu", by_pillow()))
    ]
    assert len(parts(tmp_path / "pil")) > 3
    assert parts(tmp_path / "pil") == parts(tmp_path / "gpu")
    assert (spent[0].packs, spent[0].tokens) == (spent[1].packs, spent[1].tokens)
    assert spent[0].on_gpu == 0
    assert spent[1].on_gpu > 30
    assert spent[1].decoding > 0


def test_what_the_device_refuses_goes_through_pillow_and_nothing_is_lost(
    tmp_path: Path, encoder: Encoder, photos: Path
):
    whole = embed_with(encoder, photos, tmp_path / "pil", None)
    widths = [width for width in range(100, 201) if width % 2]
    some = embed_with(encoder, photos, tmp_path / "some", by_pillow(refused=widths))
    none = embed_with(encoder, photos, tmp_path / "none", by_pillow(refused=range(1, 5001)))
    assert parts(tmp_path / "pil") == parts(tmp_path / "some") == parts(tmp_path / "none")
    assert 0 < some.on_gpu < 30
    assert none.on_gpu == 0
    assert whole.tokens == some.tokens == none.tokens


def test_a_refused_file_that_pillow_refuses_too_is_a_row_with_its_code(
    tmp_path: Path, encoder: Encoder
):
    """A file that is cut off between its two readings, say: the second one is believed."""
    names = write_good(tmp_path, 9)
    inputs = [Input(name, str(tmp_path / name)) for name in names if name.endswith("jpg")]
    options = EmbedOptions(resize="native", max_patches=64, decode="gpu")
    with options.decoders() as decoders:
        context = EmbedContext(encoder, options, decoders, by_pillow(refused=range(5001)))
        images = list(decoders.prepare_all(inputs, context.preprocessing, 1 << 24))
        assert all(image.jpeg for image in images)
        data = Path(inputs[1].path).read_bytes()
        Path(inputs[1].path).write_bytes(data[: len(data) // 2])
        with JpegStage(context) as jpegs:
            ready = jpegs.make_ready(images)
            assert ready
            assert [image.row.status for image in ready] == ["ok", "truncated", "ok"]
            encoded, _, pieces = encode_halved(encoder, images, options, jpegs.make_ready)
            lone, _, _ = encode_halved(encoder, images[1:2], options, jpegs.make_ready)
    assert pieces == 1
    assert [image.row.status for image in encoded] == ["ok", "truncated", "ok"]
    assert [[len(each) for each in image.vectors.values()] for image in encoded] == [[32], [], [32]]
    assert [image.row.status for image in lone] == ["truncated"]
    alone, _ = collect(submit(encoder, [ready[0], ready[2]], options), "float16")
    assert np.array_equal(alone[1].vectors["pooled"], encoded[2].vectors["pooled"])


def test_a_pack_that_the_device_has_no_room_to_decode_is_halved_and_noted(
    tmp_path: Path, encoder: Encoder, photos: Path
):
    embed_with(encoder, photos, tmp_path / "pil", None)
    embed_with(encoder, photos, tmp_path / "gpu", by_pillow(room=24_000))
    entries = read_commits(tmp_path / "gpu")
    assert sum(entry.halved for entry in entries) > 0
    lost = 0
    for row, right in zip(read_rows(tmp_path / "gpu"), read_rows(tmp_path / "pil"), strict=True):
        if row["status"] == "out_of_memory":
            lost += 1
            assert row["id"].startswith("jpeg-")
            assert row["width"] * row["height"] > 24_000
            assert (row["stage"], row["pooled"]) == ("encode", None)
        elif row["status"] == "ok":
            assert np.abs(np.subtract(row["pooled"], right["pooled"])).max() <= 2e-5
        else:
            assert row == right
    assert 0 < lost < 10


def test_a_workers_fault_ends_the_job_from_whichever_thread_it_is_seen(
    tmp_path: Path, encoder: Encoder, photos: Path
):
    def broken(files: Sequence[bytes | np.ndarray], plans: Sequence[JpegPlan]) -> Decoded:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        embed_with(encoder, photos, tmp_path / "out", broken)


def test_patches_of_host_and_device_are_laid_in_the_packs_order():
    draw = np.random.default_rng(0)
    cut = [draw.integers(0, 256, (length, 588), dtype=np.uint8) for length in (3, 1, 4, 2)]
    row = Row("")
    for mask in range(16):
        images = [
            OnDevice(row, torch.from_numpy(patches))
            if mask >> place & 1
            else Prepared(row, patches)
            for place, patches in enumerate(cut)
        ]
        assert np.array_equal(lay(images, torch.device("cpu")).numpy(), np.concatenate(cut))


def test_jpegs_that_wait_for_their_pack_count_by_their_bytes(tmp_path: Path):
    """With a budget of nothing one file comes at a time, until they are let go of."""
    names = write_good(tmp_path, 30)
    inputs = [Input(name, str(tmp_path / name)) for name in names if name.endswith("jpg")]
    preprocessing = Preprocessing(IMAGES, "hwc", "native", 64, 100_000_000, "gpu")
    sizes = [os.path.getsize(source.path) // 3 for source in inputs]
    taken: list[Prepared] = []
    with (
        Decoders(2, pixels_in_flight=1) as decoders,
        decoders.queue(inputs, preprocessing, 1 << 24) as queue,
    ):
        for image in queue.take():
            taken.append(image)
            assert queue.begun <= queue.wanted + 1
            assert queue.held == sum(sizes[: queue.wanted])
        queue.release(taken)
        assert queue.held == queue.waiting == queue.pixels == 0
    assert [image.row.status for image in taken] == ["ok"] * 10


@pytest.mark.parametrize(("decode_jpegs", "ahead"), [(by_pillow(), 1), (None, 0)])
def test_one_pack_is_decoded_while_another_is_encoded_and_pillows_wait_for_none(
    encoder: Encoder, decode_jpegs: DecodeJpegs | None, ahead: int
):
    data = encode(pixels(56, 56), "JPEG")
    plan = plan_jpeg(data, IMAGES)
    assert isinstance(plan, JpegPlan)
    row, source = Row("a.jpg", rows=4, columns=4), Input("a.jpg", "a.jpg")
    image = Prepared(row, jpeg=JpegFile(data, plan, source))
    if decode_jpegs is None:
        image = Prepared(row, np.zeros((16, 588), np.uint8))
    part = Part.of(Shard(0, (source,) * 6), Outputs(32, (), "float16"))
    pulled = 0

    def packs() -> Iterator[PreparedPack]:
        nonlocal pulled
        for place in range(6):
            pulled += 1
            yield PreparedPack(part, [place], [image])

    with (
        Decoders(1) as decoders,
        JpegStage(EmbedContext(encoder, EmbedOptions(), decoders, decode_jpegs)) as jpegs,
    ):
        for number, (pack, ready) in enumerate(jpegs.make_all_ready(packs()), 1):
            assert pulled == min(6, number + ahead)
            assert pack.places == [number - 1]
            assert ready
            assert isinstance(ready[0], OnDevice) == bool(ahead)


def test_asking_for_a_gpu_where_there_is_none_is_refused_in_a_sentence(
    tmp_path: Path,
    encoder: Encoder,
    checkpoint: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(UsageError, match=r"needs a CUDA device, but the encoder is on cpu\. Use"):
        packvit.embed(photos, out=tmp_path / "out", model=encoder, decode="gpu")
    monkeypatch.delattr(starting, "make_context")  # a parent of processes makes no decoder itself
    with pytest.raises(UsageError, match=r"needs a CUDA device"):
        packvit.embed(
            photos, out=tmp_path / "out", model=checkpoint, device="cpu", decode="gpu", processes=2
        )
    assert not (tmp_path / "out").exists()
    with Decoders(1) as decoders:
        assert make_context(encoder, EmbedOptions(), decoders).decode_jpegs is None


def test_jobs_that_decode_otherwise_are_told_apart(encoder: Encoder):
    """Damaged scans differ, so that a folder of both kinds would be neither job's."""
    by_pil, by_gpu, by_drafts = (
        describe_job(encoder, "", EmbedOptions(resize="native", max_patches=64, decode=decode))
        for decode in ("pil", "gpu", "fast")
    )
    assert list(differences(by_pil, by_gpu)) == ['preprocessing.decode: "pil" -> "gpu"']
    assert 'preprocessing.decode: "pil" -> "fast"' in differences(by_pil, by_drafts)
    assert len({fingerprint(each) for each in (by_pil, by_gpu, by_drafts)}) == 3


def test_a_job_of_drafts_neither_resumes_nor_takes_over_exact_rows_nor_they_its(
    tmp_path: Path, encoder: Encoder
):
    photos = tmp_path / "photos"
    write_good(photos, 3)
    ways: tuple[Decode, ...] = ("pil", "fast")
    for way in ways:
        packvit.embed(photos, out=tmp_path / way, model=encoder, decode=way)
    for old, new in (ways, ways[::-1]):
        said, reuse = f'preprocessing.decode: "{old}" -> "{new}"', [tmp_path / old]
        with pytest.raises(UsageError, match=said):
            packvit.embed(photos, out=tmp_path / old, model=encoder, decode=new)
        with pytest.raises(UsageError, match=said):
            packvit.embed(photos, out=tmp_path / "c", model=encoder, decode=new, reuse=reuse)


@pytest.mark.parametrize(("own", "found"), [(None, "32"), ("8", "8")])
def test_cuda_is_asked_for_queues_before_it_begins_unless_the_user_has(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, own: str | None, found: str
):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "to be restored")
    monkeypatch.delenv(name) if own is None else monkeypatch.setenv(name, own)
    write_good(tmp_path / "photos", 1)
    packvit.embed(tmp_path / "photos", out=tmp_path / "pil", model=encoder)
    assert os.environ.get(name) == own
    with pytest.raises(UsageError):  # the encoder is on a CPU
        packvit.embed(tmp_path / "photos", out=tmp_path / "gpu", model=encoder, decode="gpu")
    assert os.environ[name] == found
