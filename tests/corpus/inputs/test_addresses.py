"""What lists and URLs may reach, and what is never told of them."""

import base64
import json
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from features import contents
from fsspec.core import _un_chain
from fsspec.registry import available_protocols
from rotten import write_good
from served import outcome_of

from packvit.cli.convert import convert
from packvit.cli.embed import embed
from packvit.cli.pca import pca
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.addresses import ALLOWED, protocols, spell
from packvit.corpus.inputs.find import list_inputs

REFERENCE = '{"version": 1, "refs": {"x.jpg": ["file:///etc/hostname"]}}'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_good(Path("photos"), 2)
    Path("reference.json").write_text(REFERENCE)
    return tmp_path


REFUSED = (
    "bogus://x/y.jpg",
    "reference://x.jpg::reference.json",
    "reference::file://reference.json",
    "simplecache::file:///etc/hostname",
    "zip://x.jpg::simplecache::file:///x.zip",
    "zip://x.jpg::reference://x.zip::file:///x.json",
    "zip://x.jpg::data:,PK",
    "memory://x.jpg",
    "local:///etc/hostname",
    "ftp://user:hunter2@host/x.jpg",
    "sftp://host/x.jpg",
    "github://owner:name@main/x.jpg",
    "tar://x.jpg::file:///x.tar",
    "dir::memory://x.jpg",
)


@pytest.mark.parametrize("url", REFUSED)
def test_a_protocol_that_is_not_on_the_list_is_refused_or_a_row(url: str):  # cases S1 and V7
    photo = "photos/good-0000.jpg"
    with pytest.raises(
        UsageError, match=r"is not read: .*://.* Allowed are http, https, s3, gs, az"
    ):
        list_inputs([url, "photos"])
    Path("list.txt").write_text(f"{photo}\n{url}\n")
    found = outcome_of(lists=["list.txt"])
    assert found == {photo: Path(photo).read_bytes(), spell(url): "unreadable"}
    with pytest.raises(UsageError, match="is not read"):
        list_inputs([], [url.replace(".jpg", ".txt")])


def test_a_reference_in_a_list_costs_one_row_of_a_job(here: Path):  # case S1
    Path("list.txt").write_text(f"reference://x.jpg::{here}/reference.json\nphotos/good-0000.jpg\n")
    done = CliRunner().invoke(embed, ["--list", "list.txt", "--out", "out", "--device", "cpu"])
    assert done.exit_code == 3, done.output
    (entry,) = read_commits(Path("out"))
    rows = {row["id"]: row for row in pq.read_table(f"out/{entry.part}").to_pylist()}
    row = rows[f"reference://x.jpg::{here}/reference.json"]
    assert (row["status"], row["sha256"]) == ("unreadable", None)
    assert row["note"] == f"its protocol is none of {', '.join(ALLOWED)}"
    assert rows["photos/good-0000.jpg"]["status"] == "ok"


def test_the_protocols_of_a_chain_are_those_that_fsspec_would_open():  # case S1
    words = [f"{name}://a/b" for name in ("zip", "file", "reference", "memory", "http")]
    links = [*words, "simplecache", "blockcache", "reference", "/x/y.json", "a.b", "data:,x", "dir"]
    for url in [f"{a}::{b}" for a in links for b in links] + words:
        try:
            opened = [protocol for _, protocol, _ in _un_chain(url, {})]
        except (ImportError, ValueError):
            continue  # which opens nothing
        assert set(opened) <= set(protocols(url)), url
    assert set(ALLOWED) - {"az", "hf"} <= set(available_protocols())


SPELLED = {
    "http://user:hunter2@host/x.jpg": "http://host/x.jpg",
    "https://hunter2@host:8080/a@b.jpg": "https://host:8080/a@b.jpg",
    "http://user:hunt@er2@host/x.jpg?w=1#top": "http://host/x.jpg?w=1#top",
    "http://user:hun::ter2@host/x.jpg": "http://host/x.jpg",
    "http://h/x.jpg?X-Signature=hunter2": "http://h/x.jpg",
    "http://h/x.jpg?w=1&token=hunter2&h=2": "http://h/x.jpg?w=1&h=2",
    "http://h/x.jpg?TOKEN=hunter2#access_token=hunter2": "http://h/x.jpg",
    "http://h/x.jpg?key=hunter2&sort=key": "http://h/x.jpg?sort=key",
    "https://b.s3.amazonaws.com/x.jpg?X-Amz-Algorithm=A&X-Amz-Credential=hunter2&X-Amz-Date=1"
    "&X-Amz-Signature=hunter2&X-Amz-Security-Token=hunter2": "https://b.s3.amazonaws.com/x.jpg",
    "https://b/x.jpg?AWSAccessKeyId=hunter2&Expires=17&Signature=hunter2%3D": "https://b/x.jpg",
    "https://a.blob.core.windows.net/c/x.jpg?sv=1&se=2&sr=b&sp=r&sig=hunter2": "https://a.blob.core"
    ".windows.net/c/x.jpg",
    "https://d.cloudfront.net/x.jpg?Policy=hunter2&Key-Pair-Id=K&Signature=hunter2": "https://d."
    "cloudfront.net/x.jpg",
    "https://storage.googleapis.com/b/x?X-Goog-Signature=hunter2&generation=1": "https://storage."
    "googleapis.com/b/x?generation=1",
    "zip://a@b.jpg::http://user:hunter2@h/x.zip?sig=hunter2": "zip://a@b.jpg::http://h/x.zip",
    "zip://a.jpg::http://h/x.zip?sig=hunter2::file://x": "zip://a.jpg::http://h/x.zip::file://x",
    "s3://key:hunter2@bucket/x.jpg": "s3://bucket/x.jpg",
    "https://u:hun/ter2@h/x.jpg": "https://h/x.jpg",
    "https://h/x.jpg;jsessionid=hunter2?w=1": "https://h/x.jpg?w=1",
    "https://h/x?w=1;token=hunter2;h=2": "https://h/x?w=1;h=2",
    "https://h/x?se=1&amp;sig=hunter2&amp;w=1": "https://h/x?w=1",
    "https://h/x?X%2DAmz%2DSignature=hunter2&%73ig=hunter2": "https://h/x",
    "https://h/x?sig%3Dhunter2": "https://h/x",
    "https://h/x? sig =hunter2": "https://h/x",
    "https://h/x?authkey=hunter2&bearer=hunter2&pass=hunter2": "https://h/x",
    "https://h/x?md5=hunter2&expires=1": "https://h/x",
    "zip://a::https://u:hunter2@h/x.zip": "zip://a::https://h/x.zip",
    "file://user:hunter2@host/x.jpg": "file://host/x.jpg",
    "hf://user:hunter2@datasets/o/n@main/x.jpg": "hf://datasets/o/n@main/x.jpg",
    "https://h/x?code=hunter2hunter2hunter2&clientId=a": "https://h/x?clientId=a",
    "https://h/x.jpg?width=64&s=hunter2hunter2hunter2": "https://h/x.jpg?width=64",
    "https://h/x.jpg?ex=1&is=2&hm=hunter2hunter2hunter2&w=9": "https://h/x.jpg?w=9",
    "https://h/x?tk=hunter2&pw=hunter2&PHPSESSID=hunter2&st=hunter2hunter2hunter": "https://h/x",
    # And what lets nobody in stays.
    "http://h/x?code=us&s=612x612&k=20&t=1700000000&hash=0123456789abcdef": None,
    "http://h:80/a@b;c=1.jpg": None,
    "http://h/a?b;c&d;e=1": None,
    "http://h/x.jpg?version=2&expires=never&author=a&se=b": None,
    "http://h/a?b=c&d": None,
    "hf://datasets/o/n@main/x.jpg": None,
    "file:///a@b?token=x.jpg": "file:///a@b",
    "zip://a@b.jpg::x.zip": None,
    "az://container@account.dfs.core.windows.net/x.jpg": None,
    "no/url?token=1": None,
    "user:word@host/x.jpg": None,
}


@pytest.mark.parametrize("url", SPELLED)
def test_a_url_is_spelled_without_what_lets_somebody_in(url: str):  # case S4
    assert spell(url) == (SPELLED[url] or url)


class Locked(BaseHTTPRequestHandler):
    """Serves photographs to who has a password, or a signature that starts with hunter."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        signature = "".join(parse_qs(url.query).get("X-Signature", []))
        login = base64.b64encode(b"user:hunter2").decode()
        known = self.headers.get("Authorization") == f"Basic {login}"
        if not (known or signature.startswith("hunter")):
            return self.send_error(403)
        path = Path(url.path[1:])
        if not path.is_file():
            return self.send_error(404)
        data, area = path.read_bytes(), self.headers.get("Range")
        if area:
            first, last = (int(place) for place in area.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None


@pytest.fixture
def locked(here: Path) -> Iterator[str]:
    """The host and port of a server that wants credentials."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as serving:
        thread = Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def job(*words: str, out: str = "out") -> tuple[int, str]:
    done = CliRunner().invoke(embed, [*words, "--out", out, "--device", "cpu", "--json"])
    return done.exit_code, done.stdout + done.stderr


@pytest.mark.usefixtures("swift")
def test_credentials_open_a_url_and_are_nowhere_in_what_is_written(locked: str):  # case S4
    urls = [f"http://user:hunter2@{locked}/photos/good-0000.jpg"]
    urls += [f"http://{locked}/photos/good-0001.png?X-Signature=hunter3"]
    urls += [f"http://user:hunter2@{locked}/gone.jpg", f"http://{locked}/no.jpg?X-Signature=x"]
    Path("list.txt").write_text("\n".join(urls))
    code, said = job("--list", "list.txt")
    assert code == 3
    assert json.loads(said.splitlines()[0])["ok"] == 2
    (entry,) = read_commits(Path("out"))
    rows = pq.read_table(f"out/{entry.part}").to_pylist()
    names = ("gone.jpg", "no.jpg", "photos/good-0000.jpg", "photos/good-0001.png")
    assert [row["id"] for row in rows] == [f"http://{locked}/{name}" for name in names]
    written = b"".join(contents(Path("out")).values())
    assert b"hunter" not in written + said.encode()
    fresh = [url.replace("hunter3", "hunter4") for url in urls]  # as a new signature would be
    Path("list.txt").write_text("\n".join(fresh))
    code, said = job("--list", "list.txt")
    assert code == 3
    assert json.loads(said.splitlines()[0])["kept"] == 4


def test_urls_that_differ_in_credentials_alone_are_each_read(locked: str):  # case S4
    url = f"http://user:hunter2@{locked}/photos/good-0000.jpg"
    other = f"http://{locked}/photos/good-0000.jpg?X-Signature=hunter3"
    wrong = f"http://{locked}/photos/good-0000.jpg?X-Signature=x"
    plain, data = f"http://{locked}/photos/good-0000.jpg", Path("photos/good-0000.jpg").read_bytes()
    Path("list.txt").write_text("\n".join((other, wrong, url)))
    found = {plain: data, f"{plain}#2": "unreadable", f"{plain}#3": data}
    assert outcome_of(lists=["list.txt"]) == found
    with pytest.raises(UsageError, match=rf'called "{plain}"'):
        list_inputs([url, url])


def test_a_line_that_a_list_repeats_is_a_row_again(locked: str):  # case V7: no list is refused
    Path("list.txt").write_text("photos/good-0000.jpg\ngone.jpg\nphotos/good-0000.jpg\n")
    data = Path("photos/good-0000.jpg").read_bytes()
    found = {"photos/good-0000.jpg": data, "photos/good-0000.jpg#2": data, "gone.jpg": "missing"}
    assert outcome_of(lists=["list.txt"]) == found


def test_no_message_holds_credentials(locked: str):  # case S4
    host = f"user:hunter2@{locked}"
    for url in (
        f"http://{host}/gone.jpg",
        f"http://{host}/gone.tar?token=hunter3",
        f"http://{host}/gone/*.jpg?token=hunter3",
        f"http://{host}/x.tar.gz?token=hunter3",
        f"http://user:hunter2@{locked}x/a.jpg",
        f"ftp://{host}/x.jpg",
        f"http://{locked}/x.jpg?X-Signature=no-hunter",
    ):
        for words in ([url], ["--list", url]):
            code, said = job(*words)
            assert code in (2, 3), said
            assert "hunter" not in said
    code, said = job("photos", out=f"s3://{host}/x")
    assert code == 2
    assert "hunter" not in said


def test_an_archive_behind_a_signed_url_is_opened(locked: str):  # case S4
    with tarfile.open("x.tar", "w") as tar:
        tar.add("photos")
    keys = {
        f"photos/good-000{n}": Path(p).read_bytes()
        for n, p in enumerate(("photos/good-0000.jpg", "photos/good-0001.png"))
    }
    url = f"http://{locked}/x.tar"
    assert outcome_of(f"{url}?X-Signature=hunter3") == keys
    named = {f"{url}/{key}": data for key, data in keys.items()}
    more = outcome_of(f"{url}?X-Signature=hunter3", "photos")
    assert {key: more[key] for key in named} == named


OUTS = (
    "s3://bucket/x",
    "gs://b/x",
    "http://h/x",
    "file:///tmp/x",
    "s3:/b/x",
    "simplecache::s3://b",
)


@pytest.mark.parametrize("out", [*OUTS, "s3:x", "hf://datasets/o/n"])
def test_results_are_written_to_local_folders_and_features_to_stores_alone(out: str, here: Path):
    """Case S7."""
    before = sorted(here.rglob("*"))
    picture = f"{out}/x.png"
    for command, words, name, said in (
        (embed, ["photos", "--out", out], "out", "lies below s3://, gs:// or az://"),
        (pca, ["photos", "--out", picture], "--out", "local folders only"),
        (convert, ["tiny", out, "--layout", "original"], "FOLDER", "local folders only"),
    ):
        if command is embed and out.startswith(("s3://", "gs://")):
            continue  # where features may go
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 2
        assert f"{name} is {out}" in done.output
        assert said in " ".join(done.output.split())
        assert "Traceback" not in done.output
    assert sorted(here.rglob("*")) == before
