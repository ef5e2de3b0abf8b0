"""nvJPEG through ctypes: many JPEGs to their planes of luma and chroma in one call.

torchvision hands out nvJPEG's RGB alone, whose chroma is upsampled otherwise than libjpeg's.

Source: nvjpeg.h of CUDA 13.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from weakref import finalize

import numpy as np

# The engine beside the SMs: it takes no time from an encoder, and its planes are libjpeg's. The
# other backends' are not: of 40 photographs decoded on the SMs (nvJPEG 13.0) all differed.
BACKEND_HARDWARE = 3
NO_MEMORY = 5
STATUS = {
    1: "not initialized",
    2: "invalid parameter",
    3: "bad JPEG",
    4: "JPEG not supported",
    5: "allocator failure",
    6: "execution failed",
    7: "architecture mismatch",
    8: "internal error",
    9: "implementation not supported",
    10: "incomplete bitstream",
}
OUTPUT_YUV = 1
INSTALL = "Install: pip install 'packvit[gpu-decode]'"

# Where a plane begins in the device's memory, and the bytes from one of its rows to the next.
Plane = tuple[int, int]


class _Image(ctypes.Structure):
    _fields_ = (("channel", c_void_p * 4), ("pitch", c_size_t * 4))


class NvJpegError(RuntimeError):
    """A call that nvJPEG answered with an error: of the library, or of one of the files."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call}: {STATUS.get(status, f'status {status}')}")
        self.status = status


def ask_for_queues() -> None:
    """Have CUDA give every stream a hardware queue of its own, if it has not begun in this process.

    By default there are 8, and nvJPEG works on 14 streams of its own: what lies in a queue behind a
    pack of the encoder's waits for all of it. What the user has set stays.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class NvJpeg:
    """The JPEG engine of the current CUDA device, for one thread.

    Raises: ImportError without nvJPEG; NvJpegError for a GPU without the engine.
    """

    def __init__(self) -> None:
        self._library = load_library()
        self._handle, self._state = c_void_p(), c_void_p()
        _call(
            self._library,
            "nvjpegCreateEx",
            c_int(BACKEND_HARDWARE),
            None,
            None,
            c_uint(0),
            byref(self._handle),
        )
        finalize(self, _destroy, self._library, self._handle, self._state)
        _call(self._library, "nvjpegJpegStateCreate", self._handle, byref(self._state))

    def decode(
        self,
        files: Sequence[bytes | np.ndarray],
        lengths: Sequence[int],
        planes: Sequence[Sequence[Plane]],
        stream: int,
    ) -> None:
        """Write each file's planes, of the first `lengths` bytes of it, in order on a CUDA stream.

        The files must stay in memory until the stream has come this far.

        Raises: NvJpegError; then nothing is known of any of the planes.
        """
        count = len(files)
        images = (_Image * count)()
        starts = [np.frombuffer(file, np.uint8).ctypes.data for file in files]
        for image, ours in zip(images, planes, strict=True):
            for channel, (address, pitch) in enumerate(ours):
                image.channel[channel], image.pitch[channel] = address, pitch
        _call(
            self._library,
            "nvjpegDecodeBatchedInitialize",
            self._handle,
            self._state,
            c_int(count),
            c_int(1),
            c_int(OUTPUT_YUV),
        )
        _call(
            self._library,
            "nvjpegDecodeBatched",
            self._handle,
            self._state,
            (c_void_p * count)(*starts),
            (c_size_t * count)(*lengths),
            images,
            c_void_p(stream),
        )


def _destroy(library: ctypes.CDLL, handle: c_void_p, state: c_void_p) -> None:
    if state:
        library.nvjpegJpegStateDestroy(state)
    library.nvjpegDestroy(handle)


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        raise NvJpegError(name, status)


def load_library() -> ctypes.CDLL:
    """Return libnvjpeg; no GPU is touched.

    Raises: ImportError with what to install if there is none.
    """
    for place in places():
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise ImportError(f"libnvjpeg, which decodes JPEGs on the GPU, was not found. {INSTALL}")


def places() -> Iterator[str]:
    """Yield where the library may be: in NVIDIA's wheels, on the system, in a CUDA toolkit."""
    wheels = find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        yield from map(str, sorted(Path(folder).glob("*/lib/libnvjpeg.so.*"), reverse=True))
    named = find_library("nvjpeg")
    if named:
        yield named
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    yield from map(str, sorted(toolkit.glob("lib64/libnvjpeg.so*")))
