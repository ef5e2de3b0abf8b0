"""The hub's file protocol, as far as huggingface_hub downloads with it, served from this machine.

Small files are answered at once; weights are answered with a redirect to their content, as the
hub does with large files. Refusals carry the header by which the client tells them apart.

Source: huggingface_hub 1.33, `file_download.py`, `hf_api.py` and `utils/_http.py`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model: what each commit holds, and where its branches stand."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    status: int = 200  # anything else is the answer to every request


@dataclass
class Request:
    """What the client asked for."""

    method: str
    path: str
    authorization: str | None
    sent: int = 0  # bytes of the answer's body


@dataclass
class Answer:
    """What the server says."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """A hub in a thread: `with Hub() as hub: hub.repositories["owner/name"] = ...`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # Another host to the client, which is how it tells where content lies and sends no token.
        self.content_url = f"http://localhost:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.ranges = True  # whether parts of files are sent
        self.thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def answer(self, path: str, authorization: str | None) -> Answer:
        """Return what the hub says to a request for `path`."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        match parts:
            case ["cdn", digest]:
                return self.content(digest)
            case ["api", "models", owner, name, "tree", revision]:
                file = None
            case [owner, name, "resolve", revision, file]:
                pass
            case _:
                return Answer(404)
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return Answer(404 if authorization else 401, headers={"X-Error-Code": "RepoNotFound"})
        if repository.status != 200:
            return Answer(repository.status)
        if repository.gated and file is not None:  # the hub lists a gated model's files to anyone
            return Answer(403 if authorization else 401, headers={"X-Error-Code": "GatedRepo"})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if file is None:
            return listing(files)
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            return Answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        body = files[file]
        digest = hashlib.sha256(body).hexdigest()
        if not file.endswith(".safetensors"):
            return Answer(200, body, headers | {"ETag": f'"{digest[:40]}"'})
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
        return Answer(302, b"", headers | linked | {"Location": f"{self.content_url}/cdn/{digest}"})

    def content(self, digest: str) -> Answer:
        """Return the file with this sha256."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for body in files.values():
                    if hashlib.sha256(body).hexdigest() == digest:
                        return Answer(200, body, {"ETag": f'"{digest}"'})
        return Answer(404)


def part_of(answer: Answer, asked: str | None) -> Answer:
    """Return the bytes of an answer that a Range header asks for."""
    if asked is None:
        return answer
    first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
    body, size = answer.body[first : last + 1], len(answer.body)
    said = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{size}"}
    return Answer(206, body, answer.headers | said)


def listing(files: dict[str, bytes]) -> Answer:
    """Return a commit's files as the hub lists them."""
    entries = [
        {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for path, body in sorted(files.items())
    ]
    return Answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for the hub, and keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride] -- the only server it serves

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self.reply(with_body=False)

    def do_GET(self) -> None:
        """Answer with the body."""
        self.reply(with_body=True)

    def reply(self, *, with_body: bool) -> None:
        """Send the hub's answer to this request."""
        authorization = self.headers.get("Authorization")
        answer = self.server.answer(self.path, authorization)
        if answer.status == 200 and self.server.ranges:
            answer = part_of(answer, self.headers.get("Range"))
        sent = len(answer.body) if with_body else 0
        self.server.requests.append(Request(self.command, self.path, authorization, sent))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the tests read `requests`."""
