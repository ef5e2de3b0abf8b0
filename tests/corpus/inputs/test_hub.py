"""Inputs behind hf://, read by huggingface_hub's own file system from a hub on this machine."""

import json
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from huggingface_hub import constants
from rotten import write_good
from served import outcome_of, write_served

from packvit.corpus import UsageError
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import read
from packvit.corpus.job import embed
from packvit.corpus.progress import Progress, Summary, Tell
from packvit.encoder import Encoder

REPOSITORY = "datasets/owner/name"
HERE = f"hf://{REPOSITORY}"
PAGE = 4  # entries of a listing that are sent at once


class Hub(BaseHTTPRequestHandler):
    """Serves the working directory as the one dataset there is.

    Source: huggingface_hub 1.33, `hf_api.py` and `hf_file_system.py`.
    """

    asked: list[tuple[str, str, str | None]]  # how, what, and which bytes of it
    broken: set[str]  # pages that are answered with 500: "folder?cursor"
    private: bool

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).removeprefix("/api").strip("/")
        self.asked.append((self.command, path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not f"{path}/".startswith(f"{REPOSITORY}/") or self.private:
            # The hub says of what is private that there is no such thing, unless one is known.
            return self.refuse(401, "RepoNotFound")
        kind, _, rest = path.removeprefix(REPOSITORY).strip("/").partition("/")
        revision, _, place = rest.partition("/")
        if revision not in ("", "main"):
            return self.refuse(404, "RevisionNotFound")
        if kind in ("", "revision"):
            return self.send({"id": "owner/name", "sha": "0" * 40})
        if kind == "paths-info":
            named = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
            found = [Path(name) for name in named["paths"]]
            return self.send([entry(path) for path in found if path.exists()])
        if kind == "tree":
            return self.list(Path(place or "."), int(parse_qs(url.query).get("cursor", ["0"])[0]))
        if kind == "resolve" and Path(place).is_file():
            return self.send_file(Path(place).read_bytes())
        self.refuse(404, "EntryNotFound")

    def list(self, folder: Path, start: int) -> None:
        if not folder.is_dir():
            return self.refuse(404, "EntryNotFound")
        if f"{folder}?{start}" in self.broken:
            return self.refuse(500, "Broken")
        found = sorted(folder.iterdir())
        headers = {}
        if len(found) > start + PAGE:
            here = f"http://{self.headers['Host']}/api/{REPOSITORY}/tree/main/{folder}"
            headers = {"Link": f'<{here}?cursor={start + PAGE}>; rel="next"'}
        self.send([entry(path) for path in found[start : start + PAGE]], headers)

    def send_file(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if not wanted:
            return self.reply(200, data, {})
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        area = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self.reply(206, part, {"Content-Range": area})

    def send(self, value: object, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self.reply(200, json.dumps(value).encode(), kind | (headers or {}))

    def refuse(self, status: int, why: str) -> None:
        self.reply(status, b"", {"X-Error-Code": why})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(path: Path) -> dict[str, object]:
    """Return what the hub says of a file or folder."""
    if path.is_dir():
        return {"type": "directory", "path": str(path), "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": str(path), "oid": "0" * 40, "size": path.stat().st_size}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of the working directory, which HF_ENDPOINT names here and in new processes."""
    monkeypatch.chdir(tmp_path)
    facts = {"asked": [], "broken": set(), "private": False}
    handler: type[Hub] = type("Handler", (Hub,), facts)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        point_at(f"http://127.0.0.1:{serving.server_port}", monkeypatch)
        yield handler
        serving.shutdown()
        thread.join()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before it asks again


def test_the_hub_has_files_folders_patterns_archives_and_lists(hub: type[Hub]):
    content = write_served(5)
    for folder in (f"{HERE}/photos", f"{HERE}/photos/", f"{HERE}@main/photos"):
        assert outcome_of(folder) == content
    assert outcome_of(HERE) == {f"photos/{name}": data for name, data in content.items()}
    one, data = next(iter(content.items()))
    assert outcome_of(f"{HERE}/photos/{one}") == {f"{HERE}/photos/{one}": data}
    jpegs = {f"{HERE}/photos/{n}": data for n, data in content.items() if n.endswith("jpg")}
    assert outcome_of(f"{HERE}/photos/**/*.jpg") == jpegs
    keys = {f"photos/{os.path.splitext(name)[0]}": data for name, data in content.items()}
    assert outcome_of(f"{HERE}/x.tar") == keys
    assert outcome_of(f"{HERE}/x.parquet") == {f"photos/{n}": data for n, data in content.items()}
    Path("list.txt").write_text("\n".join([*jpegs, f"{HERE}/photos/gone.jpg"]))
    assert outcome_of(lists=(f"{HERE}/list.txt",)) == jpegs | {f"{HERE}/photos/gone.jpg": "missing"}


def test_a_file_or_member_is_read_by_one_request_for_its_bytes_alone(hub: type[Hub]):
    write_served(5)
    for url in (f"{HERE}/photos", f"{HERE}/x.tar"):
        sources = list(list_inputs([url]))
        hub.asked.clear()
        content = [read(source) for source in sources]
        assert [command for command, _, _ in hub.asked] == ["GET"] * 7
        if url.endswith("tar"):
            sizes = [len(data) for data in content]
            areas = [str(area).removeprefix("bytes=").split("-") for _, _, area in hub.asked]
            assert [int(last) - int(first) + 1 for first, last in areas] == sizes


@pytest.mark.soak  # it waits for the hub client's own tries
def test_a_listing_that_breaks_off_is_never_taken_for_all_there_is(hub: type[Hub]):
    write_served(5)
    hub.broken.add("photos?4")
    sources = {source.id: source for source in list_inputs([HERE])}
    assert {name: source.error for name, source in sources.items()} == {
        "photos": ("unreadable", "list"),
    }
    with pytest.raises(UsageError, match=rf'"{HERE}/photos" cannot be read \(HfHubHTTPError 500\)'):
        list_inputs([f"{HERE}/photos"])
    hub.broken.clear()
    assert len(list_inputs([HERE])) == 7
    assert len(outcome_of(f"{HERE}/photos")) == 7


def test_what_the_hub_does_not_show_is_refused_where_it_is_named(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
):
    content = write_served(5)
    for url in (f"{HERE}/foto", f"{HERE}/gone.jpg", f"{HERE}/gone.tar", f"{HERE}@old/photos"):
        with pytest.raises(UsageError, match=f'"{url}" is not there'):
            list_inputs([url])
    with pytest.raises(UsageError, match="Nothing matches"):
        list_inputs([f"{HERE}/foto/*.jpg"])
    name = f"{HERE}/photos/{next(iter(content))}"
    Path("list.txt").write_text(name)
    hub.private = True
    fsspec.filesystem("hf").invalidate_cache()
    for url in (f"{HERE}/photos", f"{HERE}/photos/*.jpg", f"{HERE}/x.tar", "hf://datasets/owner/n"):
        with pytest.raises(UsageError, match=r"cannot be read \(RepositoryNotFoundError 401\)"):
            list_inputs([url])
    assert outcome_of(lists=("list.txt",)) == {name: "unreadable"}
    hub.private = False  # its owner has logged in
    assert len(list_inputs([f"{HERE}/photos"])) == 7
    point_at("http://127.0.0.1:9", monkeypatch)  # a port where nobody listens
    with pytest.raises(UsageError, match=r"cannot be read \(ConnectError\)"):
        list_inputs([f"{HERE}/photos"])


def test_a_job_over_the_hub_that_was_stopped_goes_on(hub: type[Hub], encoder: Encoder):
    write_good(Path("photos"), 66)
    Path("photos/rotten.jpg").write_text("rotten")

    def stop(progress: Progress) -> None:
        if progress.committed:
            raise KeyboardInterrupt

    def run(tell: Tell | None = None) -> Summary:
        photos, out = f"{HERE}/photos", "out"
        return embed(photos, out=out, model=encoder, tokens=True, workers=1, progress=tell)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert [entry.rows for entry in read_commits(Path("out"))] == [64]
    hub.asked.clear()
    summary = run()
    assert (summary.kept_rows, summary.ok, summary.errors) == (64, 66, {"unidentified": 1})
    read = [path for _, path, _ in hub.asked if "/resolve/" in path]
    assert len(read) == 3
    assert not check_folder(Path("out")).faults
