"""A local S3: moto's server, which counts requests and can fail from one on."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from packvit.corpus.folder.stores import StorePath, find_folder

BUCKET = "photographs"
# What answers a request instead of the server: its status, and the code in the body.
Answer = tuple[str, str]
Choose = Callable[[str, str], Answer | None]  # by the method and the path
DEAD = ("400 Bad Request", "Killed")  # which nobody tries again


class Server:
    """moto's S3, of which every request passes `answer` first."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.requests: list[tuple[str, str]] = []  # methods and paths
        self.before: Choose = lambda method, path: None
        self.after: Choose = lambda method, path: None  # once the server has done it
        self.headers: dict[str, Any] = {}  # of the last request, as WSGI names them
        self.lock = threading.Lock()

    def __call__(self, environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        with self.lock:
            self.requests.append((method, path))
            self.headers = environment
            if answer := self.before(method, path):
                environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
                return refuse(method, start, answer)
            done = list(self.application(environment, start_after := Late(start)))
            if answer := self.after(method, path):
                return refuse(method, start, answer)
            start_after.go()
            return done

    @contextmanager
    def dying(self, place: int, *, late: bool) -> Iterator[None]:
        """Answer nothing from a request on, counted from 0; of the first `late` does all but that.

        To the store that is what a killed job is: one that asks for nothing more.
        """
        start = len(self.requests)

        def is_over(method: str, path: str) -> Answer | None:
            return DEAD if len(self.requests) - 1 - start >= place + late else None

        def is_last(method: str, path: str) -> Answer | None:
            return DEAD if late and len(self.requests) - 1 - start == place else None

        with self.answering(is_over, is_last):
            yield

    @contextmanager
    def answering(self, before: Choose, after: Choose | None = None) -> Iterator[None]:
        """Answer requests by what is chosen, instead of the server or after it."""
        kept = self.before, self.after
        self.before, self.after = before, after or self.after
        try:
            yield
        finally:
            self.before, self.after = kept


class Late:
    """WSGI's start_response, held back."""

    def __init__(self, start: Any) -> None:
        self.start = start
        self.held: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        self.held = arguments

    def go(self) -> None:
        """Send the status and the headers."""
        self.start(*self.held)


def refuse(method: str, start: Any, answer: Answer) -> list[bytes]:
    """Answer as S3 does when it refuses."""
    status, code = answer
    body = (
        ""
        if method == "HEAD"
        else f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a secret</Message></Error>"
    )
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body.encode()]


@contextmanager
def serving() -> Iterator[Server]:
    """Run the server, with one bucket; the environment says how to reach it."""
    pytest.importorskip("s3fs", reason="extra s3 is not installed")
    pytest.importorskip("moto", reason="moto[server] is not installed")
    import fsspec
    from moto.moto_server.werkzeug_app import (  # pyright: ignore[reportMissingImports]
        DomainDispatcherApplication,
        create_backend_app,
    )
    from werkzeug.serving import (  # pyright: ignore[reportMissingImports]
        WSGIRequestHandler,
        make_server,
    )

    class Quiet(WSGIRequestHandler):
        def log_request(self, *arguments: Any, **named: Any) -> None:
            """Print nothing."""

    server = Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{http.port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIAPACKVITTESTING")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "packvit/secret/key")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield server
    finally:
        patch.undo()
        http.shutdown()
        thread.join()
        http.server_close()


def place(url: str) -> StorePath:
    """Return a folder in the store."""
    folder = find_folder(url)
    assert isinstance(folder, StorePath)
    return folder


def stored(url: str) -> dict[str, bytes]:
    """Return all objects below a URL by their names, the log as a local folder has it."""
    folder = place(url)
    found = {name: (folder / name).read_bytes() for name in folder.sizes()}
    commits = sorted(name for name in found if name.startswith("_commits/"))
    log = b"".join(found.pop(name) for name in commits)
    return found | ({"_commits.jsonl": log} if log else {})


def environment_secrets() -> list[str]:
    """Return what must be in no file and no message."""
    return [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]]
