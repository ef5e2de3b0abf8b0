"""What an encoder is, in frozen values: its size, its named choices, and how it wants its images.

Two families differ in these values and in the names of their weights, in nothing else.
"""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
PatchOrder = Literal["hwc", "chw"]
TableResize = Literal[
    "bilinear",
    "bilinear_antialias",
    "bilinear_corners",
    "bicubic",
    "bicubic_antialias",
    "square_then_crop",
]
GridPolicy = Literal["checkpoint", "interpolate"]
Statistics = tuple[float, float, float]  # one number a channel: red, green, blue

# Mean and standard deviation of each channel, of values from 0 to 1.
CLIP_STATISTICS: tuple[Statistics, Statistics] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
IMAGENET_STATISTICS: tuple[Statistics, Statistics] = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)
HALF_STATISTICS: tuple[Statistics, Statistics] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNCHANGED_STATISTICS: tuple[Statistics, Statistics] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True)
class ShortestEdge:
    """Resize until the shorter side is `edge` pixels, then cut `crop` (height, width) out of it.

    Of an odd rest the smaller half stands before the crop, or an even half: torchvision.
    """

    edge: int
    crop: tuple[int, int] | None = None
    rest: Literal["floor", "even"] = "floor"


@dataclass(frozen=True, slots=True)
class Exact:
    """Resize to exactly (height, width) pixels, then cut `crop` (height, width) out of it."""

    height: int
    width: int
    crop: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class MostPatches:
    """Resize to the largest grid of at most `patches`, both sides rounded up: SigLIP2 NaFlex."""

    patches: int = 256


@dataclass(frozen=True, slots=True)
class PixelRange:
    """Resize to `least` to `most` pixels in all, each side rounded to what a merger takes: Qwen."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class PaddedPatches:
    """Shrink to `patches` in all and `side` along each side, then fill up with black: Kimi.

    Without `fill` the middle is cut out instead, in whole squares of patches.
    """

    patches: int = 16384
    side: int = 512
    fill: bool = True


Sizing = ShortestEdge | Exact | MostPatches | PixelRange | PaddedPatches


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How a checkpoint wants its images.

    Units: `patch` in pixels; `mean` and `std` per channel, of values from 0 to 1.
    """

    patch: int
    mean: Statistics
    std: Statistics
    resample: Filter
    sizing: Sizing | None = None  # None: the checkpoint takes images as they are
    multiple: int = 1  # rows and columns of patches are multiples of it: a merger's side
    frame_sizing: Sizing | None = None  # of a clip's frames, where they are sized otherwise


@dataclass(frozen=True, slots=True)
class SinCos:
    """Sine-cosine positions, computed for any grid and added to the patches."""

    temperature: float = 10000.0


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions from -1 to 1 over each side of an image, of each patch's centre: DINOv3."""

    base: float = 100.0


@dataclass(frozen=True, slots=True)
class AxialRotary:
    """Rotary positions that count patches: 0, 1, 2, ... along each side, plus `offset`.

    Half of the angles are of the row, half of the column, by frequencies that fall from 1. `order`
    says which comes first, `layout` whether it comes first as a whole or in each frequency. All
    turn pairs (k, k + K/2); weights that turn neighbours are permuted when they are loaded.
    """

    base: float = 10000.0
    order: Literal["row_column", "column_row"] = "row_column"
    layout: Literal["concatenated", "interleaved"] = "concatenated"
    offset: int = 0


@dataclass(frozen=True, slots=True)
class VideoRotary:
    """Rotary positions in time, row and column, which callers may give: OneVision-Encoder.

    Of 16 angles 4 are of the time, 6 of the row and 6 of the column, each by frequencies of its own
    that fall from 1. A clip's frames are spread over `frames` times, or None: numbered.
    """

    base: float = 10000.0
    frames: int | None = 64


@dataclass(frozen=True, slots=True)
class Table:
    """Learned positions for a grid of `rows` x `columns` patches, added to them.

    `resize` says how another grid's positions are interpolated, always in fp32: "bilinear_corners"
    lays corners on corners, "square_then_crop" is bilinear to the square of the longer side, of
    which the grid is the top left. `any_grid` says whether the reference does so unasked. Where it
    refuses, so do we, unless the user says otherwise.
    `class_row` says whether the table opens with a row for the class token. Of more than one of
    the `frames` that a clip may have, each adds a sine-cosine of its number.
    """

    rows: int
    columns: int
    resize: TableResize
    any_grid: bool = False
    class_row: bool = False
    frames: int | None = None  # None: of any number, which look alike


@dataclass(frozen=True, slots=True)
class Windows:
    """Attention within squares of `side` x `side` patches of a frame, but for the `full` layers.

    Squares are cut from the top left; what is left over right and below is smaller.
    """

    side: int
    full: tuple[int, ...]  # layers, counted from the front


@dataclass(frozen=True, slots=True)
class Merger:
    """Squares of `side` x `side` patches to one token of a language model's `width`.

    Patches are normed, laid side by side, and go through an MLP with GELU. `deepstack` are layers
    whose outputs are merged too, each by weights of its own, normed after they are laid together.
    """

    width: int
    norm: Norm
    norm_eps: float
    side: int = 2
    deepstack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """One vector of several class tokens, laid end to end: RADIO.

    The first `tokens` of a sequence are class tokens, of which the `chosen` ones are taken.
    """

    tokens: int
    chosen: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """The heads, MLP and norm of a pooling head, where they are not as the blocks' are."""

    heads: int
    mlp_width: int
    norm: Norm | None = None  # None: as the blocks'


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """The size of a tower's blocks and their named choices.

    Units: `width` is D, `mlp_width` the width inside each MLP.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated: bool = False  # an MLP of act(gate) * up, instead of act(up)
    bias: bool = True  # of the linear layers in a block, other than q, k and v
    qkv_bias: Literal["qkv", "qv", ""] = "qkv"  # which of them have one
    layer_scale: bool = False  # a learned factor on what each half of a block adds

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """The size of an image encoder and its named choices.

    Units: `patch` in pixels.
    """

    patch: int
    positions: SinCos | Table | None  # added to the patches
    # Turned into every layer's queries and keys.
    rotary: Rotary | AxialRotary | VideoRotary | None = None
    temporal: int = 1  # frames of a video's patch; an image is taken for frames of one picture
    segments: Literal["frame", "clip"] = "frame"  # what attends to itself
    windows: Windows | None = None
    patch_bias: bool = True
    class_token: bool = False  # opens every sequence
    registers: int = 0  # learned tokens after the class token, which stand for no patch
    embedding_norm: Literal["patches", "tokens"] | None = None  # before positions, or after all
    final_norm: Literal["tokens", "pooled"] | None = "tokens"  # "pooled": of the class token alone
    pool: Literal["query", "probe", "class"] | None = None  # what makes one vector of a sequence
    summary: Summary | None = None  # of which tokens "class" makes it, where not of the first alone
    probe: Probe | None = None  # the head that "probe" means
    projection: int | None = None  # width of the space shared with text, where there is one
    projection_bias: bool = False
    merger: Merger | None = None

    @property
    def patch_dim(self) -> int:
        """P, the values of one flattened patch of an image, of three channels."""
        return 3 * self.patch**2

    @property
    def vector_width(self) -> int:
        """The width of an image's one vector, where it is not projected."""
        if self.merger:
            return self.merger.width
        return len(self.summary.chosen) * self.width if self.summary else self.width

    @property
    def prefix(self) -> int:
        """R, the tokens that stand before the patches of every sequence."""
        return self.class_token + self.registers


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig(TransformerConfig):
    """The size of a text encoder and its named choices.

    Units: `positions` counts the tokens of the longest text.
    """

    vocabulary: int
    positions: int
    causal: bool = True  # a token attends to itself and those before it
    # Which token of a text is pooled: the first that is `end`, the first of the largest id, the
    # last, or all of them, by their mean.
    pool: Literal["end", "largest", "last", "mean"] = "end"
    end: int = 0
    padded: bool = False  # texts are filled up to `positions` tokens, which all take part
    head: int | None = None  # width of a matrix with a bias over the pooled token
    projection: int | None = None  # width of one without, into the space shared with images
    sinusoids: bool = False  # for positions, instead of a table that is learned
    scaled_tokens: bool = False  # a token's row is multiplied by the root of the width
    scaled: bool = True  # has a scale of logits; a tower that was saved alone has none
    first_scale: float | None = None  # its logarithm, where the checkpoint may not hold it
    logit_bias: bool = False  # beside the scale: pairs are judged one by one, by a sigmoid
    most_scale: float | None = None  # what the scale of logits is clamped to


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError listing the choices if `value` is not one of them."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{name} is "{value}", but must be {listed}.')
