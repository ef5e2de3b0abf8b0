"""Inputs to prepared images, in their order, by worker processes that run ahead. No torch.

Each worker process has a thread here that hands it one input after another. They run ahead of
whoever takes the images until enough wait, and hold the pixels that are in memory to a budget.
"""

from collections.abc import Generator, Iterable, Iterator
from threading import Condition, Lock, Thread

from packvit.corpus.inputs import Input
from packvit.corpus.preparing import Prepared, Recipe
from packvit.corpus.processes import Worker, Workers

PIXELS_IN_FLIGHT = 256_000_000  # 16 workers at photographs of 16 MP; some 2 GB while they decode
IMAGE_TIMEOUT = 60.0  # seconds
MOST_WAITING = 1024  # images, however small


class Stopped(Exception):
    """Nobody waits for the image any more."""


class Decoders:
    """Decode workers for as long as a job needs them, and what they have been busy for."""

    def __init__(
        self,
        workers: int,
        *,
        pixels_in_flight: int = PIXELS_IN_FLIGHT,
        image_timeout: float = IMAGE_TIMEOUT,
    ) -> None:
        self.count = workers
        self.pixels = pixels_in_flight
        self.seconds = image_timeout
        self.workers = Workers()
        self.busy = 0.0  # seconds, of all workers together

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *reason: object) -> None:
        self.workers.end()

    def start(self, images: int) -> None:
        """Start the workers that so many images will need, and wait for none of them.

        What else there is to do until the first image is asked for hides the time they take.
        """
        self.workers.start(min(self.count, images))

    def prepare_all(
        self, inputs: Iterable[Input], recipe: Recipe, ahead: int
    ) -> Generator[Prepared, None, None]:
        """Yield all inputs prepared, in their order; `ahead` pixels of patches may wait.

        Raises: DecoderError if workers cannot work; whatever `inputs` raises.
        """
        line = Line(self, inputs, recipe, ahead)
        threads = [
            Thread(target=line.work, name=f"packvit-decode-{number}", daemon=True)
            for number in range(self.count)
        ]
        taken = False
        try:
            for thread in threads:
                thread.start()
            yield from line.take()
            taken = True
        finally:
            if not taken:
                line.stop()
                self.workers.stop_busy()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


class Line:
    """The images between the inputs and whoever takes them, in their order.

    `pixels` counts those of headers while their images are decoded, `waiting` those of the patches
    that nobody has taken yet. Together they stay within the budget, but that an image which is
    decoded by itself may exceed it: so the next image always comes, however little room there is.
    """

    def __init__(
        self, decoders: Decoders, inputs: Iterable[Input], recipe: Recipe, ahead: int
    ) -> None:
        self.decoders = decoders
        self.inputs = enumerate(inputs)
        self.recipe = recipe
        self.ahead = min(ahead, decoders.pixels)
        self.lock = Lock()
        self.room = Condition(self.lock)  # for another image to wait
        self.admitted = Condition(self.lock)  # for an image to be decoded
        self.ready = Condition(self.lock)  # the image that is wanted next
        self.done: dict[int, Prepared] = {}
        self.wanted = 0  # the number of the image to be taken next
        self.begun = 0  # how many inputs were handed out
        self.all_begun = False
        self.decoding = self.pixels = self.waiting = 0
        self.stopping = False
        self.failure: BaseException | None = None

    def take(self) -> Iterator[Prepared]:
        """Yield the images in their order as they are done."""
        while True:
            with self.lock:
                while self.wanted not in self.done:
                    if self.failure:
                        raise self.failure
                    if self.all_begun and self.wanted == self.begun:
                        return
                    self.ready.wait()
                prepared = self.done.pop(self.wanted)
                self.wanted += 1
                self.waiting -= size(prepared)
                self.room.notify_all()
                self.admitted.notify_all()
            yield prepared

    def stop(self) -> None:
        """Have all threads return."""
        with self.lock:
            self.stopping = True
            self.room.notify_all()
            self.admitted.notify_all()

    def work(self) -> None:
        """Hand inputs to a worker one after another; the body of a thread."""
        workers, worker = self.decoders.workers, None
        try:
            while (begun := self.begin()) is not None:
                worker = worker or workers.borrow()
                self.finish(begun[0], *self.prepare(worker, begun[1]))
                if not worker.alive:
                    workers.give_back(worker)
                    worker = None
        except BaseException as error:  # given to whoever takes the images
            if worker:
                worker.end()
            with self.lock:
                self.failure = self.failure or error
                self.ready.notify_all()
        finally:
            if worker:
                workers.give_back(worker)

    def prepare(self, worker: Worker, source: Input) -> tuple[Prepared, float]:
        """Return an input prepared, and the seconds a worker was busy with it."""
        admitted = 0

        def admit(pixels: int) -> None:
            nonlocal admitted
            self.admit(pixels)
            admitted = pixels

        try:
            return worker.prepare(source, self.recipe, admit, self.decoders.seconds)
        finally:
            if admitted:
                self.release(admitted)

    def begin(self) -> tuple[int, Input] | None:
        """Return the next input and its number once there is room for it, or None at the end."""
        with self.lock:
            while self.waiting >= self.ahead or len(self.done) >= MOST_WAITING:
                self.check_wanted()
                self.room.wait()
            self.check_wanted()
            begun = next(self.inputs, None)
            if begun is None:
                self.all_begun = True
                self.ready.notify_all()
            else:
                self.begun += 1
            return begun

    def admit(self, pixels: int) -> None:
        """Return once so many pixels may be decoded."""
        with self.lock:
            while self.decoding and self.pixels + self.waiting + pixels > self.decoders.pixels:
                self.check_wanted()
                self.admitted.wait()
            self.check_wanted()
            self.decoding += 1
            self.pixels += pixels

    def release(self, pixels: int) -> None:
        """Take note that so many pixels are decoded, or never will be."""
        with self.lock:
            self.decoding -= 1
            self.pixels -= pixels
            self.admitted.notify_all()

    def finish(self, number: int, prepared: Prepared, seconds: float) -> None:
        """Put an image where it waits to be taken."""
        with self.lock:
            self.done[number] = prepared
            self.waiting += size(prepared)
            self.decoders.busy += seconds
            if number == self.wanted:
                self.ready.notify_all()

    def check_wanted(self) -> None:
        """Raise Stopped if nobody takes images any more."""
        if self.stopping or self.failure:
            raise Stopped


def size(prepared: Prepared) -> int:
    """Return the pixels of an image's patches."""
    return 0 if prepared.patches is None else prepared.patches.size // 3
