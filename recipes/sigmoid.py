"""SigLIP's loss of images and texts that lie on several processes, a chunk of each at a time.

Every process compares its images with its own texts, then with those of the process before it, and
so on around the ring: logits of all images and all texts exist nowhere. A chunk of texts travels
with its gradient, which is whole when it is home again.

Source: "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343, section 3.3.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the loss of this process's images with the texts of all, summed over pairs.

    Image i and text i of a process belong together, and no others. Summed over processes and
    divided by the images of all, it is the loss of the paper. The gradient of texts is that of the
    sum over all processes, so every process must weigh its loss alike.

    Shapes: images, texts [N, E] of length 1, N the same everywhere; scale, bias [1] -> scalar.
    """
    return RingLoss.apply(images, texts, scale, bias)


class RingLoss(torch.autograd.Function):
    """The loss, with all gradients at once: no logits are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Return the sum over pairs."""
        own = [part.detach().float() for part in (images, scale, bias)]
        given = [torch.zeros_like(part) for part in own]
        chunk, back = texts.detach().float(), torch.zeros_like(texts, dtype=torch.float32)
        total = chunk.new_zeros(())
        processes = dist.get_world_size() if dist.is_initialized() else 1
        for turn in range(processes):
            with torch.enable_grad():
                inputs = [part.requires_grad_() for part in (*own, chunk.detach())]
                loss = pair_loss(inputs[0], inputs[3], inputs[1], inputs[2], paired=turn == 0)
                *found, of_chunk = torch.autograd.grad(loss, inputs)
            total += loss.detach()
            given = [before + more for before, more in zip(given, found, strict=True)]
            chunk, back = pass_on(torch.stack([chunk, back + of_chunk]), processes)
        kinds = (images, scale, bias)
        ctx.save_for_backward(
            *(gradient.to(kind.dtype) for gradient, kind in zip(given, kinds, strict=True)),
            back.to(texts.dtype),
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, given: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients, which are there already."""
        images, scale, bias, texts = (given * gradient for gradient in ctx.saved_tensors)
        return images, texts, scale, bias


def pair_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, paired: bool
) -> Tensor:
    """Return the loss of all pairs, of which those on the diagonal belong together if `paired`."""
    logits = images @ texts.T * scale + bias
    signs = 2 * torch.eye(len(images), device=logits.device) * paired - 1
    return -F.logsigmoid(signs * logits).sum()


def pass_on(held: Tensor, processes: int) -> Tensor:
    """Give a tensor to the next process of the ring, and return that of the one before."""
    if processes == 1:
        return held
    rank, taken = dist.get_rank(), torch.empty_like(held)
    moves = [
        dist.P2POp(dist.isend, held, (rank + 1) % processes),
        dist.P2POp(dist.irecv, taken, (rank - 1) % processes),
    ]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return taken
