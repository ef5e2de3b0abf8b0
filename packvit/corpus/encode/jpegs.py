"""The JPEGs of a pack to patches on the device, while the pack before it is encoded.

Decode workers hand JPEGs that the device decodes over as they are; here they become patches, in one
call for all of a pack. What the device refuses goes through Pillow after all.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.context import Tools
from packvit.corpus.encode.filling import Pack
from packvit.corpus.encode.packs import OUT_OF_MEMORY, Fed, OnDevice

AHEAD = 1  # packs that are fed before the one ahead of them is encoded; Pillow's need no feeding


class Feeder:
    """A thread that turns the JPEGs of packs into patches on the device."""

    def __init__(self, tools: Tools) -> None:
        self.decode_jpegs = tools.decode_jpegs
        self.decoders = tools.decoders
        self.by_pillow = replace(tools.recipe, decode="pil")
        self.ahead = 0 if tools.decode_jpegs is None else AHEAD
        self.thread = ThreadPoolExecutor(1, "packvit-feed")
        self.stopping = False

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *reason: object) -> None:
        self.stopping = True
        self.thread.shutdown(cancel_futures=True)

    def feed_all(self, packs: Iterable[Pack]) -> Iterator[tuple[Pack, Sequence[Fed] | None]]:
        """Yield packs in their order, each with its images fed, and have the next fed meanwhile.

        Raises: DecoderError if no worker can work; whatever `packs` raises.
        """
        coming: deque[tuple[Pack, Future[Sequence[Fed] | None]]] = deque()
        for pack in packs:
            coming.append((pack, self.thread.submit(self.decode, pack.images)))
            if len(coming) > self.ahead:
                pack, future = coming.popleft()
                yield pack, future.result()
        for pack, future in coming:
            yield pack, future.result()

    def feed(self, images: Sequence[Prepared]) -> Sequence[Fed] | None:
        """Return images fed: a Feed."""
        return self.thread.submit(self.decode, images).result()

    def decode(self, images: Sequence[Prepared]) -> Sequence[Fed] | None:
        """Return images with the patches of JPEGs on the device, None if they do not fit there.

        What the device refuses is read again, by Pillow, which may make an error of it.
        """
        places = [place for place, image in enumerate(images) if image.jpeg]
        if not places:
            return images
        assert self.decode_jpegs
        files = [image.jpeg for image in images if image.jpeg]
        start = time.perf_counter()
        fed: list[Fed] = list(images)
        try:
            decoded = self.decode_jpegs([f.data for f in files], [f.plan for f in files])
        except OUT_OF_MEMORY:
            return None
        patches = decoded.patches.split([file.plan.patches for file in files])
        for place, ours in zip(places, patches, strict=True):
            fed[place] = OnDevice(images[place].row, ours)
        for number in decoded.failed:
            if self.stopping:  # nobody waits for them any more
                break
            fed[places[number]] = self.decoders.prepare(files[number].source, self.by_pillow)
        self.decoders.on_gpu += len(places) - len(decoded.failed)
        self.decoders.feeding += time.perf_counter() - start
        return fed
