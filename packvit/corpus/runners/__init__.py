"""Where shards are embedded: in this process, in one for each GPU, or on a Ray cluster.

Whatever runs them, parts are entered in the log by the one process that holds the folder, and in
their order: so a line is appended to the log, and it never has holes.
"""

from functools import partial

import torch

from packvit.corpus import WrongUse
from packvit.corpus.encode.context import Tools
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.here import run_here
from packvit.corpus.runners.host import run_processes
from packvit.corpus.runners.order import Runner


def choose_runner(tools: Tools, job: Job, processes: int | None, ray: str | None) -> Runner:
    """Return what runs a job's shards: on the cluster `ray` where it is given, else on this host.

    Raises: WrongUse if there are fewer GPUs than processes; ImportError if Ray is not installed.
    """
    if ray is not None:
        from packvit.corpus.runners.cluster import check_ray, run_ray

        check_ray()
        return partial(run_ray, job, ray, processes)
    if processes is None or processes == 1:
        return partial(run_here, tools)
    device = tools.encoder.device
    if device.type != "cuda":
        return partial(run_processes, job, [str(device)] * processes)
    if device.index not in (None, 0) or processes > torch.cuda.device_count():
        raise WrongUse(
            f"{processes} processes need a GPU each, the first {processes} of this host, which has "
            f"{torch.cuda.device_count()}; device is {device}. Ask for fewer, or choose "
            'GPUs by CUDA_VISIBLE_DEVICES and give device "cuda".'
        )
    return partial(run_processes, job, [f"cuda:{index}" for index in range(processes)])
