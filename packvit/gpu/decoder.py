"""Decode JPEGs to patches on the device: nvJPEG for the planes, then three kernel launches.

    decoder = JpegDecoder(encoder.images, encoder.patch_order, device)
    decoded = decoder.decode(files, plans)

The files and plans come from `jpeg.plan_jpeg`, which runs wherever the bytes are read.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from packvit.config import ImageConfig, PatchOrder
from packvit.gpu.jpeg import JpegPlan
from packvit.gpu.nvjpeg import NO_MEMORY, NvJpeg, NvJpegError, Plane, load_library
from packvit.gpu.reference import resize
from packvit.gpu.resampling import rows_first, windows
from packvit.images.resize import SizePlan
from packvit.images.turns import FLIPPED_COLUMNS, FLIPPED_ROWS, TRANSPOSED

PIXELS_AT_ONCE = 128 << 20  # decoded between two launches
# For each of them, where nothing is enlarged: planes (1.5, or 3 of 4:4:4), RGB and half-resized.
BYTES_A_PIXEL = 9
ALIGNMENT = 256  # bytes, of each plane and of each of its rows: whole lines of memory


@dataclass(frozen=True, slots=True)
class Decoded:
    """The patches of all images, and the indices of those that nvJPEG could not decode.

    The rows of the latter are zeros; the caller decodes them with Pillow.

    Shapes: patches uint8 [T, P], on the device.
    """

    patches: UInt8[Tensor, "T P"]
    failed: tuple[int, ...]


class Upright(NamedTuple):
    """The arguments of upright_kernel for an image; sizes are as stored, offsets in bytes."""

    height: int
    width: int
    swapped: bool
    flipped_rows: bool
    flipped_columns: bool
    luma: int
    blue: int
    red: int
    luma_pitch: int
    chroma_pitch: int
    across: int
    down: int
    chroma_columns: int
    chroma_rows: int
    out: int
    # Pads rows to a multiple of 16 bytes: Triton recompiles for tables with other alignment.
    unused: int = 0


class Pass(NamedTuple):
    """The arguments of pass_kernel for an image: its output size, and strides of the source."""

    height: int
    width: int
    step: int
    other: int
    last: int
    plane: int
    across: bool
    taps: int
    starts: int
    weights: int
    source: int
    out: int


class JpegDecoder:
    """Decodes, resizes and cuts packs of JPEGs on one device, from one thread.

    It uses its own high-priority stream, so that small kernels do not queue behind an encoder's
    large ones. Create it in the thread of the encoder, whose stream reads the patches; call it from
    another thread, so that the next pack is decoded while this one is encoded.

    Units: `pixels_at_once` limits the pixels decoded between two launches, except for one image.
    Raises: ImportError with what to install if nvJPEG or Triton is missing; RuntimeError if the
    device has no JPEG engine, or the installed Pillow resizes differently.
    """

    def __init__(
        self,
        images: ImageConfig,
        patch_order: PatchOrder,
        device: torch.device,
        *,
        pixels_at_once: int = PIXELS_AT_ONCE,
        engine: Future[NvJpeg] | None = None,
    ) -> None:
        check_decoder(device)
        self.images: ImageConfig = images
        self.patch_order: PatchOrder = patch_order
        self.device = device
        self.pixels_at_once = pixels_at_once
        with torch.cuda.device(device):
            self.consumer = torch.cuda.current_stream()
            self.stream = torch.cuda.Stream(priority=-1)
            self._nvjpeg = _engine(device, engine)

    def decode(self, files: Sequence[bytes | np.ndarray], plans: Sequence[JpegPlan]) -> Decoded:
        """Return the patches of `files`, concatenated in order, when they are finished.

        Raises: torch.OutOfMemoryError if they do not fit on the device.
        """
        starts = list(accumulate((plan.patches for plan in plans), initial=0))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            width = 3 * self.images.patch**2
            patches = torch.empty(starts[-1], width, dtype=torch.uint8, device=self.device)
            failed: list[int] = []
            for first, end in groups(plans, self.pixels_at_once):
                missing = self._decode_group(
                    files[first:end], plans[first:end], patches[starts[first] : starts[end]]
                )
                failed += [first + place for place in missing]
            for place in failed:
                patches[starts[place] : starts[place + 1]] = 0
            patches.record_stream(self.consumer)
            self.stream.synchronize()  # blocks this thread only; after it the files may be freed
        return Decoded(patches, tuple(failed))

    def _decode_group(
        self, files: Sequence[bytes | np.ndarray], plans: Sequence[JpegPlan], out: Tensor
    ) -> list[int]:
        layout, size = lay_out(plans)
        # Zeros, since nvJPEG may leave parts of a damaged file unwritten.
        planes = torch.zeros(size, dtype=torch.uint8, device=self.device)
        failed = self._decode_planes(files, plans, planes, layout)
        planes_to_patches(planes, layout, plans, self.images, self.patch_order, out)
        return failed

    def _decode_planes(
        self,
        files: Sequence[bytes | np.ndarray],
        plans: Sequence[JpegPlan],
        planes: Tensor,
        layout: Sequence[Sequence[Plane]],
    ) -> list[int]:
        """Run nvJPEG on all files at once, or one by one if that fails."""
        lengths = [plan.jpeg.length for plan in plans]
        base, stream = planes.data_ptr(), self.stream.cuda_stream
        places = [[(base + start, pitch) for start, pitch in ours] for ours in layout]
        try:
            self._nvjpeg.decode(files, lengths, places, stream)
            self.stream.synchronize()
            return []
        except NvJpegError as error:
            if error.status == NO_MEMORY:  # nvJPEG's own memory ran out: not an error of a file
                raise torch.OutOfMemoryError(str(error)) from error
            failed = []
        for place, file in enumerate(files):
            try:
                self.stream.synchronize()
                self._nvjpeg.decode([file], [lengths[place]], [places[place]], stream)
            except NvJpegError:
                failed.append(place)
        return failed


def planes_to_patches(
    planes: Tensor,
    layout: Sequence[Sequence[Plane]],
    plans: Sequence[JpegPlan],
    images: ImageConfig,
    order: PatchOrder,
    out: Tensor,
) -> None:
    """Launch the three kernels on the current stream: upright RGB, then two resize passes.

    Shapes: planes uint8, laid out by `lay_out`; out uint8 [T, P].
    """
    from packvit.gpu.kernels import TILE, pass_kernel, upright_kernel

    upright, first, second, table = _facts(layout, plans, images)
    sizes = (upright, first, second)
    rows = [np.array(part, np.int64) for part in sizes]
    flat = [row.ravel().view(np.int32) for row in rows]
    # About a megabyte: pinning it would take longer than copying.
    sent = torch.from_numpy(np.concatenate([*flat, table])).to(planes.device)
    facts = sent[: sum(map(len, flat))].view(torch.int64)
    facts = facts.split([row.size for row in rows])
    weights = sent[sum(map(len, flat)) :]

    def grid(part: np.ndarray) -> tuple[int, int]:
        return -(-int((part[:, 0] * part[:, 1]).max()) // TILE), len(part)

    rgb = planes.new_empty(sum(3 * row.height * row.width for row in upright))
    half = planes.new_empty(sum(3 * row.height * row.width for row in first))
    launch = upright_kernel[grid(rows[0])]  # pyright: ignore[reportIndexIssue] # Triton's launch
    launch(facts[0], planes, rgb, fields=len(Upright._fields), tile=TILE)
    width = len(Pass._fields)
    launch = pass_kernel[grid(rows[1])]  # pyright: ignore[reportIndexIssue]
    launch(facts[1], weights, rgb, half, fields=width, tile=TILE, side=0, whole=False)
    launch = pass_kernel[grid(rows[2])]  # pyright: ignore[reportIndexIssue]
    whole = order == "chw"
    side = images.patch
    launch(facts[2], weights, half, out, fields=width, tile=TILE, side=side, whole=whole)


def lay_out(plans: Sequence[JpegPlan]) -> tuple[list[list[Plane]], int]:
    """Return the offset and pitch of each image's planes, and the bytes of all."""
    place = 0
    layout = []
    for plan in plans:
        sizes = [(plan.jpeg.height, plan.jpeg.width)]
        sizes += [plan.jpeg.chroma] * (0 if plan.jpeg.sampling is None else 2)
        ours: list[Plane] = []
        for height, width in sizes:
            pitch = -(-width // ALIGNMENT) * ALIGNMENT
            ours.append((place, pitch))
            place += height * pitch
        layout.append(ours)
    return layout, place


def _facts(
    layout: Sequence[Sequence[Plane]], plans: Sequence[JpegPlan], images: ImageConfig
) -> tuple[list[Upright], list[Pass], list[Pass], np.ndarray]:
    """Return the kernels' arguments for each image, and the table of resize windows."""
    upright: list[Upright] = []
    passes: tuple[list[Pass], list[Pass]] = [], []
    table: list[np.ndarray] = []
    known: dict[tuple[int, int, int, int], tuple[int, int, int]] = {}
    length = rgb = half = out = 0

    def place(before: int, after: int, skipped: int, kept: int) -> tuple[int, int, int]:
        """Return the offsets of starts and weights in the table, and the taps of a window."""
        nonlocal length
        key = (before, after, skipped, kept)
        if key not in known:
            found = windows(before, after, images.resample)
            starts = found.starts[skipped : skipped + kept]
            weights = found.weights[skipped : skipped + kept]
            table.extend((starts, weights.ravel()))
            known[key] = length, length + kept, weights.shape[1]
            length += kept + weights.size
        return known[key]

    for plan, planes in zip(plans, layout, strict=True):
        jpeg, size = plan.jpeg, plan.size
        upright.append(_upright(plan, planes, rgb))
        height, width = jpeg.upright
        top, left = size.crop[:2] if size.crop else (0, 0)
        rows, columns = size.rows * images.patch, size.columns * images.patch
        down = place(height, size.height, top, rows)
        across = place(width, size.width, left, columns)
        kept = (rows, columns)
        if rows_first((height, width), (size.height, size.width)):
            between = (height, columns)
            order = ((True, across), (False, down))
        else:
            between = (rows, width)
            order = ((False, down), (True, across))
        before, source = (height, width), rgb
        for number, (is_across, (starts, weights, taps)) in enumerate(order):
            after, to = ((between, half), (kept, out))[number]
            step, other = (1, before[1]) if is_across else (before[1], 1)
            last = before[is_across] - 1
            passes[number].append(
                Pass(
                    *after,
                    step=step,
                    other=other,
                    last=last,
                    plane=before[0] * before[1],
                    across=is_across,
                    taps=taps,
                    starts=starts,
                    weights=weights,
                    source=source,
                    out=to,
                )
            )
            before, source = after, to
        rgb += 3 * height * width
        half += 3 * between[0] * between[1]
        out += 3 * rows * columns
    return upright, *passes, np.concatenate(table)


def _upright(plan: JpegPlan, planes: Sequence[Plane], out: int) -> Upright:
    jpeg = plan.jpeg
    across, down = jpeg.sampling or (0, 0)
    (luma, luma_pitch), blue, red = (*planes, (0, 0), (0, 0))[:3]
    return Upright(
        jpeg.height,
        jpeg.width,
        swapped=jpeg.turn in TRANSPOSED,
        flipped_rows=jpeg.turn in FLIPPED_ROWS,
        flipped_columns=jpeg.turn in FLIPPED_COLUMNS,
        luma=luma,
        blue=blue[0],
        red=red[0],
        luma_pitch=luma_pitch,
        chroma_pitch=blue[1],
        across=across,
        down=down,
        chroma_columns=jpeg.chroma[1],
        chroma_rows=jpeg.chroma[0],
        out=out,
    )


def groups(
    plans: Sequence[JpegPlan], pixels_at_once: int = PIXELS_AT_ONCE
) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of groups of images of at most `pixels_at_once`, or of one image."""
    first = pixels = 0
    for place, plan in enumerate(plans):
        mine = plan.jpeg.height * plan.jpeg.width
        if place > first and pixels + mine > pixels_at_once:
            yield first, place
            first, pixels = place, 0
        pixels += mine
    if first < len(plans):
        yield first, len(plans)


def begin_engine(device: torch.device) -> Future[NvJpeg]:
    """Start a GPU's JPEG engine in a thread, which takes 0.6 s: for a decoder made later."""

    def start() -> NvJpeg:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # CUDA itself starts here
            return NvJpeg()

    pool = ThreadPoolExecutor(1, "packvit-jpeg")
    started = pool.submit(start)
    pool.shutdown(wait=False)
    return started


def _engine(device: torch.device, started: Future[NvJpeg] | None) -> NvJpeg:
    try:
        return started.result() if started else NvJpeg()
    except NvJpegError as error:
        raise RuntimeError(
            f"nvJPEG cannot use a JPEG engine on {torch.cuda.get_device_name(device)} ({error}), "
            "and only the engine gives Pillow's pixels. A100, H100, H200 and newer data centre "
            'GPUs have one; on others, use `decode="pil"`.'
        ) from error


def check_decoder(device: torch.device) -> None:
    """Check what a decoder needs, short of starting the GPU's engine.

    Raises: as `JpegDecoder`, apart from a device without an engine.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"Decoding on the GPU needs a CUDA device, but the encoder is on {device}. Use "
            '`device="cuda"`, or `decode="pil"`.'
        )
    if find_spec("triton") is None:
        raise ImportError(
            "Triton, which resizes on the GPU, was not found; it comes with torch for CUDA. "
            "Install: pip install triton"
        )
    check_pillow()
    load_library()


def check_pillow() -> None:
    """Check that the installed Pillow resizes as our kernels do.

    Pillow changed the order of its passes in 13.0, and may change it again.

    Raises: RuntimeError if they differ.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    for height, width in ((30, 20), (12, 50), (60, 9), (100, 30)):
        ours = resize(pixels, SizePlan(height, width, None, 1, 1), "bicubic")
        theirs = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        if not np.array_equal(ours, np.asarray(theirs)):
            raise RuntimeError(
                "Decoding on the GPU gives the same pixels as Pillow 13.0, but the installed "
                "Pillow resizes in another way. Install: pip install 'packvit[gpu-decode]', or "
                'use `decode="pil"`.'
            )
