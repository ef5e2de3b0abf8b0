import json
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from features import contents
from fsspec.registry import _registry as registry
from object_store import BUCKET, Answer, Server, environment_secrets, place, stored
from rotten import encode, pixels, write_good

import packvit
from packvit.cli import main as cli
from packvit.corpus import StoreError, UsageError
from packvit.corpus.folder import leases, stores
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.pending import write_inputs
from packvit.corpus.folder.requests import STORES
from packvit.corpus.inputs import retries
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.job import embed
from packvit.corpus.progress import Summary
from packvit.encoder import Encoder

INPUTS, ROWS = 9, 4


@pytest.fixture
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of the test's own; a lease that nobody renews is another's at once."""
    monkeypatch.setattr(leases, "EXPIRY", 0.0)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, INPUTS)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def job(photos: Path, out: str | Path, encoder: Encoder, **options: Any) -> Summary:
    return embed(photos, out=out, model=encoder, **{"rows_per_part": ROWS, "workers": 1, **options})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    """The folder that the job writes on a disk."""
    out = tmp_path_factory.mktemp("local") / "out"
    job(photos, out, encoder, format="npy", tokens=True)
    return out


def whole(folder: Path) -> dict[str, bytes]:
    """Return the files of a local folder, but its lock."""
    return {name: data for name, data in contents(folder).items() if name != ".lock"}


def part(number: int) -> str:
    return f"data/part-{number:05d}.parquet"


def place_of(server: Server, url: str, photos: Path, encoder: Encoder, name: str) -> int:
    """Return which request of a job puts an object; the job is undone."""
    start = len(server.requests)
    job(photos, url, encoder, format="npy", tokens=True)
    request = server.requests.index(("PUT", f"/{url[5:]}/{name}"), start) - start
    stores.remove_many([place(url) / name for name in place(url).sizes()])
    return request


def test_a_job_in_a_store_has_the_bytes_of_a_local_one(
    server: Server, url: str, photos: Path, encoder: Encoder, local: Path
):
    summary = job(photos, url, encoder, format="npy", tokens=True)
    assert stored(url) == whole(local)
    assert summary.folder == url
    found = check_folder(place(url))
    assert (found.faults, found.rows) == ([], INPUTS + 1)
    rows, same = packvit.read(url), packvit.read(local)
    assert rows.ids == same.ids
    assert rows.matrix.tobytes() == same.matrix.tobytes()
    assert rows.table.equals(same.table)
    before = len(server.requests)
    assert job(photos, url, encoder, format="npy", tokens=True).kept_rows == INPUTS + 1
    written = {path for method, path in server.requests[before:] if method not in ("GET", "HEAD")}
    assert written == {f"/{url[5:]}/{name}" for name in ("_lease/00001.json", "_inputs.jsonl.gz")}


@pytest.mark.soak
def test_a_job_goes_on_after_the_parts_that_are_committed_and_puts_no_other_again(
    server: Server, url: str, photos: Path, encoder: Encoder, local: Path
):
    request = place_of(server, url, photos, encoder, "_commits/00001.json")
    with server.dying(request, late=False), pytest.raises(StoreError):
        job(photos, url, encoder, format="npy", tokens=True)
    held = stored(url)
    assert {name for name in held if name.startswith("data/")} == {part(0), part(1)}
    assert len(held["_commits.jsonl"].splitlines()) == 1
    before = len(server.requests)
    assert job(photos, url, encoder, format="npy", tokens=True).kept_rows == ROWS
    puts = {path for method, path in server.requests[before:] if method == "PUT"}
    assert f"/{url[5:]}/{part(0)}" not in puts
    assert stored(url) == whole(local)


@pytest.mark.soak
def test_a_part_that_is_lost_or_cut_is_embedded_again(
    server: Server, url: str, photos: Path, encoder: Encoder, local: Path
):
    job(photos, url, encoder, format="npy", tokens=True)
    folder = place(url)
    (folder / part(0)).unlink()
    (folder / part(1)).write(b"cut")
    assert [fault.file for fault in check_folder(folder).faults] == [part(0), part(1)]
    with pytest.raises(UsageError, match="is missing or damaged"):
        _ = packvit.read(url).table
    assert job(photos, url, encoder, format="npy", tokens=True).kept_rows == 2
    assert stored(url) == whole(local)


def test_shards_in_a_store_merge_to_the_bytes_of_one_job_and_reuse_takes_over_their_rows(
    server: Server, url: str, tmp_path: Path, photos: Path, checkpoint: Path
):
    invariant = packvit.load(checkpoint, device="cpu", invariant=True)
    job(photos, tmp_path / "fresh", invariant)
    for shard in ("1/2", "2/2"):
        job(photos, f"{url}/{shard[0]}", invariant, shard=shard)
    merged = packvit.merge([f"{url}/2", f"{url}/1"], out=tmp_path / "merged")
    assert (merged.shards, merged.rows) == (2, INPUTS + 1)
    assert contents(tmp_path / "merged") == contents(tmp_path / "fresh")
    with pytest.raises(UsageError, match="holds shard 1/2 of a job"):
        packvit.read(f"{url}/1")
    again = job(photos, f"{url}/all", invariant, reuse=[f"{url}/1", f"{url}/2"])
    assert again.reused == INPUTS
    assert stored(f"{url}/all") == whole(tmp_path / "fresh")
    for folder in (f"{url}/all", tmp_path / "fresh"):
        with pytest.raises(UsageError, match=r"reuse names .*, the folder of this job"):
            job(photos, folder, invariant, reuse=[str(folder)])


@pytest.mark.soak
def test_rows_that_are_errors_are_done_again_and_all_others_kept(
    server: Server, url: str, tmp_path: Path, encoder: Encoder
):
    folder = tmp_path / "photos"
    write_good(folder, INPUTS)
    for out in (url, tmp_path / "out"):
        (folder / "broken.jpg").write_bytes(b"no image")
        job(folder, out, encoder, format="npy")
        (folder / "broken.jpg").write_bytes(encode(pixels(40, 60, 5), "PNG"))
        assert job(folder, out, encoder, retry_errors=True).errors == {}
    assert stored(url) == whole(tmp_path / "out")
    assert not check_folder(place(url)).faults


def test_an_update_in_a_store_is_refused_with_what_to_do_instead(
    server: Server, url: str, photos: Path, encoder: Encoder
):
    with pytest.raises(UsageError) as error:
        job(photos, url, encoder, update=True)
    assert f"Give `reuse` {url} and another `out`" in str(error.value)
    assert stored(url) == {}


@pytest.mark.soak
def test_overwrite_removes_what_packvit_put_there_and_nothing_that_others_did(
    server: Server, url: str, photos: Path, encoder: Encoder, local: Path
):
    job(photos, url, encoder, max_patches=16)
    with pytest.raises(UsageError, match="max_patches: 16 -> 1024"):
        job(photos, url, encoder, format="npy", tokens=True)
    (place(url) / "data/notes.txt").write(b"mine")
    with pytest.raises(UsageError, match=r"it holds data/notes\.txt and 0 other files"):
        job(photos, url, encoder, format="npy", tokens=True, overwrite=True)
    (place(url) / "data/notes.txt").unlink()
    job(photos, url, encoder, format="npy", tokens=True, overwrite=True)
    assert stored(url) == whole(local)


def test_of_two_jobs_one_writes_and_the_other_is_refused(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = place(url)
    monkeypatch.setattr(leases, "EXPIRY", 30.0)
    monkeypatch.setattr(leases, "RENEW", 0.05)
    monkeypatch.setattr(leases, "PAUSE", 0.1)
    with (
        leases.leased(folder),
        pytest.raises(UsageError, match="Another job is writing to"),
        leases.leased(folder),
    ):
        pass
    assert stored(url) == {}
    first = folder / "_lease/00001.json"
    first.create(b"of a job that is killed here")
    with pytest.raises(FileExistsError):  # as a job finds that began at the same time
        first.create(b"of another")
    monkeypatch.setattr(leases, "EXPIRY", 0.3)
    with leases.leased(folder) as held:
        assert list(stored(url)) == ["_lease/00002.json"]
        (held / "x").write(b"1")
    assert stored(url) == {"x": b"1"}


def test_a_job_whose_lease_was_taken_over_writes_no_more(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = place(url)
    monkeypatch.setattr(leases, "FRESH", 0.0)  # as if it had been stopped for long
    with leases.leased(folder) as first:
        (first / "a").write(b"1")
        with leases.leased(folder) as second:
            (second / "b").write(b"2")
            with pytest.raises(StoreError, match="was taken over by another job"):
                (first / "c").write(b"3")
    with leases.leased(folder) as third:  # and so where a store ignores the condition of a put
        (folder / "_lease/00001.json").write(b"of the job that was later")
        with pytest.raises(StoreError, match="was taken over by another job"):
            (third / "c").write(b"3")
    assert sorted(stored(url)) == ["_lease/00001.json", "a", "b"]


REFUSED = [
    (("403 Forbidden", "AccessDenied"), "the store refuses it (HTTP 403, AccessDenied)"),
    (("403 Forbidden", "SignatureDoesNotMatch"), "the store refuses it (HTTP 403, Signature"),
    (("503 Slow Down", "SlowDown"), "HTTP 503, 4 times"),
    (("500 Internal Server Error", "InternalError"), "HTTP 500, 4 times"),
    (("418 I'm a teapot", "Tea"), "could not be written: HTTP 418, Tea."),
]


@pytest.mark.parametrize(("answer", "said"), REFUSED)
def test_an_error_of_the_store_is_one_sentence_without_its_own_words(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch, answer: Answer, said: str
):
    monkeypatch.setattr(retries, "BOUND", retries.Bound(pauses=(0.0, 0.0, 0.0)))
    before = len(server.requests)
    with server.answering(lambda method, path: answer), pytest.raises(StoreError) as error:
        (place(url) / "data/x").write(b"1")
    assert f"{url}/data/x could not be written: " in str(error.value)
    assert said in str(error.value)
    assert len(server.requests) - before == (4 if "4 times" in said else 1)
    shown = "".join(traceback.format_exception(error.value))
    assert not any(secret in shown for secret in ("a secret", *environment_secrets()))


def test_a_store_that_is_busy_for_a_while_only_costs_time(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "BOUND", retries.Bound(pauses=(0.0, 0.0, 0.0)))
    answers = iter([("503 Slow Down", "SlowDown")] * 3)
    with server.answering(lambda method, path: next(answers, None)):
        (place(url) / "x").write(b"1")
    # Its answer is lost, and then the condition finds what was put.
    lost = iter([("500 Internal Server Error", "InternalError")])
    with server.answering(lambda method, path: None, lambda method, path: next(lost, None)):
        (place(url) / "y").create(b"2")
    assert stored(url) == {"x": b"1", "y": b"2"}


def test_a_store_without_conditional_puts_is_asked_first(server: Server, url: str):
    path = place(url) / "x"

    def lacks(method: str, path: str) -> Answer | None:
        conditional = server.headers.get("HTTP_IF_NONE_MATCH") is not None
        return ("501 Not Implemented", "NotImplemented") if conditional else None

    with server.answering(lacks):
        path.create(b"1")
        with pytest.raises(FileExistsError):
            path.create(b"2")
    assert stored(url) == {"x": b"1"}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("s3://nowhere/x", "There is no bucket s3://nowhere. Create it, or name another."),
        ("s3://user:secret@bucket/x", "--out is s3://bucket/x, which must be a bucket and"),
        ("s3://bucket/x?X-Amz-Signature=secret", "--out is s3://bucket/x, which must be a bucket"),
        ("s3://bucket", "--out is s3://bucket, but needs a bucket and a name"),
        ("https://host/x", "lies below s3://, gs:// or az://"),
        ("simplecache::s3://bucket/x", "lies below s3://, gs:// or az://"),
        ("s3:/bucket/x", "lies below s3://, gs:// or az://"),
    ],
)
def test_a_place_that_cannot_be_used_is_wrong_use_in_one_sentence(
    server: Server, photos: Path, out: str, said: str
):
    done = CliRunner().invoke(cli, ["embed", str(photos), "--out", out])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "secret" not in done.output


def test_commands_answer_a_store_that_refuses_with_exit_code_1(server: Server, photos: Path):
    url = f"s3://{BUCKET}/refused"
    commands = (
        ["embed", str(photos), "--out", url],
        ["check", url],
        ["search", url, str(photos / "good-0001.png")],
        ["merge", url, "--out", "merged"],
    )
    with server.answering(lambda method, path: ("403 Forbidden", "AccessDenied")):
        for command in commands:
            done = CliRunner().invoke(cli, command)
            assert done.exit_code == 1, done.output
            assert "the store refuses it (HTTP 403" in done.stderr
            assert "Traceback" not in done.output


def test_search_finds_in_a_store_what_it_finds_on_a_disk(
    server: Server, url: str, tmp_path: Path, photos: Path, checkpoint: Path
):
    same: dict[str, Any] = {"model": checkpoint, "device": "cpu", "workers": 1}
    embed(photos, out=url, **same)
    embed(photos, out=tmp_path / "out", **same)
    photo = str(min(photos.glob("good*")))
    (here,), (there,) = packvit.search(tmp_path / "out", photo), packvit.search(url, photo)
    assert [(hit.id, hit.score) for hit in there] == [(hit.id, hit.score) for hit in here]
    found = CliRunner().invoke(cli, ["search", url, photo, "--json"])
    assert json.loads(found.stdout)["queries"][0]["hits"][0]["folder"] == url
    refused = CliRunner().invoke(cli, ["search", url, photo, "--index"])
    assert (refused.exit_code, "--index needs a local folder" in refused.stderr) == (2, True)


@pytest.mark.parametrize(("protocol", "package"), STORES.items())
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    protocol: str, package: str, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(cli, ["embed", str(photos), "--out", f"{protocol}://bucket/x"])
    assert done.exit_code == 1
    assert f"pip install 'packvit[{protocol}]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["disk", pytest.param("store", marks=pytest.mark.soak)])
def test_a_job_that_was_killed_before_its_manifest_was_there_begins_again(
    server: Server,
    url: str,
    tmp_path: Path,
    photos: Path,
    encoder: Encoder,
    local: Path,
    where: str,
):
    out = place(url) if where == "store" else tmp_path / "out"
    if isinstance(out, Path):
        out.mkdir()
    write_inputs(out, list_inputs([str(photos)]))
    job(photos, str(out), encoder, format="npy", tokens=True)
    assert (stored(url) if where == "store" else whole(tmp_path / "out")) == whole(local)
