"""Train in several processes with torch's FSDP2, and save the state.

All functions also work in a single process without a process group.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from packvit.atomic import rename_flushed
from packvit.encoder import Encoder
from packvit.model.layers import Block


def start() -> torch.device:
    """Join the process group if torchrun started this process; return its device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def own(shares: int) -> range:
    """Return the indices of a step's shares that this process runs.

    Raises: ValueError if processes would have different numbers of shares.
    """
    if shares % count_processes():
        raise ValueError(
            f"shares is {shares}, but must be a multiple of the {count_processes()} processes."
        )
    return range(dist.get_rank() if dist.is_initialized() else 0, shares, count_processes())


def count_processes() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(module: nn.Module, *, compute: torch.dtype | None = None) -> None:
    """Shard a module's parameters over all processes, block by block, in place.

    `module` is an encoder, or contains some. `compute` is the dtype of forward and backward; the
    parameters, and so the optimizer, keep theirs: fp32 master weights with bf16 compute. Add
    adapters, freeze, and checkpoint activations before.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in module.modules():
        if isinstance(part, Encoder) and part.fast is not None:
            part.fast.graphs = None  # processes would capture at different times and deadlock
        if isinstance(part, Block):
            fully_shard(part, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    if isinstance(module, Encoder):
        register_fsdp_forward_method(module, "encode")


def backward(loss: Tensor, tokens: int) -> None:
    """Run backward of a sum over tokens, divided by the `tokens` of all processes and packs.

    FSDP averages over processes, which is undone here, so that packs of different sizes weigh by
    their tokens.
    """
    (loss * (count_processes() / tokens)).backward()


def add_up(value: Tensor) -> float:
    """Return the sum of a number over all processes."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save the state after `step` steps from all processes, then remove the previous one.

    The folder is renamed when all is written, so an interrupted save leaves no checkpoint.
    """
    parameters, moments = get_state_dict(model, optimizer)
    partial, whole = folder / "partial", folder / f"step-{step:08d}"
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    with quiet_alone():
        write_state({"model": parameters, "optimizer": moments}, checkpoint_id=partial)
    wait()
    if is_first():
        before = saved(folder)
        shutil.rmtree(whole, ignore_errors=True)
        rename_flushed(partial, whole)
        for old in before:
            if old != whole:
                shutil.rmtree(old)
    wait()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest state in `folder` and return its step, or 0 if there is none.

    It may have been saved by another number of processes.
    """
    found = saved(folder)
    if not found:
        return 0
    parameters, moments = get_state_dict(model, optimizer)
    state = {"model": parameters, "optimizer": moments}
    with quiet_alone():
        read_state(state, checkpoint_id=found[-1])
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(found[-1].name.removeprefix("step-"))


def saved(folder: Path) -> list[Path]:
    """Return the saved states in `folder`, oldest first."""
    return sorted(folder.glob("step-????????"))


def export(encoder: Encoder, folder: str | os.PathLike[str]) -> None:
    """Save a sharded encoder as a checkpoint for `packvit.load`.

    Every process must call it; the first one writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(encoder, options=options)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if is_first():
        encoder.save_pretrained(folder, state_dict=tensors)
    wait()


def leave() -> None:
    """Wait for all processes, then exit this one; in a single process do nothing.

    It exits without cleanup: torch threads that still run sometimes abort the process during
    cleanup (seen with gloo and FSDP2 in torch 2.13), and torchrun then reports a failure.
    """
    if dist.is_initialized():
        wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def quiet_alone() -> Iterator[None]:
    """Silence torch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def is_first() -> bool:
    """Return whether this is the first process, which writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
