"""Triton kernels, imported only where Triton is installed and tensors are on CUDA.

Each has a reference implementation that the tests compare it with, and its gain stands in
benchmarks/LOG.md. Every program works on whole tokens, or on parts of them, so that no token's bits
depend on another. torch.compile never sees them: what is compiled runs the plain model.
"""


def warps_of(block: int) -> int:
    """Return how many warps share a row of `block` numbers."""
    return 4 if block <= 2048 else 8
