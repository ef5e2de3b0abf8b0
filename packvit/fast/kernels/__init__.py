"""Triton kernels, imported only where Triton is installed and tensors are on CUDA.

Each has a plain twin in `steps.py` that the tests compare it with, and a gain in benchmarks/LOG.md.
Every program works on whole tokens, or on parts of them, so that no token's bits depend on another.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def operator(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function that launches kernels an operator, whose results look as `fake` returns them.

    torch.compile and subclasses of tensors need one; anyone else calls the function itself, since
    what torch does around an operator takes the host longer than a launch.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        op = torch.library.custom_op(f"packvit::{function.__name__}", function, mutates_args=())
        op.register_fake(fake)

        @wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            plain = type(arguments[0]) is torch.Tensor and not torch.compiler.is_compiling()
            return (function if plain else op)(*arguments, **named)

        return call

    return decorate


def warps_of(block: int) -> int:
    """Return how many warps share a row of `block` numbers."""
    return 4 if block <= 2048 else 8
