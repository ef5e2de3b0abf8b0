"""Run shards on a Ray cluster: Ray Data schedules them on actors, one per GPU, and retries.

The job's folder, unless it is in an object store, its photographs and a model's folder must be on a
file system that all nodes share under the same paths. Shards are spooled next to the parts, so that
Ray only moves their numbers.

Actors that die, with their node or alone, are replaced as soon as there is room for them, and their
shards are sent again. Ray's autoscaler is asked for nodes for all actors that a job asks for.
"""

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace

from packvit.corpus import EmbedderError, UsageError
from packvit.corpus.folder.layout import Commit, building
from packvit.corpus.folder.ownership import remove_left_over
from packvit.corpus.folder.stores import find_folder
from packvit.corpus.runners.actor import IN_HAND, ShardActor, spool_path
from packvit.corpus.runners.embedder import Finished, Job
from packvit.corpus.runners.order import Sequencer, Work, enter_all

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
    devices = gpus or cpus
    actors = min(actors or devices, len(numbers))
    # Ray does not count these. Actors that nodes are still to come for have their nodes' CPUs.
    workers = min(job.options.workers, max(1, cpus // min(actors, devices)))
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
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_HAND),
        max_concurrency=IN_HAND,
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
