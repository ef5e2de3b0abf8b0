"""A decode worker: a process that prepares inputs, and never imports torch.

`processes.py` starts `python -m packvit.corpus.decode.worker DESCRIPTOR` and talks with it over
a socket. The worker first sends "ready". For each task of one or more inputs it sends the pixels of
the first input's header and waits for permission to decode; then it sends the results of the inputs
it prepared, at least the first, followed by the bytes of their patches or files, end to end. An
error found before decoding, or a JPEG for the GPU, needs no permission; any other input after the
first is left for the next task. Before it waits to ask a busy server again, it sends the seconds,
as a float; they do not count towards the image's.
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
# After this many bytes of files, or seconds, results are sent, and other inputs left.
MOST_BYTES = 4 << 20
MOST_SECONDS = 0.1


class Left(Exception):
    """An input after the first needs permission to decode: it is left for the next task."""


def send(link: socket.socket, message: object) -> None:
    """Send a message whole."""
    data = pickle.dumps(message)
    link.sendall(len(data).to_bytes(LENGTH, "big") + data)


def receive(link: socket.socket) -> Any:
    """Return the next message.

    Raises: EOFError if the other side has closed; TimeoutError where `link` has a time limit.
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
    """Have the system kill this process once its parent has died.

    The parent holds the other end of stdin and never writes to it. An idle worker exits anyway,
    when its socket closes.
    """
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere a worker finishes its image first
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def main() -> None:
    """Serve tasks until the other side closes."""
    die_with_parent()
    import numpy as np
    from PIL import AvifImagePlugin

    from packvit.corpus.decode.prepare import Preprocessing, prepare
    from packvit.corpus.folder.rows import Row

    # Slow imports: by now this process cannot be orphaned.
    from packvit.corpus.inputs.addresses import spell_text
    from packvit.corpus.inputs.sources import Input
    from packvit.gpu.jpeg import JpegPlan

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the other CPUs have workers of their own
    link = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides what libraries print about bad images

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

        def pause(seconds: float) -> None:
            if results:
                raise Left
            send(link, seconds)
            time.sleep(seconds)

        def spent(seconds: float) -> None:
            send(link, seconds)

        for source in sources:
            try:
                prepared = prepare(
                    source, preprocessing, admit, pause=pause, spent=spent, alone=True
                )
            except Left:
                break
            except (EOFError, ConnectionError):
                raise
            except Exception:  # a bug of ours: sent to the parent, which raises it
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
