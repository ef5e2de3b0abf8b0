import hashlib
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import no_file_over
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoint import write_checkpoint
from torch import Tensor
from transformers import Aimv2VisionModel

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.folders import CONFIG, EMBEDDED, INDEX, PREPROCESSOR, WEIGHTS
from packvit.checkpoints.tensors import check_finite
from packvit.verification import certificate

ROOT = Path(__file__).parents[2]
CONTENTS = {"model_type": "example", "hidden_size": 8}
IMAGES = {"image_mean": [0.5, 0.5, 0.5]}


def example(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.randn(8, generator=generator),
        "embed.weight": torch.randn(8, 3, 2, 2, generator=generator, dtype=torch.float64),
        "half.weight": torch.randn(2, 3, generator=generator).to(torch.float16),
        "brain.weight": torch.randn(3, 2, generator=generator).to(torch.bfloat16),
        "position_ids": torch.arange(5)[None],
        "scale": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }


def written(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    tensors = example() if tensors is None else tensors
    checkpoints.write(folder, config=CONTENTS, tensors=tensors, preprocessor=IMAGES)
    return folder


def sharded(folder: Path, weight_map: Any = None, **shards: dict[str, Tensor]) -> Path:
    """Write a.safetensors and so on, and an index that by default tells the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(CONTENTS))
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    truth = {t: f"{name}.safetensors" for name, tensors in shards.items() for t in tensors}
    index = {"metadata": {}, "weight_map": truth if weight_map is None else weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def refusal(name_or_folder: str | Path, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(name_or_folder, revision=revision)
    return str(caught.value)


def raw_safetensors(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# ------------------------------------------------------------------------------ reading folders


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path):
    found = checkpoints.read(written(tmp_path / "deep" / "model"))
    assert (found.config, found.preprocessor) == (CONTENTS, IMAGES)
    assert (found.revision, found.name) == (None, str(tmp_path / "deep" / "model"))
    assert found.files == (tmp_path / "deep" / "model" / WEIGHTS,)
    assert set(found.tensors) == example().keys()
    assert all(same(found.tensors[name], tensor) for name, tensor in example().items())


def test_shards_are_one_mapping_in_the_order_of_their_names(tmp_path: Path):
    one, two = {"x": torch.ones(2)}, {"y": torch.zeros(3), "z": torch.ones(1)}
    found = checkpoints.read(sharded(tmp_path, b=two, a=one))
    assert [file.name for file in found.files] == ["a.safetensors", "b.safetensors"]
    assert sorted(found.tensors) == ["x", "y", "z"]
    assert all(same(found.tensors[name], tensor) for name, tensor in (one | two).items())


def test_of_one_file_and_shards_we_read_what_transformers_reads(tmp_path: Path):
    folder, other = write_checkpoint(tmp_path / "one", scale=1), tmp_path / "other"
    model = Aimv2VisionModel.from_pretrained(write_checkpoint(other, scale=2))
    (other / WEIGHTS).unlink()
    model.save_pretrained(other, max_shard_size="20KB")
    parts = [path for path in other.iterdir() if path.name != CONFIG]
    assert len(parts) > 2  # the index and its shards
    for path in parts:
        path.rename(folder / path.name)

    def both() -> list[Mapping[str, Tensor]]:
        return [
            checkpoints.read(folder).tensors,
            Aimv2VisionModel.from_pretrained(folder).state_dict(),
        ]

    assert checkpoints.read(folder).files == (folder / WEIGHTS,)
    ours, theirs = both()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], tensor) for name, tensor in theirs.items())
    assert not same(ours["rms_norm.weight"], model.state_dict()["rms_norm.weight"])
    (folder / WEIGHTS).unlink()
    ours, theirs = both()
    assert all(same(ours[name], tensor) for name, tensor in theirs.items())
    assert same(ours["rms_norm.weight"], model.state_dict()["rms_norm.weight"])


def test_shapes_are_known_without_reading_and_reading_refuses_what_is_not_finite(tmp_path: Path):
    # Not the first by name: the type checks of test runs read the first value of any mapping.
    tensors = example() | {"spoilt.weight": torch.tensor([[1.0, float("nan")]])}
    found = checkpoints.read(written(tmp_path, tensors))
    assert found.shape_of("spoilt.weight") == (1, 2)
    assert found.shape_of("embed.weight") == (8, 3, 2, 2)
    with pytest.raises(CheckpointError, match=r"^spoilt\.weight in .* holds 1 values .* of 2;"):
        found.tensors["spoilt.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float):
    for place in (0, 500, 1000):
        tensor = torch.linspace(-1, 1, 1001).to(dtype)
        check_finite("w", tensor)
        tensor[place] = value
        with pytest.raises(CheckpointError, match=r"^w holds 1 values that are NaN or infinite"):
            check_finite("w", tensor)


def test_a_tensor_that_torch_cannot_hold_is_named_with_its_type(tmp_path: Path):
    written(tmp_path)
    header = {"a": at(0, 4, 1), "w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [4, 7]}}
    (tmp_path / WEIGHTS).write_bytes(raw_safetensors(header, bytes(7)))
    found = checkpoints.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"^w in .* is stored as F6_E2M3"):
        found.tensors["w"]


def test_a_folder_is_read_without_network_and_without_the_hub_client(tmp_path: Path):
    written(tmp_path)
    code = (
        "import socket, sys\n"
        "def refuse(*arguments): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from packvit.checkpoints import files as checkpoints\n"
        f"assert checkpoints.read({str(tmp_path)!r}).tensors['scale'] == 2.5\n"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_digest_is_that_of_the_list_which_sha256sum_prints(tmp_path: Path):
    found = checkpoints.read(sharded(tmp_path, b={"y": torch.ones(3)}, a={"x": torch.ones(2)}))
    lines = [
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.safetensors", "b.safetensors")
    ]
    assert found.sha256() == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_digest_in_memory_is_that_of_the_file_it_would_become(tmp_path: Path):
    tensors = example()
    memory = checkpoints.Checkpoint("memory", None, CONTENTS, None, tensors)
    assert memory.sha256() == checkpoints.read(written(tmp_path, tensors)).sha256()
    assert memory.shape_of("embed.weight") == (8, 3, 2, 2)
    tensors["scale"] += 1
    assert memory.sha256() != checkpoints.read(tmp_path).sha256()


def test_an_embedded_name_comes_before_a_folder_and_a_path_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EMBEDDED, "tiny", written(tmp_path / "ours", {"ours": torch.ones(1)}))
    written(tmp_path / "tiny", {"theirs": torch.ones(1)})
    assert list(checkpoints.read("tiny").tensors) == ["ours"]
    assert list(checkpoints.read("./tiny").tensors) == ["theirs"]
    assert list(checkpoints.read(Path("tiny")).tensors) == ["theirs"]
    monkeypatch.setitem(EMBEDDED, "tiny", tmp_path / "absent")
    assert "The embedded model 'tiny' is not at" in refusal("tiny")


def test_a_folder_named_like_a_hub_model_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "owner" / "model")
    assert checkpoints.read("owner/model").revision is None


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("./absent", r"There is no folder './absent'\. Check the path\."),
        ("../absent", "There is no folder '../absent'"),
        ("/absent/model", "There is no folder '/absent/model'"),
        ("~/absent-model", "There is no folder '~/absent-model'"),
        ("owner/", "There is no folder 'owner/'"),
        ("owner/model.safetensors", "There is no folder 'owner/model.safetensors'"),
        (Path("owner/model"), "There is no folder 'owner/model'"),
        ("a/b/c", "There is no folder 'a/b/c', and a hub name has the form owner/name"),
        ("model", r"a hub name has the form owner/name, with one slash\. Embedded models: tiny"),
        ("", "There is no folder '', and a hub name has the form owner/name"),
        ("a\0b", r"There is no folder 'a\\x00b', and a hub name"),
        ("x" * 5000, "There is no folder 'xxx"),
        ("owner/na me", r"There is no folder 'owner/na me', and it cannot be a hub name"),
    ],
)
def test_a_name_that_is_neither_is_answered_with_what_a_name_is(name: str | Path, answer: str):
    assert re.search(answer, refusal(name))


def test_a_file_in_place_of_a_folder_and_a_revision_of_a_folder_are_refused(tmp_path: Path):
    written(tmp_path)
    assert "is a file, but a checkpoint is a folder" in refusal(tmp_path / WEIGHTS)
    assert "is a folder, and a folder has no revisions" in refusal(tmp_path, revision="main")


@pytest.mark.parametrize("file", [CONFIG, PREPROCESSOR, INDEX])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\xff", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
    ],
)
def test_json_that_is_not_an_object_is_named(tmp_path: Path, file: str, text: bytes, answer: str):
    (sharded(tmp_path, a={"x": torch.ones(1)}) / file).write_bytes(text)
    assert refusal(tmp_path).startswith(f"{tmp_path / file} {answer}")


def test_a_folder_without_config_or_without_weights_says_what_it_holds(tmp_path: Path):
    assert "has no config.json, so it is not a checkpoint. It holds nothing." in refusal(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    assert "holds no weights: packvit reads model.safetensors, or" in refusal(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert "holds weights.safetensors, but packvit reads model.safetensors" in refusal(tmp_path)


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_weights_that_can_run_code_are_refused_unopened(tmp_path: Path, file: str):
    trace = tmp_path / "trace"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CONFIG).write_text("{}")
    (tmp_path / "model" / file).write_bytes(pickle.dumps(Payload(trace)))
    answer = refusal(tmp_path / "model")
    assert f"holds weights as {file}, but packvit reads model.safetensors" in answer
    assert "save_pretrained(folder)" in answer
    (tmp_path / "model" / file).rename(tmp_path / "model" / WEIGHTS)
    assert "is not a whole safetensors file" in refusal(tmp_path / "model")
    assert not trace.exists()


# --------------------------------------------------------------------------- shards and their index


@pytest.mark.parametrize(
    "shard",
    [
        "../out.safetensors",
        "..",
        "sub/in.safetensors",
        "sub\\in.safetensors",
        "C:in.safetensors",
        "/etc/passwd",
        "/out.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "",
        ".safetensors",
        "weights.bin",
        "a.safetensors\n",
        None,
        7,
        ["a.safetensors"],
    ],
)
def test_an_index_may_name_only_files_of_its_own_folder(tmp_path: Path, shard: Any):
    save_file({"x": torch.ones(2)}, tmp_path / "out.safetensors")
    folder = sharded(tmp_path / "model", {"x": shard, "y": "a.safetensors"}, a={"y": torch.ones(1)})
    answer = refusal(folder)
    assert "may only name .safetensors files of its own folder, but names:" in answer
    assert answer.splitlines()[1:] == [f"  {shard!r}"]


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_weight_map_is_named(tmp_path: Path, index: dict):
    (sharded(tmp_path, a={"x": torch.ones(1)}) / INDEX).write_text(json.dumps(index))
    assert refusal(tmp_path).startswith(f"{tmp_path / INDEX} has no weight_map")


def test_all_that_the_shards_do_not_hold_as_indexed_is_told_at_once(tmp_path: Path):
    one = {"twice": torch.ones(1), "kept": torch.ones(1), "moved": torch.ones(1)}
    two = {"twice": torch.ones(1), "extra": torch.ones(1)}
    weight_map = dict.fromkeys(["twice", "kept", "gone"], "a.safetensors")
    folder = sharded(tmp_path, weight_map | {"moved": "b.safetensors"}, a=one, b=two)
    assert refusal(folder).splitlines() == [
        f"The shards do not hold what {tmp_path / INDEX} says:",
        "  extra is in b.safetensors, but not in the index",
        "  gone is missing from a.safetensors",
        "  moved is in a.safetensors, but the index says b.safetensors",
        "  twice is in a.safetensors and b.safetensors",
    ]


def test_shards_that_are_not_there_are_all_named(tmp_path: Path):
    weight_map = {"x": "a.safetensors", "y": "c.safetensors", "z": "b.safetensors"}
    folder = sharded(tmp_path, weight_map, a={"x": torch.ones(1)})
    assert "lacks shards that its index names: b.safetensors, c.safetensors." in refusal(folder)


# ------------------------------------------------------------------------------- links and pipes


@pytest.mark.parametrize("file", [CONFIG, PREPROCESSOR, WEIGHTS, INDEX, "a.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, file: str):
    folder = tmp_path / "model"
    if file in (INDEX, "a.safetensors"):
        sharded(folder, a={"x": torch.ones(1)})
    else:
        written(folder)
    outside = tmp_path / "outside"
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside)
    assert refusal(folder).startswith(f"{folder / file} is a link to {outside}, outside its folder")


def test_a_link_within_the_folder_and_a_linked_folder_are_read(tmp_path: Path):
    folder = written(tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "version-2.safetensors")
    (folder / WEIGHTS).symlink_to("version-2.safetensors")
    (tmp_path / "linked").symlink_to(folder)
    assert checkpoints.read(tmp_path / "linked").tensors["scale"] == 2.5


def test_in_the_hub_cache_links_may_lead_to_blobs_and_nowhere_else(tmp_path: Path):
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    snapshot = written(repository / "snapshots" / ("0" * 40))
    (snapshot / WEIGHTS).rename(tmp_path / "weights")
    os.link(tmp_path / "weights", repository / "elsewhere")
    (snapshot / WEIGHTS).symlink_to("../../elsewhere")
    assert "outside its folder" in refusal(snapshot)  # a folder called snapshots is no cache yet
    (snapshot / WEIGHTS).unlink()
    (repository / "blobs").mkdir()
    (snapshot / WEIGHTS).symlink_to("../../blobs/digest")
    blob = repository / "blobs" / "digest"
    os.link(tmp_path / "weights", blob)
    assert checkpoints.read(snapshot).tensors["scale"] == 2.5

    (cache / "blobs" / "ab").mkdir(parents=True)
    os.link(tmp_path / "weights", cache / "blobs" / "ab" / "hash")
    blob.unlink()
    blob.symlink_to("../../blobs/ab/hash")  # the store that all repositories share
    assert "outside its folder" in refusal(snapshot)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert checkpoints.read(snapshot).tensors["scale"] == 2.5

    blob.unlink()
    blob.symlink_to(tmp_path / "weights")
    assert "outside its folder" in refusal(snapshot)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_pipe_a_folder_or_a_broken_link_is_refused_without_waiting(tmp_path: Path, file: str):
    path = written(tmp_path) / file
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert f"{path} is not a regular file" in refusal(tmp_path)
    path.rmdir()
    path.symlink_to(file)  # to itself
    assert f"{path} is not a regular file" in refusal(tmp_path)


def test_a_checkpoint_that_would_fill_memory_or_a_terminal_is_refused_in_few_words(tmp_path: Path):
    """Kind S6 of issue 16, in a checkpoint."""
    with (written(tmp_path) / CONFIG).open("r+b") as file:
        file.truncate(10 << 30)  # of which the disk holds nothing
    assert refusal(tmp_path).endswith("at most 67108864. Download or copy it again.")
    write_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    for shard in ("../{}.safetensors", "m{}.safetensors"):
        names = {f"t{number}": shard.format(number) for number in range(3000)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
        assert 20_000 < len(refusal(tmp_path)) < 20_100
    (tmp_path / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    assert refusal(tmp_path).endswith("is not valid JSON. Download or copy it again.")


def test_a_pipe_in_the_place_of_a_certificate_is_not_waited_for(tmp_path: Path):
    os.mkfifo(written(tmp_path) / certificate.NAME)  # kind S6
    assert certificate.read_beside(checkpoints.read(tmp_path)) is None


# --------------------------------------------------------------------------------- damaged files


def test_a_folder_whose_name_is_not_utf_8_is_refused_in_a_sentence(tmp_path: Path):
    folder = Path(os.fsdecode(os.fsencode(written(tmp_path / "a")) + b"\xe9"))
    (tmp_path / "a").rename(folder)
    assert refusal(folder) == (
        f"{tmp_path}/a\\xe9/{WEIGHTS} cannot be opened: safetensors takes only paths that are "
        "UTF-8, and this one is not. Rename the folder."
    )


def test_a_file_cut_anywhere_is_refused_when_it_is_opened(tmp_path: Path):
    path = written(tmp_path) / WEIGHTS
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cuts = random.Random(0).sample(range(len(whole)), 50)
    for cut in [0, 1, 7, 8, header - 1, header, len(whole) - 1, *cuts]:
        path.write_bytes(whole[:cut])
        assert refusal(tmp_path) == (
            f"{path} is not a whole safetensors file: its header does not fit its {cut} bytes. "
            "Download or copy it again."
        )


def test_a_file_with_bytes_to_spare_is_refused(tmp_path: Path):
    path = written(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes() + b"\0")
    assert "is not a whole safetensors file" in refusal(tmp_path)


def at(start: int, stop: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        raw_safetensors({"a": at(0, 8, 2), "b": at(4, 12, 2)}, bytes(12)),
        raw_safetensors({"a": at(0, 8, 2), "b": at(0, 8, 2)}, bytes(8)),
        raw_safetensors({"a": at(0, 8, 2), "b": at(12, 20, 2)}, bytes(20)),
        raw_safetensors({"a": at(4, 12, 2)}, bytes(12)),
        raw_safetensors({"a": at(8, 0, 2)}, bytes(8)),
        raw_safetensors({"a": at(0, 8, 3)}, bytes(8)),
        raw_safetensors({"a": at(0, 2**42, 2**40)}, bytes(8)),
        raw_safetensors({"a": at(0, 0, 2**62, 4, 2)}, b""),
        raw_safetensors({"a": at(0, 8, 2) | {"dtype": "F31"}}, bytes(8)),
        raw_safetensors(b"[" * 10_000, b""),
        raw_safetensors(b"\xff\xfe", b""),
        struct.pack("<Q", 2**63) + b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_overlaps_gaps_and_garbage_are_refused_when_the_file_is_opened(
    tmp_path: Path, content: bytes
):
    (written(tmp_path) / WEIGHTS).write_bytes(content)
    assert f"{tmp_path / WEIGHTS} is not a whole safetensors file" in refusal(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path):
    folder = sharded(tmp_path, a={"x": torch.ones(2)}, b={"y": torch.ones(2)})
    (folder / "b.safetensors").write_bytes(b"")
    assert f"{folder / 'b.safetensors'} is not a whole safetensors file" in refusal(folder)


def test_a_git_lfs_pointer_is_told_from_weights(tmp_path: Path):
    pointer = "version https://git-lfs.example/spec/v1\noid sha256:00\nsize 1\n"
    (written(tmp_path) / WEIGHTS).write_text(pointer)
    assert "is a Git LFS pointer, not the weights" in refusal(tmp_path)


# --------------------------------------------------------------------------------------- writing


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_checkpoint_written_twice_is_the_same_bytes(tmp_path: Path):
    first = contents(written(tmp_path / "a"))
    second = contents(written(tmp_path / "b", dict(reversed(example().items()))))
    assert first == second
    assert first.keys() == {CONFIG, PREPROCESSOR, WEIGHTS}
    assert first[CONFIG] == b'{\n  "hidden_size": 8,\n  "model_type": "example"\n}\n'
    torch.save(example(), tmp_path / "example.pt")
    code = (
        "import torch\nfrom packvit.checkpoints import files as checkpoints\n"
        f"tensors = torch.load({str(tmp_path / 'example.pt')!r})\n"
        f"checkpoints.write({str(tmp_path / 'c')!r}, config={CONTENTS!r}, tensors=tensors, "
        f"preprocessor={IMAGES!r})"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    assert contents(tmp_path / "c") == first


def test_what_is_written_is_marked_as_transformers_wants_it(tmp_path: Path):
    with safe_open(written(tmp_path) / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_and_tied_tensors_are_written_as_what_they_hold(tmp_path: Path):
    base = torch.arange(24.0).reshape(4, 6)
    first, second = base.chunk(2)
    tensors = {"base": base, "tied": base, "first": first, "second": second, "turned": base.T}
    found = checkpoints.read(written(tmp_path, tensors)).tensors
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_can_be_written_over_the_files_it_is_read_from(tmp_path: Path):
    found = checkpoints.read(written(tmp_path))
    before = contents(tmp_path)
    checkpoints.write(
        tmp_path, config=found.config, tensors=found.tensors, preprocessor=found.preprocessor
    )
    assert contents(tmp_path) == before
    assert all(same(found.tensors[name], tensor) for name, tensor in example().items())


def test_every_written_file_follows_the_umask(tmp_path: Path):
    modes = {path.stat().st_mode for path in written(tmp_path).iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("file", [INDEX, PREPROCESSOR])
def test_a_file_that_would_be_read_as_part_of_the_new_one_stops_the_writing(
    tmp_path: Path, file: str
):
    (tmp_path / file).write_text("{}")
    with pytest.raises(
        CheckpointError, match=rf"already has {re.escape(file)}, which .*\. Remove it"
    ):
        checkpoints.write(tmp_path, config=CONTENTS, tensors=example(), preprocessor=None)
    assert contents(tmp_path) == {file: b"{}"}


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, parent: str):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(
        CheckpointError, match=r"The checkpoint cannot be written to .*model: .*\.$"
    ):
        written(tmp_path / parent / "model")  # an absolute parent replaces tmp_path
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("limit", [0, 10, 4096, 100_000])
def test_a_write_that_fails_half_way_leaves_what_was_there_before(tmp_path: Path, limit: int):
    before = contents(written(tmp_path))
    tensors = {"w": torch.ones(100_000)}
    with (
        no_file_over(limit),
        pytest.raises(CheckpointError, match=r"cannot be written to .*File too large"),
    ):
        checkpoints.write(tmp_path, config={"other": 1}, tensors=tensors, preprocessor={})
    assert contents(tmp_path) == before
