"""Flattened patches to tokens: normalised pixels, one matrix, positions, prefix tokens."""

from typing import TypeVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from packvit.config import (
    EncoderConfig,
    ImageConfig,
    PatchOrder,
    Rotary,
    SinCos,
    Statistics,
    Table,
    VideoRotary,
)
from packvit.model.linear import Linear, affine
from packvit.model.norms import Tokens, norm
from packvit.model.parameters import drawn
from packvit.model.positions import (
    Axes,
    ResizedTables,
    check_grid,
    frame_waves,
    look_up,
    sine_cosine,
)
from packvit.model.rotary import axial_rotary, rotary, video_rotary
from packvit.packs.grid import Grid
from packvit.packs.places import PatchPlaces, PrefixPlaces, places_in_clips

AnyModule = TypeVar("AnyModule", bound="PatchEmbeddings")
CosSin = tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]  # of each token's rotary angles


def normalize(
    patches: UInt8[Tensor, "T P"],
    mean: Statistics,
    std: Statistics,
    *,
    channels_last: bool,
) -> Float[Tensor, "T P"]:
    """Return raw pixels normalised in fp32, with the same bits as transformers' processors."""
    # 255 is a tensor too: CUDA multiplies by a host number's reciprocal, which rounds differently.
    numbers = torch.tensor([mean, std, (255.0,) * 3], dtype=torch.float32, device="cpu")
    statistics = numbers.to(patches.device, non_blocking=True)
    center, scale, white = statistics if channels_last else statistics[:, :, None]
    values = patches.unflatten(1, (-1, 3) if channels_last else (3, -1)).float()
    return values.div_(white).sub_(center).div_(scale).flatten(1)


def to_values(
    patches: Tensor, images: ImageConfig, order: PatchOrder, dtype: torch.dtype
) -> Float[Tensor, "T P"]:
    """Return patches in `dtype`, raw pixels normalised as `images` says."""
    if patches.dtype == torch.uint8:
        patches = normalize(patches, images.mean, images.std, channels_last=order == "hwc")
    return patches.to(dtype)


class PatchEmbeddings(nn.Module):
    """Flattened patches to the token stream: one matrix, positions, and prefix tokens.

    A convolution whose stride equals its kernel is a linear layer over flattened patches, so
    images are never put together again.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        interpolate: bool = False,
        patch_order: PatchOrder = "hwc",
    ) -> None:
        super().__init__()
        self.config = config
        self.interpolate = interpolate
        self.patch_order: PatchOrder = patch_order
        video = config.temporal * config.patch_dim  # of a video's patch
        self.patches = Linear(video, config.width, bias=config.patch_bias)
        self.norm = norm(config) if config.embedding_norm else None
        if isinstance(config.positions, Table):
            places = config.positions.rows * config.positions.columns + config.positions.class_row
            self.positions = drawn(places, config.width)
            self.resized = ResizedTables(config.positions)
        elif isinstance(config.positions, SinCos):
            self.axes = Axes(config.positions, config.width)
        if config.class_token:
            self.class_token = drawn(config.width)
        if config.registers:
            self.registers = drawn(config.registers, config.width)

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
        tokens = self.embed(patches)
        if self.norm is not None and self.config.embedding_norm == "patches":
            tokens = self.norm(tokens)
        tokens = self.add_positions(tokens, grid) if sines is None else tokens + sines
        if places is not None:
            tokens = torch.cat([self.prefix(), tokens]).index_select(0, places.gather)
        if self.norm is not None and self.config.embedding_norm == "tokens":
            tokens = self.norm(tokens)
        return tokens

    def embed(self, patches: Float[Tensor, "T P"]) -> Tokens:
        """Return the patches of images or of videos as tokens.

        An image is a video's patch of frames that are the same. So its pixels meet the sum of the
        frames' weights, which for two frames is rounded once, in whatever dtype.
        """
        config, layer = self.config, self.patches
        if patches.shape[1] != config.patch_dim or config.temporal == 1:
            return layer(patches)
        leading = 1 if self.patch_order == "hwc" else 3  # frames stand before rows
        if type(layer) is Linear:
            parts = layer.weight.unflatten(1, (leading, config.temporal, -1))
            return affine(patches, parts.sum(2).flatten(1), layer.bias, layer.invariant)
        frames = patches.unflatten(1, (leading, 1, -1)).repeat(1, 1, config.temporal, 1)
        return layer(frames.flatten(1))

    def train(self: AnyModule, mode: bool = True) -> AnyModule:
        """Switch between training and inference, and forget tables resized before."""
        if isinstance(self.config.positions, Table):
            self.resized.forget()
        return super().train(mode)

    def add_positions(self, tokens: Tokens, grid: Grid) -> Tokens:
        """Add positions to each patch; rotary ones are applied in attention."""
        positions = self.config.positions
        if positions is None:
            return tokens
        places = PatchPlaces.from_grid(grid, device=tokens.device)
        if isinstance(positions, SinCos):
            return tokens + sine_cosine(self.axis(grid), places)
        if not (positions.any_grid or self.interpolate):
            check_grid(positions, grid, self.config.patch)
        learned = look_up(
            self.resized, self.positions, places, grid, invariant=self.patches.invariant
        )
        if positions.frames is not None:
            width, dtype = self.config.width, learned.dtype
            waves = frame_waves(grid, positions.frames, places, width, dtype)
            learned = learned if waves is None else learned + waves
        return tokens + learned

    def axis(self, grid: Grid) -> Float[Tensor, "side half"]:
        """Return the sine-cosine axis, at least as long as the longest frame has patches.

        That is enough for frames of one row, with which the pack of a CUDA graph is filled up.
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
    config: EncoderConfig,
    grid: Grid,
    places: PrefixPlaces | None,
    like: Tensor,
    given: Int64[Tensor, "T 3"] | None = None,
) -> CosSin | None:
    """Return the rotary cosine and sine of every token, made once for all layers; prefix tokens are
    not rotated.

    `given` are the patches' places in time and space, where the caller said them.

    Shapes: 2 x [tokens, K], on the device of `like`; in its dtype for DINOv3's, else in fp32.
    """
    positions, width, device = config.rotary, config.head_dim, like.device
    if positions is None:
        return None
    if isinstance(positions, VideoRotary):
        at = places_in_clips(grid, positions.frames, device=device) if given is None else given
        cosine, sine = video_rotary(positions, at, width)
    elif isinstance(positions, Rotary):
        on_device = PatchPlaces.from_grid(grid, device=device)
        cosine, sine = rotary(positions, on_device, width, like.dtype)
    else:
        cosine, sine = axial_rotary(positions, PatchPlaces.from_grid(grid, device=device), width)
    if places is None:
        return cosine, sine
    still = cosine.new_zeros(config.prefix, config.head_dim)
    return (
        torch.cat([still + 1, cosine]).index_select(0, places.gather),
        torch.cat([still, sine]).index_select(0, places.gather),
    )
