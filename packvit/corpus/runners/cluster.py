"""Run shards on a Ray cluster: Ray Data schedules them on actors, one per GPU, and retries.

The job's folder, its photographs and a model's folder must be on a file system that all nodes share
under the same paths. Shards are spooled next to the parts, so that Ray only moves their numbers.
"""

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from packvit.atomic import temporary_name
from packvit.corpus import EmbedderError, UsageError
from packvit.corpus.encode.context import EmbedContext, make_context
from packvit.corpus.encode.shard import embed_shards
from packvit.corpus.folder.layout import Commit, building
from packvit.corpus.folder.names import SPOOL, part_name
from packvit.corpus.folder.ownership import remove_left_over
from packvit.corpus.folder.stores import Folder, find_folder
from packvit.corpus.runners.embedder import Finished, Job, Stager, load_alike, portable
from packvit.corpus.runners.order import TRIES, Sequencer, Work, enter_all
from packvit.gpu.nvjpeg import ask_for_queues

# Ray schedules and tracks blocks. Up to this many shards each is one block; beyond, blocks hold
# several shards, and a lost actor repeats all shards of its block.
MOST_BLOCKS = 20_000


def check_ray() -> None:
    """Import Ray Data.

    Raises: ImportError with the line that installs it.
    """
    try:
        import ray.data  # noqa: F401  only checks that it is installed
    except ImportError as error:
        raise ImportError(f'Ray is needed: pip install "packvit[ray]". ({error})') from error


def run_ray(
    job: Job, address: str, actors: int | None, work: Work
) -> Generator[Commit, None, None]:
    """Embed shards on the actors of a Ray cluster, and commit them here, in order.

    `actors` None is one for each GPU of the cluster, or for each CPU if it has no GPU.

    Raises: EmbedderError if a shard loses its actor `TRIES` times; UsageError if there is no
    cluster at `address`; WriteError if a part cannot be written.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        connect(address)
    try:
        yield from enter_all(run_shards(job, actors, work), work)
    finally:
        if ours:
            ray.shutdown()
        remove_left_over(work.folder)


def connect(address: str) -> None:
    """Join the cluster at `address`, or start one on this machine.

    Raises: UsageError if there is none.
    """
    import ray

    if address not in ("auto", "local"):
        check_listens(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # packvit sends no usage statistics
    heeded = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise no_cluster(address, str(error).partition("\n")[0]) from error
    finally:
        # Ray's own handler would exit at once, without a message. None is one that Python did not
        # install, and cannot put back.
        if heeded is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heeded)


def check_listens(address: str) -> None:
    """Refuse an address where nothing listens: Ray would retry for minutes.

    Raises: UsageError.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except ValueError as error:
        raise no_cluster(address, "it is not of the form host:port") from error
    except OSError as error:
        raise no_cluster(address, error.strerror or str(error)) from error


def no_cluster(address: str, reason: str) -> UsageError:
    """Return the error for a cluster that cannot be reached."""
    return UsageError(
        f'There is no Ray cluster at "{address}": {reason.rstrip(".")}. Start one with `ray start '
        '--head`, or give "local" to start one for this job.'
    )


def run_shards(job: Job, actors: int | None, work: Work) -> Iterator[Finished]:
    """Yield all shards in order, each when its part is staged."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    numbers, places = spool(work)
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    actors = min(actors or gpus or cpus, len(numbers))
    workers = min(job.options.workers, max(1, cpus // actors))  # Ray does not count these
    job = replace(
        job,
        folder=str(find_folder(job.folder).absolute()),
        options=replace(job.options, workers=workers),
        embedders=actors,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 0  # start with the actors that are ready
    context.actor_task_retry_on_errors = False  # a retry would raise the same error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # packvit reports the progress
    outcomes = ray.data.from_items(places, override_num_blocks=min(len(places), MOST_BLOCKS)).map(
        ShardActor,  # pyright: ignore[reportArgumentType]  its type allows only functions
        fn_constructor_args=(job, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    order = Sequencer()
    for number in numbers:
        order.expect(number)
    try:
        for row in outcomes.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, Exception):
                raise outcome
            order.add(outcome)
            yield from order.release()
    except RayError as error:
        raise EmbedderError(
            f"Ray stopped with {type(error).__name__}; see its logs. The same command "
            "resumes after what is written."
        ) from error


def spool(work: Work) -> tuple[list[int], list[dict[str, int]]]:
    """Write all shards to a temporary file; return their numbers and byte ranges.

    Raises: WriteError.
    """
    numbers, places = [], []
    path = spool_path(work.folder)
    with building(path) as local, local.open("wb") as file:
        for shard in work.shards:
            size = file.write(pickle.dumps(shard))
            places.append({"start": file.tell() - size, "bytes": size})
            numbers.append(shard.number)
    return numbers, places


def spool_path(folder: Folder) -> Folder:
    """Return the path of the file of spooled shards."""
    return folder / temporary_name(SPOOL)


class ShardActor:
    """Embeds one shard after another, on one GPU if the cluster has any.

    Ray sends a shard when the one before is staged, so no image is decoded ahead across shards.
    """

    def __init__(self, job: Job, working: str) -> None:
        import torch

        self.job = job
        self.stager = Stager(job)
        self.context: EmbedContext | None = None
        self.failure: Exception | None = None
        try:
            with shared(working):
                os.chdir(working)  # relative paths start there
            if job.options.decode == "gpu":
                ask_for_queues()  # processes of this host inherit what the job asked for
            device = "cuda" if torch.cuda.is_available() else "cpu"
            decoders = job.options.decoders()
            decoders.start(job.options.workers)  # while the model is loaded
            self.context = make_context(load_alike(job, device), job.options, decoders)
        except Exception as error:  # returned at the first call: Ray would wrap it in its own error
            self.failure = portable(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a shard, pickled: Finished, or the exception."""
        return {"outcome": pickle.dumps(self.embed(row["start"], row["bytes"]))}

    def embed(self, start: int, size: int) -> Finished | Exception:
        """Embed one shard and stage its part."""
        if self.context is None:
            assert self.failure
            return self.failure
        try:
            with shared(self.job.folder):
                with spool_path(find_folder(self.job.folder)).open("rb") as file:
                    file.seek(start)
                    shard = pickle.loads(file.read(size))
                attempt = begin_attempt(find_folder(self.job.folder), shard.number)
            (part,) = embed_shards(self.context, [shard], lambda rows: None, self.stager.effort)
            return self.stager.stage(part, attempt=attempt)
        except Exception as error:
            return portable(error)


@contextmanager
def shared(folder: str) -> Iterator[None]:
    """Turn an OSError about a folder that all nodes must share into a message for the user."""
    try:
        yield
    except OSError as error:
        raise EmbedderError(
            f"{folder} cannot be used on {socket.gethostname()}: {error.strerror}. All nodes of "
            "the cluster need the job's folder, its photographs and the working folder under the "
            "same paths: put them on a file system that they share."
        ) from error


def begin_attempt(folder: Folder, number: int) -> str:
    """Create the temporary file of an attempt at a part, and return the attempt's name.

    The files of attempts that died remain, which limits their number: Ray itself retries without
    end. An actor that Ray gave up may still be writing, so no two attempts share a file.

    Raises: EmbedderError if `TRIES` attempts were made; OSError.
    """
    for attempt in range(TRIES):
        name = f"{attempt:08x}"
        with suppress(FileExistsError):
            (folder / temporary_name(part_name(number), name)).touch(exist_ok=False)
            return name
    raise EmbedderError(
        f"The actors that embedded {part_name(number)} died {TRIES} times. If memory ran out, ask "
        "for a smaller token_budget; then the same command resumes after what is written."
    )
