"""The torch device and dtype that a caller names."""

import platform
from contextlib import AbstractContextManager, nullcontext

import torch

from packvit.model.capability import is_too_old

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def find_device(device: torch.device | str | None) -> torch.device:
    """Return the torch device for a caller's; None is CUDA if there is one.

    Raises: ValueError for one that does not exist or holds no numbers; TypeError.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(
            f'device is {device!r}, but must be a torch.device or a word such as "cpu", "cuda" or '
            '"cuda:1".'
        )
    if reason := obstacle(device):
        raise ValueError(f'device "{device}" cannot be used: {reason}. Try `device="cpu"`.')
    return torch.device(device)


def obstacle(device: torch.device | str) -> str | None:
    """Return why nothing can run on a device, or None if it can."""
    try:
        found = torch.device(device)
    except RuntimeError:
        return "torch knows no device of that name"
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            return f"torch finds {count} CUDA devices here"
    try:
        if torch.empty(0, dtype=torch.uint8, device=found).is_meta:
            return "it holds no numbers"
    except (RuntimeError, AssertionError):  # torch says either of a device that is not there
        return "torch cannot use it here"
    return None


def name_device(device: torch.device) -> str:
    """Return what decides the bits that a device computes: a GPU's model, a CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def find_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the torch dtype for a caller's; None is bfloat16 on a recent GPU, else float32.

    Raises: ValueError for one that no encoder runs in; TypeError.
    """
    if dtype is None:
        recent = device.type == "cuda" and not is_too_old(device)
        return torch.bfloat16 if recent else torch.float32
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(
            f'dtype is {dtype!r}, but must be a torch.dtype or a word such as "bfloat16".'
        )
    for name, found in DTYPES.items():
        if dtype in (name, found):
            return found
    raise ValueError(f'dtype is "{dtype}", but must be one of: {", ".join(DTYPES)}.')


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: kernels outside torch launch there."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if on_gpu else nullcontext()
