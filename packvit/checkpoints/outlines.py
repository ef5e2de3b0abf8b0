"""A checkpoint without its numbers, for an encoder that only says what it is."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.tensors import Tensors

# What the header of a file calls them. Source: safetensors 0.8, `bindings/python/src/lib.rs`.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Outlines(Mapping[str, Tensor]):
    """The tensors of files on the meta device, by the files' headers alone."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        dtype = DTYPES.get(self.tensors.stored_as(name))
        if dtype is None:  # a rare one: torch may have it or not
            return self.tensors[name].to("meta")
        return torch.empty(self.tensors.shape_of(name), dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def without_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of files whose tensors are on the meta device."""
    assert isinstance(checkpoint.tensors, Tensors)
    return replace(checkpoint, tensors=Outlines(checkpoint.tensors))
