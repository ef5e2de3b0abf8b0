import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Repository
from safetensors.torch import save

from packvit.checkpoints.folders import CONFIG, INDEX, PREPROCESSOR, PROCESSOR, WEIGHTS

ROOT = Path(__file__).parents[2]
CONTENTS = {"model_type": "example", "hidden_size": 8}
IMAGES = {"image_mean": [0.5, 0.5, 0.5]}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD, NEW = "a" * 40, "b" * 40  # commits

READER = """
import json, sys
from packvit.checkpoints import files as checkpoints
from packvit.checkpoints.errors import CheckpointError
for line in sys.stdin:
    name, revision = json.loads(line)
    try:
        found = checkpoints.read(name, revision=revision)
        answer = {
            "revision": found.revision, "config": found.config, "preprocessor": found.preprocessor,
            "files": [file.name for file in found.files], "sha256": found.sha256(),
            "sums": {name: float(tensor.sum()) for name, tensor in found.tensors.items()},
        }
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """A process that reads checkpoints: huggingface_hub takes its settings when it's imported."""

    def __init__(self, endpoint: str, home: Path, **settings: str) -> None:
        ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=inherited | ours | settings,
        )

    def read(self, name: str, revision: str | None = None) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([name, revision]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def files(seed: int) -> dict[str, bytes]:
    config = json.dumps(CONTENTS | {"seed": seed}).encode()
    images = json.dumps(IMAGES).encode()
    return {
        CONFIG: config,
        PREPROCESSOR: images,
        WEIGHTS: save({"w": torch.full((3,), seed + 0.5)}),
    }


def shards(seed: int) -> dict[str, bytes]:
    one, two = {"x": torch.full((2,), seed + 0.5)}, {"y": torch.full((4,), seed + 0.5)}
    index = {"weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}
    return {
        CONFIG: json.dumps(CONTENTS).encode(),
        INDEX: json.dumps(index).encode(),
        SHARDS[0]: save(one),
        SHARDS[1]: save(two),
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def repository(old: dict[str, bytes], new: dict[str, bytes] | None = None) -> Repository:
    """A model with one commit, or with two."""
    if new is None:
        return Repository({OLD: old}, {"main": OLD})
    return Repository({OLD: old, NEW: new}, {"main": NEW, "old": OLD})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Reader]:
    reader = Reader(hub.url, home, HF_TOKEN="hf_example")
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Reader]:
    reader = Reader(hub.url, home, HF_HUB_OFFLINE="1")
    yield reader
    reader.close()


def test_finding_files_needs_neither_torch_nor_the_hub_client():
    code = (
        "import sys, packvit.checkpoints.downloads\n"
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_branch_is_resolved_to_the_commit_that_is_recorded(hub: Hub, online: Reader):
    hub.repositories["owner/two"] = repository(files(1), files(2))
    main, old = online.read("owner/two"), online.read("owner/two", "old")
    pinned = online.read("owner/two", OLD)
    assert (main["revision"], main["sums"]["w"]) == (NEW, 7.5)
    assert (old["revision"], old["sums"]["w"]) == (OLD, 4.5)
    assert pinned == old
    assert main["config"] == CONTENTS | {"seed": 2}
    assert main["preprocessor"] == IMAGES
    assert main["files"] == [WEIGHTS]
    assert main["sha256"] != old["sha256"]


def test_a_push_between_two_files_does_not_mix_versions(
    hub: Hub, online: Reader, monkeypatch: pytest.MonkeyPatch
):
    hub.repositories["owner/moving"] = repository(files(1), files(2))
    hub.repositories["owner/moving"].branches["main"] = OLD
    answer = hub.answer

    def push_after_config(path: str, authorization: str | None):
        said = answer(path, authorization)
        if PREPROCESSOR in path:
            hub.repositories["owner/moving"].branches["main"] = NEW
        return said

    monkeypatch.setattr(hub, "answer", push_after_config)
    found = online.read("owner/moving")
    assert hub.repositories["owner/moving"].branches["main"] == NEW
    assert (found["revision"], found["config"]["seed"], found["sums"]["w"]) == (OLD, 1, 4.5)


def test_the_token_is_sent(hub: Hub, online: Reader):
    hub.repositories["owner/token"] = repository(files(1))
    online.read("owner/token")
    asked = [request for request in hub.requests if "owner/token" in request.path]
    assert asked
    assert {request.authorization for request in asked} == {"Bearer hf_example"}


def test_all_shards_that_the_index_names_are_downloaded(hub: Hub, online: Reader):
    hub.repositories["owner/shards"] = repository(shards(1), shards(2))
    assert online.read("owner/shards")["sums"] == {"x": 5.0, "y": 10.0}
    old = online.read("owner/shards", "old")
    assert old["sums"] == {"x": 3.0, "y": 6.0}
    assert old["files"] == list(SHARDS)
    assert old["preprocessor"] is None


def test_of_one_file_and_shards_the_one_file_is_downloaded(hub: Hub, online: Reader):
    hub.repositories["owner/both"] = repository(shards(1) | {WEIGHTS: files(2)[WEIGHTS]})
    found = online.read("owner/both")
    assert (found["files"], found["sums"]) == ([WEIGHTS], {"w": 7.5})
    asked = {request.path for request in hub.requests if "owner/both" in request.path}
    assert {path.rpartition("/")[2] for path in asked} == {CONFIG, PREPROCESSOR, PROCESSOR, WEIGHTS}


def test_what_was_read_once_is_read_offline_and_with_no_request(
    hub: Hub, online: Reader, offline: Reader
):
    hub.repositories["owner/cached"] = repository(shards(3))
    first = online.read("owner/cached")
    requests = len(hub.requests)
    assert offline.read("owner/cached") == first
    assert offline.read("owner/cached", OLD) == first
    assert online.read("owner/cached", OLD) == first
    assert len(hub.requests) == requests


def test_offline_an_uncached_model_and_a_file_that_may_exist_are_not_made_up(
    hub: Hub, home: Path, online: Reader, offline: Reader
):
    hub.repositories["owner/never"] = repository(files(1))
    assert offline.read("owner/never")["error"] == (
        "config.json of 'owner/never' is not in the cache, and HF_HUB_OFFLINE forbids "
        "downloading it. Unset it for one run, or give a folder."
    )
    online.read("owner/never")
    cached = home / "hub" / "models--owner--never"
    assert offline.read("owner/never")["sums"] == {"w": 4.5}
    (cached / "snapshots" / OLD / WEIGHTS).unlink()
    assert offline.read("owner/never")["error"].startswith(f"{WEIGHTS} of 'owner/never' is not in")
    (cached / "snapshots" / OLD / PREPROCESSOR).unlink()
    assert offline.read("owner/never")["error"].startswith(
        f"{PREPROCESSOR} of 'owner/never' is not"
    )


def test_shards_that_another_program_cached_are_read_offline(
    hub: Hub, home: Path, online: Reader, offline: Reader
):
    hub.repositories["owner/filled"] = repository(shards(1))
    first = online.read("owner/filled")
    cached = home / "hub" / "models--owner--filled"
    (cached / ".no_exist" / OLD / WEIGHTS).unlink()  # as `hf download` leaves it
    assert offline.read("owner/filled") == first
    (cached / "snapshots" / OLD / INDEX).unlink()
    assert offline.read("owner/filled")["error"].startswith(f"{WEIGHTS} of 'owner/filled' is not")


def test_n1_nested_image_settings_are_downloaded_and_asked_for_no_twice(
    hub: Hub, online: Reader, offline: Reader
):
    """Row N1: the hub's processor_config.json alone, and in front of the other file."""
    nested = {PROCESSOR: json.dumps({"image_processor": {"size": 30}}).encode()}
    alone = {name: body for name, body in files(1).items() if name != PREPROCESSOR} | nested
    hub.repositories["owner/nested"] = repository(alone)
    hub.repositories["owner/nested-first"] = repository(files(1) | nested)
    hub.repositories["owner/not-nested"] = repository(files(1) | {PROCESSOR: b"{}"})
    for name, expected in (("nested", {"size": 30}), ("nested-first", {"size": 30}),
                           ("not-nested", IMAGES)):  # fmt: skip
        assert online.read(f"owner/{name}")["preprocessor"] == expected
        assert offline.read(f"owner/{name}")["preprocessor"] == expected
    asked = {request.path.rpartition("/")[2] for request in hub.requests
             if "owner/nested/" in request.path}  # fmt: skip
    assert PREPROCESSOR not in asked


def test_n1_a_cache_filled_before_nested_settings_were_known_is_read_offline(
    hub: Hub, home: Path, online: Reader, offline: Reader
):
    hub.repositories["owner/older"] = repository(files(1))
    first = online.read("owner/older")
    cached = home / "hub" / "models--owner--older"
    (cached / ".no_exist" / OLD / PROCESSOR).unlink()
    assert offline.read("owner/older") == first
    hub.repositories["owner/neither"] = repository(shards(1))
    online.read("owner/neither")
    (home / "hub" / "models--owner--neither" / ".no_exist" / OLD / PROCESSOR).unlink()
    error = offline.read("owner/neither")["error"]
    assert error.startswith(f"{PROCESSOR} of 'owner/neither' is not in the cache")


@pytest.mark.parametrize(
    ("change", "revision", "answer"),
    [
        (None, None, "There is no folder 'owner/bad', and no model of that name on the hub"),
        ({}, "v9", "The model 'owner/bad' has no revision 'v9'. Give a branch, a tag, or a whole"),
        ({"gated": True}, None, "The model 'owner/bad' is gated. Accept its terms on its hub page"),
        ({"status": 403}, None, "The hub answered 403 for config.json of 'owner/bad'. Please log"),
        ({"status": 401}, None, "The hub answered 401 for config.json of 'owner/bad'. Please log"),
        ({"status": 410}, None, "The hub answered 410 for config.json of 'owner/bad'. Try again"),
        ({CONFIG: None}, None, "The model 'owner/bad' has no config.json on the hub."),
        ({CONFIG: None}, "main", "The model 'owner/bad' has no config.json on the hub at revision"),
        ({WEIGHTS: None}, None, "The model 'owner/bad' holds no weights: packvit reads model."),
        ({CONFIG: b"{"}, None, "/snapshots/aaaaa"),
    ],
)
def test_every_refusal_of_the_hub_is_one_sentence(
    hub: Hub, home: Path, online: Reader, change: dict | None, revision: str | None, answer: str
):
    name = "owner/bad"
    hub.repositories.pop(name, None)
    subprocess.run(["rm", "-rf", home / "hub" / "models--owner--bad"], check=True)
    if change is not None:
        settings = {key: value for key, value in change.items() if key in ("gated", "status")}
        held = files(1) | {key: value for key, value in change.items() if key not in settings}
        commit = {key: value for key, value in held.items() if value is not None}
        hub.repositories[name] = Repository({OLD: commit}, {"main": OLD}, **settings)
    error = online.read(name, revision)["error"]
    assert answer in error
    assert "\n" not in error
    assert error.endswith(".")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"])
def test_a_model_in_another_format_is_refused_and_its_weights_not_downloaded(
    hub: Hub, online: Reader, file: str
):
    name = f"owner/{file.partition('.')[0]}"
    hub.repositories[name] = repository({CONFIG: b"{}", file: b"weights"})
    error = online.read(name)["error"]
    assert f"'{name}' holds weights as {file}, but packvit reads model.safetensors" in error
    assert not [request for request in hub.requests if request.path.endswith(file)]


def test_an_index_on_the_hub_may_not_lead_out_and_its_shards_must_be_there(
    hub: Hub, online: Reader
):
    index = json.dumps({"weight_map": {"x": "../../../x.safetensors"}}).encode()
    hub.repositories["owner/out"] = repository({CONFIG: b"{}", INDEX: index})
    assert "may only name .safetensors files of its own" in online.read("owner/out")["error"]
    assert not [request for request in hub.requests if request.path.endswith("x.safetensors")]
    lacking = {name: body for name, body in shards(1).items() if name != SHARDS[1]}
    hub.repositories["owner/lacking"] = repository(lacking)
    assert online.read("owner/lacking")["error"] == (
        f"The model 'owner/lacking' lacks shards that its index names: {SHARDS[1]}."
    )


@pytest.mark.soak  # it waits for the hub client's own tries
def test_a_hub_that_cannot_be_reached_is_told_from_a_model_that_is_not_there(
    tmp_path: Path, hub: Hub
):
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("127.0.0.1", 0))
        reader = Reader(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        assert reader.read("owner/two")["error"].startswith("The hub cannot be reached, and config")
        reader.close()


def test_a_download_that_breaks_off_is_one_sentence(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    """P1: what the HTTP client raises of itself has no common name in huggingface_hub 1 and 2."""
    hub.repositories["owner/breaks"] = repository(files(1))
    content = hub.content

    def cut_short(digest: str):
        said = content(digest)
        said.headers["Content-Encoding"] = "gzip"  # which it is not
        return said

    monkeypatch.setattr(hub, "content", cut_short)
    reader = Reader(hub.url, tmp_path, HF_HUB_DISABLE_XET="1")
    error = reader.read("owner/breaks")["error"]
    reader.close()
    assert error.startswith(f"{WEIGHTS} of 'owner/breaks' could not be downloaded (DecodingError)")


@pytest.mark.parametrize("endpoint", ["", "hub.example", "http://", "http://hub.example:x"])
def test_an_endpoint_that_is_no_url_is_named(tmp_path: Path, endpoint: str):
    """P1: huggingface_hub 2 cannot even be imported with some of these."""
    reader = Reader(endpoint, tmp_path)
    assert reader.read("owner/two")["error"].startswith(f"HF_ENDPOINT is {endpoint!r}, but must be")
    reader.close()


def test_the_first_line_is_ours_and_not_the_tries_of_the_hubs_client(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    import logging

    from packvit.checkpoints.downloads import without_tries

    logger = logging.getLogger("huggingface_hub.utils._http")
    said = ["HTTP Error 503 thrown while requesting GET x", "'cut' thrown while requesting GET x"]
    with without_tries():
        for line in [*said, "Retrying in 1s [Retry 1/5].", "Rate limited. Waiting 61s before"]:
            logger.warning(line)
    logger.warning("Retrying in 2s [Retry 1/5].")
    told = capfd.readouterr().err + caplog.text
    assert "Rate limited" in told
    assert "Retrying in 2s" in told
    assert "thrown while" not in told
    assert "Retrying in 1s" not in told
