"""How much memory a forward takes at its peak, worked out from sizes alone; and how much is free.

Counted are the rows of the token stream, N, and what an eager forward without gradients holds for
each, in numbers of the encoder's dtype, at its three widest moments. What is compiled or captured
holds less.

- Embedding: patches in fp32 and in the dtype, 2 P; tokens, normed, positions twice, sum, 5 D.
- Attention: the residual, what the last block adds and their sum, 3 D; normed, D; q, k,
  v, 3 D; attended and projected, 2 D; the copies that `sdpa` makes of q, k, v and the result, 4 D;
  rotary turns of q and k, 4 D.
- MLP: the residual before and after attention, what both halves added, normed, 5 D; up and
  activated, 2 M, or if gated gate, up, act(gate) and the product, 4 M; the output, D, when one M is
  gone.

Each moment frees what it made, so the largest bounds them all. On top come the weights, the patches
that the caller holds, one D for each tap, lists on their way to a file in fp32, tables of learned
positions resized before, and the workspaces of the libraries.
"""

from typing import NamedTuple

import torch

from packvit.checkpoints.errors import CheckpointError
from packvit.config import AxialRotary, EncoderConfig, Table, VideoRotary
from packvit.out_of_memory import free_host_memory

WORKSPACE = 128 * 2**20  # of cuBLAS and cuBLASLt: 32 MiB each on Hopper, and rounding
RESIZED_ROWS = 2**16  # the most that `positions.ResizedTables` keeps


class Peak(NamedTuple):
    """Bytes at the peak of a forward, on top of the weights."""

    per_token: int  # bytes for each row of the stream
    fixed: int  # whatever the pack

    def activations(self, tokens: int) -> int:
        """Return the bytes for a pack of `tokens` rows."""
        return self.fixed + tokens * self.per_token

    def most_tokens(self, free: int) -> int:
        """Return the rows of the largest pack whose activations fit in `free` bytes."""
        return max(0, (free - self.fixed) // self.per_token)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a forward could still take on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_room(name: str, needed: int, device: torch.device) -> None:
    """Refuse weights that take more bytes than are free, before they are read.

    Raises: CheckpointError with both numbers.
    """
    free = free_host_memory() if device.type == "cpu" else free_memory(device)
    if free is not None and needed > free:
        raise CheckpointError(
            f"The weights of {name} take {needed / 2**30:.1f} GiB, but {device} has only "
            f"{free / 2**30:.1f} GiB free for this process. Choose a smaller model or bfloat16, or "
            "give it more memory."
        )


def peak(config: EncoderConfig, dtype_bytes: int, *, taps: int = 0, lists: int = 0) -> Peak:
    """Return what bounds the memory of a forward for inference.

    `taps` counts tapped layers, `lists` columns of tokens that are written to a file.
    """
    width, mlp, patch = config.width, config.mlp_width, config.temporal * config.patch_dim
    rotary = 4 * width if config.rotary else 0
    in_fp32 = isinstance(config.rotary, AxialRotary | VideoRotary)
    if in_fp32:  # queries and keys are turned in it
        rotary *= max(1, 4 // dtype_bytes)
    embedding = 5 * width * dtype_bytes + patch * (4 + dtype_bytes)
    attention = (13 * width + rotary) * dtype_bytes
    gated = max(5 * width + 4 * mlp, 6 * width + 3 * mlp)
    transform = (gated if config.gated else 6 * width + 2 * mlp) * dtype_bytes
    held = patch * dtype_bytes + taps * width * dtype_bytes + lists * width * 4
    if config.windows:  # the stream in the windows' order
        held += width * dtype_bytes
    if in_fp32:  # cosines and sines, and both in another order
        held += 4 * config.head_dim * 4
    fixed = WORKSPACE
    if isinstance(config.positions, Table):
        fixed += RESIZED_ROWS * width * dtype_bytes
        held += width * dtype_bytes  # the tables of a pack, end to end
    return Peak(
        max(embedding, attention, transform) + held,
        fixed,
    )
