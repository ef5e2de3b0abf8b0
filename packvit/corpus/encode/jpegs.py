"""Decode the JPEGs of a pack on the device while the pack before it is encoded.

Decode workers pass on the files that the device can decode; here they become patches, in one call
for the whole pack. Files that the device refuses are decoded by Pillow.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.context import EmbedContext
from packvit.corpus.encode.filling import PreparedPack
from packvit.corpus.encode.packs import OnDevice, Ready
from packvit.out_of_memory import suppressed

AHEAD = 1  # packs decoded ahead of the one that is encoded; none where Pillow decodes everything


class JpegStage:
    """A thread that decodes the JPEGs of packs on the device."""

    def __init__(self, context: EmbedContext) -> None:
        self.decode_jpegs = context.decode_jpegs
        self.decoders = context.decoders
        self.by_pillow = replace(context.preprocessing, decode="pil")
        self.ahead = 0 if context.decode_jpegs is None else AHEAD
        self.thread = ThreadPoolExecutor(1, "packvit-feed")
        self.stopping = False

    def __enter__(self) -> "JpegStage":
        return self

    def __exit__(self, *reason: object) -> None:
        self.stopping = True
        self.thread.shutdown(cancel_futures=True)

    def make_all_ready(
        self, packs: Iterable[PreparedPack]
    ) -> Iterator[tuple[PreparedPack, Sequence[Ready] | None]]:
        """Yield packs in order, each with its images ready; the next pack is decoded meanwhile.

        Raises: DecoderError if no worker can work; whatever `packs` raises.
        """
        coming: deque[tuple[PreparedPack, Future[Sequence[Ready] | None]]] = deque()
        for pack in packs:
            coming.append((pack, self.thread.submit(self.decode, pack.images)))
            if len(coming) > self.ahead:
                pack, future = coming.popleft()
                yield pack, future.result()
        for pack, future in coming:
            yield pack, future.result()

    def make_ready(self, images: Sequence[Prepared]) -> Sequence[Ready] | None:
        """Return a pack's images with their patches, as `decode` does, on the thread."""
        return self.thread.submit(self.decode, images).result()

    def decode(self, images: Sequence[Prepared]) -> Sequence[Ready] | None:
        """Return images with the patches of JPEGs on the device, or None if they do not fit there.

        Files that the device refuses are read again by Pillow, which may report an error.
        """
        places = [place for place, image in enumerate(images) if image.jpeg]
        if not places:
            return images
        assert self.decode_jpegs
        files = [image.jpeg for image in images if image.jpeg]
        start = time.perf_counter()
        ready: list[Ready] = list(images)
        decoded = None
        with suppressed():
            decoded = self.decode_jpegs([f.data for f in files], [f.plan for f in files])
        if decoded is None:
            return None
        patches = decoded.patches.split([file.plan.patches for file in files])
        for place, ours in zip(places, patches, strict=True):
            ready[place] = OnDevice(images[place].row, ours)
        for number in decoded.failed:
            if self.stopping:  # no one reads the result any more
                break
            ready[places[number]] = self.decoders.prepare(files[number].source, self.by_pillow)
        self.decoders.on_gpu += len(places) - len(decoded.failed)
        self.decoders.device_seconds += time.perf_counter() - start
        return ready
