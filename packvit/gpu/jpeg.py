"""Find which JPEGs the GPU decodes exactly as Pillow does, and parse their headers. No torch.

nvJPEG's arithmetic equals libjpeg-turbo's for baseline JPEGs of 8 bits; whatever else there is goes
the way of every other format. Neither a file that is cut short nor one whose structure is odd ever
gets as far as nvJPEG, which would make pixels of it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from packvit.config import ImageConfig, PaddedPatches
from packvit.images.decode import MAX_PIXELS, open_image, read_turn
from packvit.images.errors import ImageError
from packvit.images.resize import Resize, SizePlan, resize_plan
from packvit.images.turns import TRANSPOSED

Reason = Literal[
    "not a JPEG",
    "refused by its header",
    "several frames",
    "EXIF unreadable",
    "not baseline",
    "not 8 bits",
    "colours other than YCbCr or grey",
    "uncommon subsampling",
    "uncommon structure",
    "cut short",
    "restart markers missing",
    "too narrow",
    "nearest filter",
    "padding",
]
# Of luma, against chroma's (1, 1): (horizontal, vertical).
Sampling = tuple[int, int]
# 4:4:4, 4:2:2, 4:2:0. Not 4:4:0: what the engine makes of it has not been seen.
SAMPLINGS: tuple[Sampling, ...] = ((1, 1), (2, 1), (2, 2))

SOF0, DHT, EOI, SOS, DQT, DRI, COM = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
RST0, RST7 = 0xD0, 0xD7
APP0, APP14, APP15 = 0xE0, 0xEE, 0xEF
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}  # all SOF markers


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a file must be decoded by Pillow."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Jpeg:
    """A file that the GPU decodes exactly: its stored size, and what turns it upright.

    `sampling` is None for grey. nvJPEG is given the first `length` bytes: up to the end marker.
    """

    height: int
    width: int
    sampling: Sampling | None
    turn: Image.Transpose | None
    length: int

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) once turned."""
        if self.turn in TRANSPOSED:
            return self.width, self.height
        return self.height, self.width

    @property
    def chroma(self) -> tuple[int, int]:
        """(height, width) of each chroma plane; (0, 0) where there is none."""
        if self.sampling is None:
            return 0, 0
        across, down = self.sampling
        return -(-self.height // down), -(-self.width // across)


@dataclass(frozen=True, slots=True)
class JpegPlan:
    """A file that the GPU decodes, and what is to become of it."""

    jpeg: Jpeg
    size: SizePlan

    @property
    def patches(self) -> int:
        """The number of its patches."""
        return self.size.rows * self.size.columns


def plan_jpeg(
    data: bytes,
    config: ImageConfig,
    *,
    resize: Resize | None = None,
    max_patches: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> JpegPlan | Refusal:
    """Return the plan to decode a file on the GPU, or why Pillow must decode it.

    What Pillow would refuse is refused here as well, so that Pillow's path gives it its code.

    Raises: ValueError as `resize_plan`, for options that contradict each other.
    """
    if config.resample == "nearest":
        return Refusal("nearest filter")
    jpeg = read_jpeg(data, max_pixels=max_pixels)
    if isinstance(jpeg, Refusal):
        return jpeg
    try:
        size = resize_plan(*jpeg.upright, config, resize=resize, max_patches=max_patches)
    except ImageError:
        return Refusal("refused by its header")
    if isinstance(config.sizing, PaddedPatches) and resize != "native":
        return Refusal("padding")
    return JpegPlan(jpeg, size)


def read_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Jpeg | Refusal:
    """Return the parsed header of a JPEG, or why the GPU must not decode it.

    Source: ITU-T T.81, annex B; libjpeg-turbo 3.1, jdapimin.c (colours) and jdsample.c.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return Refusal("not a JPEG")
    try:
        frame, length = _read_structure(data)
    except _Refused as refused:
        return Refusal(refused.reason)
    except IndexError:
        return Refusal("cut short")
    try:
        image = open_image(data, max_pixels=max_pixels).image
    except ImageError:
        return Refusal("refused by its header")
    if image.format != "JPEG":
        return Refusal("several frames")
    turn, readable = read_turn(image)
    if not readable:
        return Refusal("EXIF unreadable")
    if image.mode != ("L" if frame.sampling is None else "RGB"):
        return Refusal("colours other than YCbCr or grey")
    if image.size != (frame.width, frame.height):
        return Refusal("uncommon structure")
    jpeg = Jpeg(frame.height, frame.width, frame.sampling, turn, length)
    if frame.sampling is not None and frame.sampling[0] == 2 and jpeg.chroma[1] <= 2:
        return Refusal("too narrow")  # libjpeg doubles such columns, and interpolates all others
    return jpeg


class _Refused(Exception):
    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class _Frame:
    height: int
    width: int
    sampling: Sampling | None
    identifiers: tuple[int, ...]
    tables: frozenset[int]  # the quantisation tables it uses


def _read_structure(data: bytes) -> tuple[_Frame, int]:
    """Return the frame, and how many bytes there are up to the end marker; or raise."""
    frame: _Frame | None = None
    interval, adobe, jfif = 0, None, False
    quantisation: set[int] = set()
    huffman: set[int] = set()
    place = 2
    while True:
        if data[place] != 0xFF:
            raise _Refused("uncommon structure")
        marker = data[place + 1]
        size = data[place + 2] << 8 | data[place + 3]
        body = data[place + 4 : place + 2 + size]
        if size < 2 or len(body) != size - 2:
            raise _Refused("cut short")
        place += 2 + size
        if marker == SOS:
            break
        if marker in FRAMES:
            if marker != SOF0:
                raise _Refused("not baseline")
            if frame is not None:
                raise _Refused("uncommon structure")
            frame = _read_frame(body)
        elif marker == DQT:
            quantisation |= _quantisation_tables(body)
        elif marker == DHT:
            huffman |= _huffman_tables(body)
        elif marker == DRI:
            interval = body[0] << 8 | body[1]
        elif marker == APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker == APP0 and body.startswith(b"JFIF\0"):
            jfif = True
        elif not (APP0 <= marker <= APP15 or marker == COM):
            raise _Refused("uncommon structure")
    if frame is None:
        raise _Refused("uncommon structure")
    if not frame.tables <= quantisation or not _read_scan(body, frame) <= huffman:
        raise _Refused("uncommon structure")
    if frame.sampling is not None:
        known = jfif or adobe is not None or frame.identifiers == (1, 2, 3)
        if adobe not in (None, 1) or not known:
            raise _Refused("colours other than YCbCr or grey")
    return frame, _end(data, place, _restarts(frame, interval))


def _read_frame(body: bytes) -> _Frame:
    if body[0] != 8:
        raise _Refused("not 8 bits")
    height, width, components = body[1] << 8 | body[2], body[3] << 8 | body[4], body[5]
    if len(body) != 6 + 3 * components or 0 in (height, width):
        raise _Refused("uncommon structure")
    if components not in (1, 3):
        raise _Refused("colours other than YCbCr or grey")
    identifiers, factors, tables = body[6::3], body[7::3], body[8::3]
    samplings = [(factor >> 4, factor & 15) for factor in factors]
    if samplings[1:] not in ([], [(1, 1)] * 2) or samplings[0] not in SAMPLINGS:
        raise _Refused("uncommon subsampling")
    if components == 1 and samplings != [(1, 1)]:
        raise _Refused("uncommon subsampling")
    sampling = samplings[0] if components == 3 else None
    return _Frame(height, width, sampling, tuple(identifiers), frozenset(tables))


def _quantisation_tables(body: bytes) -> set[int]:
    if len(body) % 65 or any(first > 3 for first in body[::65]):
        raise _Refused("not 8 bits")  # or four tables of 16 bits, which baseline has not
    return set(body[::65])


def _huffman_tables(body: bytes) -> set[int]:
    found, place = set(), 0
    while place < len(body):
        found.add(body[place])
        place += 17 + sum(body[place + 1 : place + 17])
    if place != len(body):
        raise _Refused("uncommon structure")
    return found


def _read_scan(body: bytes, frame: _Frame) -> set[int]:
    """Return the Huffman tables used by a scan, which must hold all components and coefficients."""
    components = len(frame.identifiers)
    if body[0] != components or tuple(body[1 : 1 + 2 * components : 2]) != frame.identifiers:
        raise _Refused("uncommon structure")
    if body[1 + 2 * components :] != b"\x00\x3f\x00":
        raise _Refused("uncommon structure")
    tables = body[2 : 2 + 2 * components : 2]
    return {table >> 4 for table in tables} | {0x10 | table & 15 for table in tables}


def _restarts(frame: _Frame, interval: int) -> int:
    """Return how many restart markers a whole scan holds."""
    if not interval:
        return 0
    across, down = frame.sampling or (1, 1)
    units = -(-frame.width // (8 * across)) * -(-frame.height // (8 * down))
    return -(-units // interval) - 1


def _end(data: bytes, start: int, restarts: int) -> int:
    """Return where the scan's end marker ends, having counted its restart markers."""
    # In numpy: a regular expression takes five times as long over a megabyte.
    scan = np.frombuffer(data, np.uint8)[start:]
    places = np.flatnonzero(scan[:-1] == 0xFF)
    markers = scan[places + 1]
    # Within a scan, FF is followed by 0 (a byte FF) or by a restart marker; all else ends it.
    ends = np.flatnonzero((markers != 0) & ((markers < RST0) | (markers > RST7)))
    if not len(ends):
        raise _Refused("cut short")
    if markers[ends[0]] != EOI:
        raise _Refused("uncommon structure")  # another scan, or damage
    within = markers[: ends[0]]
    found = within[within != 0] - RST0
    if not np.array_equal(found, np.arange(restarts) & 7):
        raise _Refused("restart markers missing")
    return start + int(places[ends[0]]) + 2
