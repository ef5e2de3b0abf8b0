"""The modules that encoders are made of. Each takes a pack and its `Segments` as arguments.

Weights that read the same input are one matrix: q, k and v, and an MLP's gate and up projection.
A checkpoint that keeps them apart is fused as it is loaded (`weights.py`).
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from packvit.attention import Backend
from packvit.config import Activation, EncoderConfig, SinCos, Statistics, Table
from packvit.packed import Grid, PatchPlaces, Segments
from packvit.positions import check_grid, look_up, sine_cosine

Tokens = Float[Tensor, "T D"]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU. Source: CLIP, model.py."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32 within, and scale.

    The reference rounds to the input's dtype before it scales; we round once, after.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tokens) -> Tokens:
        """Normalise each token by itself."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def norm(config: EncoderConfig) -> nn.Module:
    """Return the norm that `config` names, over the encoder's width."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps)


def to_values(
    patches: UInt8[Tensor, "T P"],
    mean: Statistics,
    std: Statistics,
    *,
    channels_last: bool,
) -> Float[Tensor, "T P"]:
    """Return raw pixels normalised in fp32, to the last bit as transformers' processors do it."""
    # 255 is a tensor too: CUDA multiplies by a host number's reciprocal, which rounds differently.
    statistics = torch.tensor([mean, std, (255.0,) * 3]).to(patches.device, non_blocking=True)
    center, scale, white = statistics if channels_last else statistics[:, :, None]
    values = patches.unflatten(1, (-1, 3) if channels_last else (3, -1)).float()
    return values.div_(white).sub_(center).div_(scale).flatten(1)


class PatchEmbeddings(nn.Module):
    """Flattened patches to tokens: one matrix, a norm where there is one, and positions.

    A convolution whose stride is its kernel is a linear layer over flattened patches, so nothing
    is ever put back together into images.
    """

    def __init__(self, config: EncoderConfig, *, interpolate: bool = False) -> None:
        super().__init__()
        self.config = config
        self.interpolate = interpolate
        self.patches = nn.Linear(config.patch_dim, config.width)
        self.norm = norm(config) if config.embedding_norm else None
        if isinstance(config.positions, Table):
            places = config.positions.rows * config.positions.columns
            self.positions = nn.Parameter(torch.empty(places, config.width).normal_(std=0.02))

    def forward(self, patches: Float[Tensor, "T P"], grid: Grid) -> Tokens:
        """Embed the T patches of the images in `grid`.

        Raises: ValueError for a grid that a learned table was not made for.
        """
        tokens = self.patches(patches)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return tokens + self.places(grid, tokens)

    def places(self, grid: Grid, tokens: Tokens) -> Tokens:
        """Return the positions to be added to `tokens`."""
        positions, places = self.config.positions, PatchPlaces.from_grid(grid)
        if isinstance(positions, SinCos):
            return sine_cosine(positions, places, self.config.width, tokens.device, tokens.dtype)
        if not (positions.any_grid or self.interpolate):
            check_grid(positions, grid, self.config.patch)
        return look_up(positions, self.positions, places, grid)


class Attention(nn.Module):
    """Every token attends to the tokens of its own sequence."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, hidden_states: Tokens, segments: Segments, backend: Backend) -> Tokens:
        """Attend, by `backend`, within `segments`."""
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.unbind(-3)
        return self.out(backend.run(query, key, value, segments, segments).flatten(-2))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, where act is SiLU."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden_states: Tokens) -> Tokens:
        """Transform each token by itself."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """Attention, then an MLP, each on normed tokens and added to the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, hidden_states: Tokens, segments: Segments, backend: Backend) -> Tokens:
        """Return the residual stream after this block."""
        hidden_states = hidden_states + self.attention(
            self.attention_norm(hidden_states), segments, backend
        )
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class Blocks(nn.Module):
    """All blocks, one after another, with the outputs of some of them kept."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(
        self,
        hidden_states: Tokens,
        segments: Segments,
        backend: Backend,
        taps: Collection[int] = (),
    ) -> tuple[Tokens, dict[int, Tokens]]:
        """Return the residual stream after the last block, and after each layer in `taps`."""
        tapped = {}
        for layer, block in enumerate(self.layers):
            hidden_states = block(hidden_states, segments, backend)
            if layer in taps:
                tapped[layer] = hidden_states
        return hidden_states, tapped


class QueryPool(nn.Module):
    """One learned query attends to the tokens of each sequence: AIMv2's pooling head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        self.kv = nn.Linear(config.width, 2 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tokens, segments: Segments, backend: Backend) -> Float[Tensor, "S D"]:
        """Return one vector for each sequence."""
        key, value = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        queries = Segments.from_lengths((1,) * len(segments.lengths), device=tokens.device)
        query = self.query.unflatten(0, (self.heads, -1)).repeat(len(segments.lengths), 1, 1)
        return self.out(backend.run(query, key, value, queries, segments).flatten(-2))
