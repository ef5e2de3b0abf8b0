"""Inputs behind http, from a server on this machine that also fails in the ways that servers do."""

import gzip
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
from rotten import write_good
from served import outcome_of, write_served

from packvit.config import ImageConfig
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.processes import Worker
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.inputs import limits, retries
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Input, read
from packvit.corpus.job import embed
from packvit.encoder import Encoder
from packvit.images.errors import ImageError

TRIES: dict[str, list[float]] = {}  # of the files that are refused at first
SECONDS = 60  # that the server hangs for: longer than any test waits


class Handler(SimpleHTTPRequestHandler):
    """Serves the working directory; parts of files too, unless their name says otherwise."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        name = self.path.rpartition("/")[2]
        code = name.partition(".")[0]
        wanted = self.headers.get("Range")
        if name.startswith("busy"):
            self.refuse(name)
        elif code.isdigit():
            self.send_error(int(code))
        elif name == "hangs.jpg":
            time.sleep(SECONDS)
        elif name == "hangs-up.jpg":
            self.close_connection = True
        elif name == "cut.jpg":
            self.reply(200, b"no more than this", ("Content-Length", "1000"))
        elif name == "circle":
            self.send_error(404)
        elif self.path.endswith("/circle/"):
            self.reply(200, b'<a href="./">.</a> <a href="../">..</a> <a href="a.jpg">a</a>')
        elif "/endless" in self.path:
            self.pour(wanted)
        elif name == "packed.jpg":
            packed = gzip.compress(bytes(300 << 20), 1)
            self.reply(200, packed, ("Content-Encoding", "gzip"))
        elif name == "packed":
            self.reply(200, gzip.compress(bytes(300 << 20), 1), ("Content-Encoding", "gzip"))
        elif "/ring/" in self.path and "." not in name:
            self.reply(200, b'<a href="sub/">s</a> <a href="also/">s</a> <a href="a.jpg">a</a>')
        elif "/stairs/" in self.path and "." not in name:
            self.reply(200, b'<a href="sub/">s</a> <a href="also/">s</a>')
        elif "/deep/" in self.path and "." not in name:
            level = self.path.rstrip("/").count("/")
            self.reply(200, b'<a href="d%d/">s</a> <a href="d%d.jpg">a</a>' % (level, level))
        elif wanted and name != "whole.tar":
            data = Path(self.translate_path(self.path)).read_bytes()
            first, last = (int(place) for place in wanted.removeprefix("bytes=").split("-"))
            area = f"bytes {first}-{last}/{len(data)}"
            self.reply(206, data[first : last + 1], ("Content-Range", area))
        elif self.command == "HEAD":
            super().do_HEAD()
        else:
            super().do_GET()

    def refuse(self, name: str) -> None:
        """Refuse a file at first, with the status and the wait in its name; then serve it."""
        _, status, wait, _ = name.replace(".", "-").split("-")
        if self.command == "GET":
            TRIES[name] = [*TRIES.get(name, []), time.monotonic()]
        if self.command == "HEAD" or len(TRIES[name]) > 2:
            self.reply(200, name.encode())
        elif status == "0":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            waits = ("Retry-After", wait)
            self.reply(int(status), b"", *([waits] if wait != "0" else []))

    def pour(self, wanted: str | None) -> None:
        """Send what has no end, whatever HEAD said of it."""
        self.send_response(206 if wanted and "lies" in self.path else 200)
        if self.command == "HEAD":
            self.send_header("Content-Length", "100")
        self.end_headers()
        self.close_connection = True
        try:
            while self.command == "GET":
                self.wfile.write(bytes(1 << 20))
        except ConnectionError:
            pass

    def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        named = {"Content-Type": "text/html", "Content-Length": str(len(body))} | dict(headers)
        self.send_response(status)
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of the working directory; this process soon tries again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retries, "BOUND", retries.Bound(pauses=(0.01, 0.02, 0.03), longest=1.5))
    TRIES.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        serving.block_on_close = False  # nobody waits for an answer that hangs
        thread = Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_http_names_a_file_a_folder_a_pattern_or_an_archive(server: str):
    content = write_served(3)
    assert outcome_of(f"{server}/photos") == outcome_of(f"{server}/photos/") == content
    one, data = next(iter(content.items()))
    assert outcome_of(f"{server}/photos/{one}") == {f"{server}/photos/{one}": data}
    found = {f"{server}/photos/{name}": data for name, data in content.items()}
    assert outcome_of(f"{server}/photos/**") == found | {
        f"{server}/photos/notes.txt": b"no photograph"  # a pattern names what it matches
    }
    keys = {f"photos/{os.path.splitext(name)[0]}": data for name, data in content.items()}
    assert outcome_of(f"{server}/x.tar") == keys
    rows = {f"photos/{name}": data for name, data in content.items()}
    assert outcome_of(f"{server}/x.parquet") == rows


def test_whatever_a_server_answers_is_a_row(server: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        codes = {
            f"{server}/gone.jpg": "missing",
            f"{server}/410.jpg": "missing",
            f"{server}/403.jpg": "unreadable",
            f"{server}/500.jpg": "unreadable",
            f"{server}/hangs-up.jpg": "unreadable",
            f"{server}/cut.jpg": "unreadable",
            f"http://127.0.0.1:{taken.getsockname()[1]}/a.jpg": "unreadable",
        }
        assert outcome_of(*codes) == codes


def test_addresses_of_which_none_leads_anywhere_are_refused(server: str):
    write_served(3)
    here = f"{server}/photos/"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for url, answer, code in (
            (f"{server}/gone", "is not there. Check the spelling", "missing"),
            (f"{server}/gone.tar", "is not there", "missing"),
            (f"{server}/gone.jpg", "is not there", None),
            (f"{server}/gone.jpg?version=1.5", "is not there", None),
            (f"{server}/503.tar", "cannot be read (ClientResponseError 503)", "unreadable"),
            (f"{server}/403", "cannot be read (ClientResponseError 403)", "unreadable"),
            (f"{nobody}/photos", "cannot be read (ConnectionRefusedError)", "unreadable"),
        ):
            with pytest.raises(UsageError) as caught:
                list_inputs([url])
            assert str(caught.value).startswith(f'"{url}" {answer}')
            beside = {source.id: source.error for source in list_inputs([here, url])}
            assert len(beside) == 6  # beside others it is a row
            assert beside[url] == (code and (code, "list"))  # or will be once it is asked for
        with pytest.raises(UsageError, match=r"cannot be read \(ConnectionRefusedError\)"):
            list_inputs([here, f"{nobody}/photos/*.jpg"])
    with pytest.raises(UsageError, match="Nothing matches"):
        list_inputs([f"{server}/gone/*.jpg"])


def test_a_member_of_a_tar_is_never_taken_from_another_place(server: str):
    write_served(3)
    os.link("x.tar", "whole.tar")
    found = list(list_inputs([f"{server}/whole.tar"]))
    assert len(found) == 5
    for source in found:
        with pytest.raises(ImageError) as caught:
            read(source)
        assert caught.value.note == "its server sends no parts of a file"


def test_a_page_that_links_to_itself_is_read_once(server: str):
    assert outcome_of(f"{server}/circle/") == {"a.jpg": "missing"}


MEASURE = """
import sys
from packvit.corpus.inputs.sources import Input, Member, read
from packvit.images.errors import ImageError
member = Member(512, 100) if sys.argv[2] == "member" else None
try:
    read(Input("x", sys.argv[1], None, member))
except ImageError as error:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(error.code, "|", error.note, "|", peak.split()[1])
"""


LIST = """
import sys
from packvit.config import ImageConfig
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.processes import Worker
from packvit.corpus.inputs.find import list_inputs
try:
    list_inputs([sys.argv[1]])
except UsageError:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak.split()[1])
"""
HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(
    ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None),
    "hwc",
    "native",
    256,
    100_000_000,
)


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [
        ("endless.jpg", "file", "longer than its server said, and than allowed"),
        ("packed.jpg", "file", "longer than its server said, and than allowed"),
        ("endless.tar", "member", "its server sends no parts of a file"),
        ("endless-lies.tar", "member", "longer than its server said, and than allowed"),
    ],
)
def test_a_body_without_end_costs_a_row_and_a_bounded_memory(
    server: str, name: str, kind: str, note: str
):  # case S2
    argv = [sys.executable, "-c", MEASURE, f"{server}/{name}", kind]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    code, found, kilobytes = said.split(" | ")
    assert (code, found) == ("unreadable", note)
    assert int(kilobytes) < 500 << 10


def test_a_page_that_holds_itself_is_read_once_however_deep(server: str):  # case V6
    lost = {"sub": "unreadable", "also": "unreadable"}
    assert outcome_of(f"{server}/ring/") == {"a.jpg": "missing"} | lost
    stairs = outcome_of(f"{server}/stairs/")
    assert set(stairs.values()) == {"unreadable"}
    # One level without a file may be like the one above it.
    assert set(stairs) == {"sub/sub", "sub/also", "also/sub", "also/also"}
    deep = outcome_of(f"{server}/deep/")
    assert sorted(deep.values()).count("unreadable") == 1
    assert len(deep) == 33


@pytest.mark.soak
def test_a_server_that_hangs_costs_one_image_and_the_job_goes_on(
    server: str, tmp_path: Path, encoder: Encoder
):
    content = write_served(3)
    Path("list.txt").write_text(
        "\n".join(f"{server}/{name}" for name in ["hangs.jpg", "500.jpg", "photos/page.html"])
    )
    Path("photos/page.html").write_text("no photograph")
    summary = embed(
        [f"{server}/photos/"],
        lists=["list.txt"],
        out=tmp_path / "out",
        model=encoder,
        workers=2,
        image_timeout=8.0,
    )
    assert summary.ok == len(content)
    assert summary.errors == {"timeout": 1, "unidentified": 1, "unreadable": 1}
    assert not check_folder(tmp_path / "out").faults


@pytest.mark.parametrize(
    "name",
    ["busy-429-1.jpg", "busy-503-0.jpg", "busy-500-0.jpg", "busy-529-0.jpg", "busy-0-0.jpg"],
)
def test_a_busy_server_is_asked_again_after_the_time_it_asks_for(server: str, name: str):
    """S3"""
    assert read(Input("x", f"{server}/{name}")) == name.encode()
    assert len(TRIES[name]) == 3
    waited = [after - before for before, after in pairwise(TRIES[name])]
    least = float(name.split("-")[2][0])
    assert all(each >= least for each in waited)


def test_a_server_that_stays_busy_is_asked_a_bounded_number_of_times(server: str):
    """S3"""
    for name, note in (
        ("503.jpg", "HTTP 503, 4 times"),
        ("hangs-up.jpg", "a cut connection, 4 times"),
        ("524.jpg", "HTTP 524, 4 times"),
        ("501.jpg", None),
        ("404.jpg", None),
        ("403.jpg", None),
        ("204.jpg", "HTTP 204"),
    ):
        with pytest.raises(ImageError) as refused:
            read(Input("x", f"{server}/{name}"))
        assert refused.value.note == note
    with pytest.raises(ImageError, match="cannot be used") as refused:
        read(Input("x", f"{server}/busy-429-3600.jpg"))
    assert refused.value.note == "its server asks to wait for 3,600 s"


def test_a_page_of_links_has_a_size_limit(server: str, monkeypatch: pytest.MonkeyPatch):
    """Point 4 of issue 16: the main process reads pages of links whole."""
    write_good(Path("photos"), 2)
    assert len(outcome_of(f"{server}/photos/")) == 2
    monkeypatch.setattr(limits, "MOST_PAGE", 100)
    with pytest.raises(UsageError, match="cannot be read"):
        outcome_of(f"{server}/photos/")


def test_a_page_that_unpacks_to_more_is_never_held(server: str):
    """S2, in the process that lists: by the question whether it is a folder too."""
    argv = [sys.executable, "-c", LIST, f"{server}/packed"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(said) < 200 << 10


@pytest.mark.soak
def test_the_pauses_that_a_server_asks_for_do_not_count_towards_the_time_of_an_image(server: str):
    worker = Worker()
    source = Input("x", f"{server}/busy-503-2.jpg")  # twice, then its name
    start = time.monotonic()
    [prepared], took = worker.prepare([source], PREPROCESSING, lambda pixels: None, 3.0)
    worker.end()
    assert (prepared.row.status, prepared.row.stage) == ("unidentified", "header")
    assert took < 3.0 < 4.0 < time.monotonic() - start


def test_errors_of_a_server_are_tried_again_by_a_finished_job(
    server: str, tmp_path: Path, encoder: Encoder
):
    """S3"""
    names = write_good(Path("photos"), 3)
    (gone := Path("photos") / names[1]).rename("aside.jpg")
    urls = [f"{server}/photos/{name}" for name in names]
    out = tmp_path / "out"
    assert embed(urls, out=out, model=encoder).errors == {"missing": 1}
    Path("aside.jpg").rename(gone)
    assert embed(urls, out=out, model=encoder).errors == {"missing": 1}
    done = embed(urls, out=out, model=encoder, retry_errors=["missing"])
    assert (done.ok, done.errors) == (3, {})
    assert not check_folder(out).faults
