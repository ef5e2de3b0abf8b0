"""Training over several processes by torch's FSDP2, and its state on disk.

Each works in a single process too, without a process group, so a recipe is written once.
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
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from packvit.atomic import rename_flushed
from packvit.checkpoints import saving
from packvit.encoder import Encoder
from packvit.model.layers import Block


def start() -> torch.device:
    """Join the other processes, if torchrun started this one, and return its device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def own(shares: int) -> range:
    """Return which of a step's shares this process forwards.

    Raises: ValueError where processes would have unequally many.
    """
    if shares % count_processes():
        raise ValueError(
            f"shares is {shares}, but must be a multiple of the {count_processes()} processes."
        )
    return range(dist.get_rank() if dist.is_initialized() else 0, shares, count_processes())


def count_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(module: nn.Module, *, compute: torch.dtype | None = None) -> None:
    """Share a module's parameters out over all processes, block by block, in place.

    `module` is an encoder, or holds some. `compute` is the dtype of forward and backward, where the
    parameters, and so the optimizer, stay in their own: fp32 master weights under bf16. Adapters,
    freezing and checkpointed activations come before.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in module.modules():
        if isinstance(part, Encoder):
            part.graphs = None  # processes record at different times, and would wait for each other
        if isinstance(part, Block):
            fully_shard(part, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    if isinstance(module, Encoder):
        register_fsdp_forward_method(module, "encode")


def backward(loss: Tensor, tokens: int) -> None:
    """Add the gradient of a sum over tokens, divided by the `tokens` of all processes and packs.

    FSDP averages over processes, which is undone here: packs of unequal size, on one process or on
    many, weigh by their tokens.
    """
    (loss * (count_processes() / tokens)).backward()


def add_up(value: Tensor) -> float:
    """Return a number of each process summed over all."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state after `step` steps, by all processes, and only then forget the one before.

    A name is given once all is written, so whatever is cut short is no checkpoint.
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
    """Fill in the latest state in `folder` and return its step, or 0 where there is none.

    It may come from another number of processes.
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
    """Return the whole states in `folder`, oldest first."""
    return sorted(folder.glob("step-????????"))


def export(encoder: Encoder, folder: str | os.PathLike[str]) -> None:
    """Write a sharded encoder as the checkpoint that `packvit.load` reads, from the first process.

    Every process calls it, since each holds a part.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(encoder, options=options)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if is_first():
        saving.write(
            folder,
            encoder.family,
            "transformers",
            encoder.config,
            tensors,
            encoder.carried,
            patch_order=encoder.patch_order,
            preprocessor=encoder.checkpoint.preprocessor if encoder.checkpoint else None,
        )
    wait()


def leave() -> None:
    """End a process that trains with others, once all of them are here; alone, do nothing.

    It ends without tearing anything down: threads of torch's that are still at work then abort a
    process now and then (seen with gloo and FSDP2 in torch 2.13), and torchrun calls all failed.
    """
    if dist.is_initialized():
        wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def quiet_alone() -> Iterator[None]:
    """Keep torch from warning that there is a single process, where that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def is_first() -> bool:
    """Return whether this process writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()
