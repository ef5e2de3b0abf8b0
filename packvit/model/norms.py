"""The two norms: torch's own layer norm, and RMS norm."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from packvit.config import Norm as Kind
from packvit.config import TransformerConfig

Tokens = Float[Tensor, "T D"]


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32 within, and scale.

    The reference rounds to the input's dtype before it scales; we round once, after.
    """

    bias = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tokens) -> Tokens:
        """Normalise each token by itself."""
        # Under autocast patches come in bf16 to fp32 weights, for which torch has no fused kernel.
        values = hidden_states.to(self.weight.dtype)
        return F.rms_norm(values, self.weight.shape, self.weight, self.eps)


Norm = RMSNorm | nn.LayerNorm


def norm(config: TransformerConfig) -> Norm:
    """Return the norm that `config` names, over the width of the stream."""
    return norm_of(config.norm, config.width, config.norm_eps)


def norm_of(kind: Kind, width: int, eps: float) -> Norm:
    """Return the norm of that name."""
    return RMSNorm(width, eps) if kind == "rms" else nn.LayerNorm(width, eps)
