"""Inputs to prepared images, in their order, by worker processes that run ahead. No torch.

Each worker process has a thread here that hands it inputs, one or a few to a task. They run ahead
of whoever takes the images until enough wait, and hold the pixels in memory to a budget.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Condition, Lock, Thread

from packvit.corpus.decode.prepare import Prepared, Preprocessing
from packvit.corpus.decode.processes import Worker, Workers
from packvit.corpus.inputs.find import Input

PIXELS_IN_FLIGHT = 256_000_000  # 16 workers at photographs of 16 MP; some 2 GB while they decode
IMAGE_TIMEOUT = 60.0  # seconds
MOST_WAITING = 1024  # images, however small
TOGETHER = 16  # JPEGs for the device in a task: reading one takes little longer than to speak of it


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
        self.device_seconds = 0.0  # seconds, of the device's decoder
        self.on_gpu = 0  # images that it decoded

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *reason: object) -> None:
        self.workers.end()

    @property
    def spent(self) -> float:
        """Seconds that decoding took: the workers' mean, or the device's if they are more."""
        return max(self.busy / self.count, self.device_seconds)

    def start(self, images: int) -> None:
        """Start the workers that so many images will need, and wait for none of them.

        What else there is to do until the first image is asked for hides the time they take.
        """
        self.workers.start(min(self.count, images))

    def prepare_all(
        self, inputs: Iterable[Input], preprocessing: Preprocessing, ahead: int
    ) -> Generator[Prepared, None, None]:
        """Yield all inputs prepared, in their order; `ahead` pixels of patches may wait.

        Raises: DecoderError if workers cannot work; whatever `inputs` raises.
        """
        with self.queue(inputs, preprocessing, ahead) as queue:
            yield from queue.take()

    @contextmanager
    def queue(
        self, inputs: Iterable[Input], preprocessing: Preprocessing, ahead: int
    ) -> Iterator["DecodeQueue"]:
        """Have inputs prepared for whoever takes them from the queue, as `prepare_all` says."""
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
        """Prepare one input, whatever else is prepared meanwhile.

        Raises: DecoderError if no worker can work.
        """
        worker = self.workers.borrow()
        try:
            return worker.prepare([source], preprocessing, lambda pixels: None, self.seconds)[0][0]
        except BaseException:
            worker.end()
            raise
        finally:
            self.workers.give_back(worker)


class DecodeQueue:
    """The images between the inputs and whoever takes them, in their order.

    `pixels` counts those of headers while their images are decoded, `waiting` those of the patches
    that nobody has taken yet, and `held` JPEGs that were taken and are still to be decoded on the
    device, three bytes a pixel. Together they stay within the budget, but that an image which is
    prepared by itself may exceed it, so that the next image always comes, however little room there
    is; and that JPEGs which are being read are not known yet: a task's for each worker.
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
        )  # inputs that are begun, or taken, at once
        self.lock = Lock()
        self.room = Condition(self.lock)  # for another image to wait
        self.admitted = Condition(self.lock)  # for an image to be decoded, or the rest of a task
        self.ready = Condition(self.lock)  # the image that is wanted next
        self.done: dict[int, Prepared] = {}
        self.wanted = 0  # the number of the image to be taken next
        self.begun = 0  # how many inputs were handed out
        self.all_begun = self.all_taken = False
        self.decoding = self.pixels = self.waiting = self.held = 0
        self.finished = self.finished_pixels = 0  # images, and what they took of the budget
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
                        self.all_taken = True
                        return
                    self.ready.wait()
                taken: list[Prepared] = []
                while self.wanted in self.done and len(taken) < self.most:
                    taken.append(self.done.pop(self.wanted))
                    self.wanted += 1
                self.waiting -= sum(map(size, taken))
                self.held += sum(size(prepared) for prepared in taken if prepared.jpeg)
                self.room.notify()  # one: to wake all of them for each image would cost more
                self.admitted.notify_all()
            yield from taken

    def release(self, images: Sequence[Prepared]) -> None:
        """Take note that images which were taken are decoded, if they were not before."""
        with self.lock:
            self.held -= sum(size(image) for image in images if image.jpeg)
            self.room.notify_all()
            self.admitted.notify_all()

    def stop(self) -> None:
        """Have all threads return."""
        with self.lock:
            self.stopping = True
            self.room.notify_all()
            self.admitted.notify_all()

    def work(self) -> None:
        """Hand inputs to a worker; the body of a thread."""
        workers, worker = self.decoders.workers, None
        try:
            while begun := self.begin():
                number, sources = begun
                many = len(sources)
                while sources:
                    worker = worker or workers.borrow()
                    prepared, seconds = self.prepare(worker, sources[:many])
                    self.finish(number, prepared, seconds)
                    number, sources = number + len(prepared), sources[len(prepared) :]
                    if not worker.alive:
                        workers.give_back(worker)
                        worker, many = None, 1  # whichever it was, it costs no other image
                    if sources:
                        self.await_room(number)
        except BaseException as error:  # given to whoever takes the images
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
        """Return the next inputs and the first one's number once there is room, None at the end."""
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
        """Return once there is room for an input that was begun, or nothing else can come."""
        with self.lock:
            while not (self.wanted == number or self.has_room()):
                self.check_wanted()
                self.admitted.wait()
            self.check_wanted()

    def has_room(self) -> bool:
        """Tell whether another image may be begun."""
        if self.waiting >= self.ahead or len(self.done) >= MOST_WAITING:
            return False
        alone = self.begun == self.wanted  # nothing waits or is under way
        return alone or self.waiting + self.held < self.decoders.pixels

    def together(self) -> int:
        """Return how many inputs to put in a task, judged by those that are finished.

        Half of what may wait must have room for a task of each thread: otherwise it fills up with
        images behind the wanted one, and whoever has that is left to work alone.
        """
        if not self.finished_pixels:
            return 1
        room = min(self.ahead, self.decoders.pixels - self.waiting - self.held)
        each = 2 * self.decoders.count * self.finished_pixels
        return max(1, min(self.most, room * self.finished // each))

    def admit(self, pixels: int) -> None:
        """Return once so many pixels may be decoded."""
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
        """Take note that so many pixels are decoded, or never will be."""
        with self.lock:
            self.decoding -= 1
            self.pixels -= pixels
            self.admitted.notify_all()

    def finish(self, number: int, prepared: Sequence[Prepared], seconds: float) -> None:
        """Put images where they wait to be taken, `number` being the first one's."""
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
        """Raise Stopped if nobody takes images any more."""
        if self.stopping or self.failure:
            raise Stopped


def size(prepared: Prepared) -> int:
    """Return the pixels of an image's patches, or as many as its JPEG takes the memory of."""
    if prepared.jpeg:
        return len(prepared.jpeg.data) // 3
    return 0 if prepared.patches is None else prepared.patches.nbytes // 3
