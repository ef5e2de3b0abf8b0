"""One process of a ring that takes the sigmoid loss; few imports, since each process has them."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from recipes.sigmoid import sigmoid_loss

PAIRS, WIDTH = 6, 8


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=-1) for _ in range(2)
    )
    return images, texts, torch.tensor([9.0]), torch.tensor([-3.0])


def run_process(rank: int, processes: int, folder: str) -> None:
    """Save the loss of this process's pairs and its gradients."""
    address = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    images, texts, scale, bias = draw()
    own = slice(rank, None, processes)
    given = [part.clone().requires_grad_() for part in (images[own], texts[own], scale, bias)]
    loss = sigmoid_loss(*given)
    (loss / PAIRS).backward()
    torch.save((loss.detach(), [part.grad for part in given]), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
