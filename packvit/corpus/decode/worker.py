"""A decode worker: a process that prepares inputs, and never imports torch.

`processes.py` starts `python -m packvit.corpus.decode.worker DESCRIPTOR` and talks with it through
a socket: a greeting; then for each task, which is one input or several, the pixels of the first
one's header, to be admitted, and the results of as many as were prepared, at least of the first.
An error that the header shows, or an earlier one, is a result at once, and so is a JPEG for the
device; whatever else comes behind another input is left for the next task. Behind the results come
the bytes of their patches, or files, end to end.
"""

import fcntl
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

LENGTH = 8  # bytes that say how long a message is
# With so many bytes of files, or after so long, results are told, and other inputs left.
MOST_BYTES = 4 << 20
MOST_SECONDS = 0.1


class Left(Exception):
    """An input that has to be admitted, behind others: it is left for the next task."""


def send(link: socket.socket, message: object) -> None:
    """Send a message whole."""
    data = pickle.dumps(message)
    link.sendall(len(data).to_bytes(LENGTH, "big") + data)


def receive(link: socket.socket) -> Any:
    """Return the next message.

    Raises: EOFError if the other side has gone; TimeoutError where `link` has a time limit.
    """
    length = int.from_bytes(receive_into(link, bytearray(LENGTH)), "big")
    return pickle.loads(receive_into(link, bytearray(length)))


def receive_into(link: socket.socket, buffer: bytearray | memoryview) -> bytearray | memoryview:
    """Fill a buffer with the bytes that come next, and return it."""
    view, filled = memoryview(buffer), 0
    while filled < len(view):
        count = link.recv_into(view[filled:])
        if not count:
            raise EOFError
        filled += count
    return buffer


def die_with_parent() -> None:
    """Have the system kill this process, whatever it does then, once the parent has gone.

    The parent holds the other end of stdin and writes nothing. An idle worker needs none of this:
    it finds its socket closed.
    """
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere a worker finishes its image first
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def main() -> None:
    """Serve tasks until the other side has gone."""
    die_with_parent()
    import numpy as np
    from PIL import AvifImagePlugin

    from packvit.corpus.decode.prepare import Preprocessing, prepare
    from packvit.corpus.folder.rows import Row

    # Slow: by now this process cannot be orphaned.
    from packvit.corpus.inputs.addresses import spell_text
    from packvit.corpus.inputs.sources import Input
    from packvit.gpu.jpeg import JpegPlan

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the other CPUs have workers of their own
    link = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of bad images

    def serve(sources: Sequence[Input], preprocessing: Preprocessing) -> None:
        results: list[tuple[Row, tuple[int, ...] | None, JpegPlan | None]] = []
        contents: list[np.ndarray] = []
        admitted, end = False, time.monotonic() + MOST_SECONDS

        def admit(pixels: int) -> None:
            nonlocal admitted
            if results:
                raise Left
            send(link, pixels)
            receive(link)
            admitted = True

        for source in sources:
            try:
                prepared = prepare(source, preprocessing, admit)
            except Left:
                break
            except (EOFError, ConnectionError):
                raise
            except Exception:  # a fault of ours: told where it can be seen
                send(link, spell_text(f"{source.id!r}:\n{traceback.format_exc()}"))
                return
            jpeg, content = prepared.jpeg, prepared.patches
            if jpeg:
                content = np.frombuffer(jpeg.data, np.uint8)
            shape = None if content is None else content.shape
            results.append((prepared.row, shape, jpeg and jpeg.plan))
            if content is not None:
                contents.append(content)
            if admitted or sum(each.nbytes for each in contents) >= MOST_BYTES:
                break
            if time.monotonic() > end:
                break
        send(link, results)
        for content in contents:
            link.sendall(content.data)

    try:
        send(link, "ready")
        while True:
            serve(*receive(link))
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    main()
