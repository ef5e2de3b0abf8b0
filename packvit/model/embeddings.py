"""Flattened patches to tokens: normalised pixels, one matrix, positions, prefix tokens."""

from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from packvit.config import EncoderConfig, Rotary, SinCos, Statistics, Table
from packvit.model.linear import Linear
from packvit.model.norms import Tokens, norm
from packvit.model.positions import Axes, ResizedTables, check_grid, look_up, rotary, sine_cosine
from packvit.packs.grid import Grid
from packvit.packs.places import PatchPlaces, PrefixPlaces

AnyModule = TypeVar("AnyModule", bound="PatchEmbeddings")
CosSin = tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]  # of each token's rotary angles


def normalize(
    patches: UInt8[Tensor, "T P"],
    mean: Statistics,
    std: Statistics,
    *,
    channels_last: bool,
) -> Float[Tensor, "T P"]:
    """Return raw pixels normalised in fp32, to the last bit as transformers' processors do it."""
    # 255 is a tensor too: CUDA multiplies by a host number's reciprocal, which rounds differently.
    numbers = torch.tensor([mean, std, (255.0,) * 3], dtype=torch.float32, device="cpu")
    statistics = numbers.to(patches.device, non_blocking=True)
    center, scale, white = statistics if channels_last else statistics[:, :, None]
    values = patches.unflatten(1, (-1, 3) if channels_last else (3, -1)).float()
    return values.div_(white).sub_(center).div_(scale).flatten(1)


class PatchEmbeddings(nn.Module):
    """Flattened patches to the token stream: one matrix, positions, and prefix tokens.

    A convolution whose stride is its kernel is a linear layer over flattened patches, so nothing
    is ever put back together into images.
    """

    def __init__(self, config: EncoderConfig, *, interpolate: bool = False) -> None:
        super().__init__()
        self.config = config
        self.interpolate = interpolate
        self.patches = Linear(config.patch_dim, config.width, bias=config.patch_bias)
        self.norm = norm(config) if config.embedding_norm else None
        if isinstance(config.positions, Table):
            places = config.positions.rows * config.positions.columns + config.positions.class_row
            self.positions = nn.Parameter(torch.empty(places, config.width).normal_(std=0.02))
            self.resized = ResizedTables(config.positions)
        elif isinstance(config.positions, SinCos):
            self.axes = Axes(config.positions, config.width)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        if config.registers:
            shape = (config.registers, config.width)
            self.registers = nn.Parameter(torch.empty(shape).normal_(std=0.02))

    def forward(
        self,
        patches: Float[Tensor, "T P"],
        grid: Grid,
        places: PrefixPlaces | None,
        sines: Tensor | None = None,
    ) -> Float[Tensor, "tokens D"]:
        """Embed the T patches of the images in `grid`, each sequence behind its prefix tokens.

        `sines` are sine-cosine positions [T, D], where they were made beforehand.

        Raises: ValueError for a grid that a learned table was not made for.
        """
        tokens = self.patches(patches)
        if self.norm is not None and self.config.embedding_norm == "patches":
            tokens = self.norm(tokens)
        tokens = self.add_positions(tokens, grid) if sines is None else tokens + sines
        if places is not None:
            tokens = torch.cat([self.prefix(), tokens]).index_select(0, places.gather)
        if self.norm is not None and self.config.embedding_norm == "tokens":
            tokens = self.norm(tokens)
        return tokens

    def train(self: AnyModule, mode: bool = True) -> AnyModule:
        """Switch between training and inference, and forget tables resized before."""
        if isinstance(self.config.positions, Table):
            self.resized.forget()
        return super().train(mode)

    def add_positions(self, tokens: Tokens, grid: Grid) -> Tokens:
        """Add to each patch what tells its place; rotary positions come in later."""
        positions = self.config.positions
        if isinstance(positions, Rotary):
            return tokens
        places = PatchPlaces.from_grid(grid, device=tokens.device)
        if isinstance(positions, SinCos):
            return tokens + sine_cosine(self.axis(grid), places)
        if not (positions.any_grid or self.interpolate):
            check_grid(positions, grid, self.config.patch)
        return tokens + look_up(
            self.resized, self.positions, places, grid, invariant=self.patches.invariant
        )

    def axis(self, grid: Grid) -> Float[Tensor, "side half"]:
        """Return the sine-cosine axis, as long as the longest frame has patches, at the least.

        So that it serves frames of one row, which is what fills up the pack of a CUDA graph.
        """
        longest = max(rows * columns for _, rows, columns in grid)
        return self.axes.get(longest, self.patches.weight.device, self.patches.weight.dtype)

    def prefix(self) -> Float[Tensor, "R D"]:
        """Return the tokens that open every sequence: class token, then registers."""
        positions, first = self.config.positions, []
        if self.config.class_token:
            has_row = isinstance(positions, Table) and positions.class_row
            first = [self.class_token + self.positions[0] if has_row else self.class_token]
        rest = self.registers if self.config.registers else ()
        return torch.stack([*first, *rest])


def rotary_cos_sin(
    config: EncoderConfig, grid: Grid, places: PrefixPlaces | None, like: Tensor
) -> CosSin | None:
    """Return every token's rotary cosine and sine, made once for all layers; prefixes stay as is.

    Shapes: 2 x [tokens, K], on the device and in the dtype of `like`.
    """
    if not isinstance(config.positions, Rotary):
        return None
    on_device = PatchPlaces.from_grid(grid, device=like.device)
    cosine, sine = rotary(config.positions, on_device, config.head_dim, like.dtype)
    if places is None:
        return cosine, sine
    still = cosine.new_zeros(config.prefix, config.head_dim)
    return (
        torch.cat([still + 1, cosine]).index_select(0, places.gather),
        torch.cat([still, sine]).index_select(0, places.gather),
    )
