"""The compute capability of GPUs; asked for only here, so that a test can replace it."""

import torch

Capability = tuple[int, int]

OLDEST = (8, 0)  # with bfloat16 in hardware, which FlashAttention and our kernels need: an A100
HOPPER = (9, 0)


def capability(device: torch.device) -> Capability | None:
    """Return the compute capability of a CUDA device, None of others.

    None too where no GPU is there to be asked: fake CUDA tensors, which calls are counted with.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def is_too_old(device: torch.device) -> bool:
    """Return whether a CUDA device computes bfloat16 slowly or not at all."""
    found = capability(device)
    return found is not None and found < OLDEST
