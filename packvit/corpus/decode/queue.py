"""A queue of prepared images, in input order, filled ahead by worker processes. No torch.

Each worker process has a thread here that sends it inputs, one or a few per task. Workers run ahead
of the consumer until enough images wait, and the pixels in memory stay within a budget.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Condition, Lock, Thread

from packvit.corpus.decode.prepare import Prepared, Preprocessing
from packvit.corpus.decode.processes import Worker, Workers
from packvit.corpus.inputs.sources import Input

PIXELS_IN_FLIGHT = 256_000_000  # 16 workers at photographs of 16 MP; some 2 GB while they decode
IMAGE_TIMEOUT = 60.0  # seconds
MOST_WAITING = 1024  # images, however small
TOGETHER = 16  # JPEGs for the GPU in a task: reading one is as quick as a message about it


class Stopped(Exception):
    """The consumer has stopped; no image is needed any more."""


class Decoders:
    """The decode workers of a job, and the time they were busy."""

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
        self.device_seconds = 0.0  # seconds, of the GPU decoder
        self.on_gpu = 0  # images that it decoded

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *reason: object) -> None:
        self.workers.end()

    @property
    def spent(self) -> float:
        """Seconds that decoding took: the mean of the workers, or the GPU's if that is longer."""
        return max(self.busy / self.count, self.device_seconds)

    def start(self, images: int) -> None:
        """Start the workers for `images` images without waiting for them.

        They start up while the caller does other work, such as loading the model.
        """
        self.workers.start(min(self.count, images))

    def prepare_all(
        self, inputs: Iterable[Input], preprocessing: Preprocessing, ahead: int
    ) -> Generator[Prepared, None, None]:
        """Yield all inputs prepared, in order; up to `ahead` pixels of patches may wait.

        Raises: DecoderError if workers cannot run; whatever `inputs` raises.
        """
        with self.queue(inputs, preprocessing, ahead) as queue:
            yield from queue.take()

    @contextmanager
    def queue(
        self, inputs: Iterable[Input], preprocessing: Preprocessing, ahead: int
    ) -> Iterator["DecodeQueue"]:
        """Prepare inputs in threads while the context lasts, as `prepare_all` does."""
        queue = DecodeQueue(self, inputs, preprocessing, ahead)
        threads = [
            Thread(target=queue.work, name=f"packvit-decode-{number}", daemon=True)
            for number in range(self.count)
        ]
        try:
            for thread in threads:
                thread.start()
            yield queue
        finally:
            if not queue.all_taken:
                queue.stop()
                self.workers.stop_busy()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()

    def prepare(self, source: Input, preprocessing: Preprocessing) -> Prepared:
        """Prepare one input, apart from the queue.

        Raises: DecoderError if no worker can run.
        """
        worker = self.workers.borrow_ready(lambda: None)
        try:
            return worker.prepare([source], preprocessing, lambda pixels: None, self.seconds)[0][0]
        except BaseException:
            worker.end()
            raise
        finally:
            self.workers.give_back(worker)


class DecodeQueue:
    """Prepared images in input order, between the workers and the consumer.

    Three counts of pixels share the budget: `pixels` of images that are being decoded, by their
    headers; `waiting` of patches that were not taken yet; and `held` of JPEGs that were taken and
    are not decoded on the GPU yet, at three bytes a pixel. Two things may exceed the budget: a
    single image while no other is decoded, so that the queue always advances, and JPEGs that are
    being read, up to one task for each worker.
    """

    def __init__(
        self, decoders: Decoders, inputs: Iterable[Input], preprocessing: Preprocessing, ahead: int
    ) -> None:
        self.decoders = decoders
        self.inputs = iter(inputs)
        self.preprocessing = preprocessing
        self.ahead = min(ahead, decoders.pixels)
        self.most = (
            TOGETHER if preprocessing.decode == "gpu" else 1
        )  # inputs that are started, or taken, at once
        self.lock = Lock()
        self.room = Condition(self.lock)  # for another image
        self.admitted = Condition(self.lock)  # for an image to be decoded, or the rest of a task
        self.ready = Condition(self.lock)  # the image that is wanted next
        self.done: dict[int, Prepared] = {}
        self.wanted = 0  # the index of the next image to be taken
        self.begun = 0  # how many inputs were sent to workers
        self.all_begun = self.all_taken = False
        self.decoding = self.pixels = self.waiting = self.held = 0
        self.finished = self.finished_pixels = 0  # images, and what they took of the budget
        self.stopping = False
        self.failure: BaseException | None = None

    def take(self) -> Iterator[Prepared]:
        """Yield the images in order as they are finished."""
        while True:
            with self.lock:
                while self.wanted not in self.done:
                    if self.failure:
                        raise self.failure
                    if self.all_begun and self.wanted == self.begun:
                        self.all_taken = True
                        return
                    self.ready.wait()
                taken: list[Prepared] = []
                while self.wanted in self.done and len(taken) < self.most:
                    taken.append(self.done.pop(self.wanted))
                    self.wanted += 1
                self.waiting -= sum(map(size, taken))
                self.held += sum(size(prepared) for prepared in taken if prepared.jpeg)
                self.room.notify()  # only one: waking all for each image costs more
                self.admitted.notify_all()
            yield from taken

    def release(self, images: Sequence[Prepared]) -> None:
        """Free the budget of taken JPEGs once they are decoded."""
        with self.lock:
            self.held -= sum(size(image) for image in images if image.jpeg)
            self.room.notify_all()
            self.admitted.notify_all()

    def stop(self) -> None:
        """Make all threads return."""
        with self.lock:
            self.stopping = True
            self.room.notify_all()
            self.admitted.notify_all()

    def work(self) -> None:
        """Send inputs to a worker; the body of a thread."""
        workers, worker = self.decoders.workers, None
        try:
            while begun := self.begin():
                number, sources = begun
                many = len(sources)
                while sources:
                    if worker and not worker.alive:  # it died while idle: no image is lost
                        workers.give_back(worker)
                        worker = None
                    worker = worker or workers.borrow_ready(self.check_wanted)
                    prepared, seconds = self.prepare(worker, sources[:many])
                    self.finish(number, prepared, seconds)
                    number, sources = number + len(prepared), sources[len(prepared) :]
                    if not worker.alive:
                        workers.give_back(worker)
                        worker, many = (
                            None,
                            1,
                        )  # one at a time from here, so that only the bad input is lost
                    if sources:
                        self.await_room(number)
        except BaseException as error:  # raised in `take`
            if worker:
                worker.end()
            with self.lock:
                self.failure = self.failure or error
                self.ready.notify_all()
        finally:
            if worker:
                workers.give_back(worker)

    def prepare(self, worker: Worker, sources: Sequence[Input]) -> tuple[list[Prepared], float]:
        """Return the first inputs prepared, and the seconds a worker was busy with them."""
        admitted = 0

        def admit(pixels: int) -> None:
            nonlocal admitted
            self.admit(pixels)
            admitted = pixels

        try:
            return worker.prepare(sources, self.preprocessing, admit, self.decoders.seconds)
        finally:
            if admitted:
                self.release_pixels(admitted)

    def begin(self) -> tuple[int, list[Input]] | None:
        """Wait for room; return the index of the next inputs and the inputs, None at the end."""
        with self.lock:
            while not (self.all_begun or self.has_room()):
                self.check_wanted()
                self.room.wait()
            self.check_wanted()
            begun = list(islice(self.inputs, self.together()))
            if not begun:
                self.all_begun = True
                self.ready.notify_all()
                self.room.notify_all()
                return None
            first, self.begun = self.begun, self.begun + len(begun)
            return first, begun

    def await_room(self, number: int) -> None:
        """Wait for room for a started input, unless the consumer waits for that very one."""
        with self.lock:
            while not (self.wanted == number or self.has_room()):
                self.check_wanted()
                self.admitted.wait()
            self.check_wanted()

    def has_room(self) -> bool:
        """Return whether another image may be started."""
        if self.waiting >= self.ahead or len(self.done) >= MOST_WAITING:
            return False
        alone = self.begun == self.wanted  # nothing waits or is in work
        return alone or self.waiting + self.held < self.decoders.pixels

    def together(self) -> int:
        """Return how many inputs to put in a task, by the mean size of finished images.

        One task of each thread must fit in half of what may wait. Otherwise images after the wanted
        one fill the queue, and the thread with the wanted one works alone.
        """
        if not self.finished_pixels:
            return 1
        room = min(self.ahead, self.decoders.pixels - self.waiting - self.held)
        each = 2 * self.decoders.count * self.finished_pixels
        return max(1, min(self.most, room * self.finished // each))

    def admit(self, pixels: int) -> None:
        """Wait until this many pixels may be decoded."""
        with self.lock:
            while self.decoding and self.taken_up + pixels > self.decoders.pixels:
                self.check_wanted()
                self.admitted.wait()
            self.check_wanted()
            self.decoding += 1
            self.pixels += pixels

    @property
    def taken_up(self) -> int:
        """The pixels of the budget that are in memory."""
        return self.pixels + self.waiting + self.held

    def release_pixels(self, pixels: int) -> None:
        """Free the budget of pixels that are decoded, or failed to be."""
        with self.lock:
            self.decoding -= 1
            self.pixels -= pixels
            self.admitted.notify_all()

    def finish(self, number: int, prepared: Sequence[Prepared], seconds: float) -> None:
        """Store finished images; `number` is the index of the first."""
        with self.lock:
            self.done.update(enumerate(prepared, number))
            taken_up = sum(map(size, prepared))
            self.waiting += taken_up
            self.finished += len(prepared)
            self.finished_pixels += taken_up
            self.decoders.busy += seconds
            if number <= self.wanted < number + len(prepared):
                self.ready.notify_all()

    def check_wanted(self) -> None:
        """Raise Stopped if the consumer has stopped."""
        if self.stopping or self.failure:
            raise Stopped


def size(prepared: Prepared) -> int:
    """Return the pixels of an image's patches, or the pixels of equal memory for its JPEG."""
    if prepared.jpeg:
        return len(prepared.jpeg.data) // 3
    return 0 if prepared.patches is None else prepared.patches.nbytes // 3
