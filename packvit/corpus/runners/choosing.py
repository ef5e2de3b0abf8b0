"""Where shards are embedded: in this process, in one for each GPU, or on a Ray cluster.

In all cases the process that holds the folder commits the parts, in order, so the log is only
appended to and has no gaps.
"""

from functools import partial

import torch

from packvit.corpus import UsageError
from packvit.corpus.encode.context import EmbedContext
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.here import run_here
from packvit.corpus.runners.host import Pool, run_processes
from packvit.corpus.runners.order import Runner


def choose_runner(
    context: EmbedContext | None,
    job: Job,
    pool: Pool | None,
    processes: int | None,
    ray: str | None,
) -> Runner:
    """Return the runner of a job: on the Ray cluster `ray` if given, else on this host.

    `context` is None where other processes embed.

    Raises: ImportError if Ray is not installed.
    """
    if ray is not None:
        from packvit.corpus.runners.cluster import check_ray, run_ray

        check_ray()
        return partial(run_ray, job, ray, processes)
    if pool is not None:
        return partial(run_processes, pool)
    assert context is not None
    return partial(run_here, context)


def choose_devices(device: torch.device, processes: int) -> list[str]:
    """Return the device of each process that embeds.

    Raises: UsageError if there are fewer GPUs than processes.
    """
    if device.type != "cuda":
        return [str(device)] * processes
    if device.index not in (None, 0) or processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes need a GPU each, the first {processes} of this host, which has "
            f"{torch.cuda.device_count()}; device is {device}. Ask for fewer, or choose "
            'GPUs by CUDA_VISIBLE_DEVICES and give `device="cuda"`.'
        )
    return [f"cuda:{index}" for index in range(processes)]
