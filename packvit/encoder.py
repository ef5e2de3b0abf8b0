"""The encoder: one forward for all images of a pack.

The public API: it checks its arguments, which what it calls then trusts.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, Literal, TypeVar, Unpack
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import saving
from packvit.checkpoints.description import describe
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.in_memory import read_model
from packvit.checkpoints.layouts import Family, LayoutName, check_family, image_tower
from packvit.config import EncoderConfig, GridPolicy, ImageConfig, PatchOrder
from packvit.fast.forward import FastForward
from packvit.images.decode import Source
from packvit.images.patches import Cutting
from packvit.images.resize import Resize
from packvit.model.attention import AttentionInputs, opaque, resolve
from packvit.model.building import build
from packvit.model.device import current
from packvit.model.embeddings import PatchEmbeddings, to_values
from packvit.model.layers import Blocks
from packvit.model.linear import make_invariant
from packvit.model.merging import Mergers
from packvit.model.norms import norm
from packvit.model.options import LoadKeywords, LoadOptions
from packvit.model.pooling import pool_sequences, pooling_head, projection_layer
from packvit.model.trunk import Trunk, TrunkOutput, plan_forward, run_trunk, trunk_output
from packvit.packs import checks
from packvit.packs.clips import Clip
from packvit.packs.embedding import OnError, embed_images
from packvit.packs.features import Features, Pack, as_pack, make_pack
from packvit.packs.grid import GridLike, read_grid, segment_images, sequence_lengths, to_device
from packvit.packs.places import places_in_clips

AnyEncoder = TypeVar("AnyEncoder", bound="Encoder")


class Encoder(nn.Module):
    """A vision encoder on packs: patches laid end to end, attention per frame, no padding.

    Families are subclasses that only say which family they are.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        config: EncoderConfig,
        images: ImageConfig,
        *,
        attention: str = "auto",
        patch_order: PatchOrder = "hwc",
        positions: GridPolicy = "checkpoint",
    ) -> None:
        super().__init__()
        checks.check_config(config, type(self).__name__)
        self.config = config
        self.images = images
        self.patch_order: PatchOrder = patch_order
        self.backend = attention
        self.checkpoint: Checkpoint | None = None  # where the weights came from
        self.origin: saving.Origin | None = None  # what described them, also of a model in memory
        self.fp8 = self.invariant = self.compiled = False
        self.carried: Mapping[str, Tensor] = {}  # a checkpoint's tensors that nothing here uses
        self.skipped: tuple[str, ...] = ()  # its names left unread, of another tower's tensors
        self.embeddings = PatchEmbeddings(
            config, interpolate=positions == "interpolate", patch_order=patch_order
        )
        self.encoder = Blocks(config)
        self.norm = norm(config) if config.final_norm else nn.Identity()
        self.head = pooling_head(config)
        self.merger = Mergers(config, config.merger) if config.merger else None
        self.projection = projection_layer(config)
        self.fast: FastForward | None = FastForward()  # None: `model/trunk.py` as it is

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.patches.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, and so the tokens, are made of."""
        return self.embeddings.patches.weight.dtype

    @property
    def text_space(self) -> Literal["pooled", "projected"] | None:
        """Which output is in the space that texts share, or None where none is."""
        if self.projection is not None:
            return "projected"
        return "pooled" if self.family.pools_to_text and self.config.pool else None

    @property
    def attention(self) -> str:
        """The name of the attention backend that inference would take now."""
        return resolve(self.backend, self.attention_inputs).name

    @property
    def attention_inputs(self) -> AttentionInputs:
        """The device, dtype and width of a head, which decide which backends can run."""
        return AttentionInputs.of(self.device, self.dtype, self.config.head_dim)

    def __call__(self, hidden_states: Tensor | Pack, grid_thw: GridLike | None = None) -> Tensor:
        """Return what `forward` returns of two tensors, or of one pack; hooks see the tensors."""
        return super().__call__(*as_pack(hidden_states, grid_thw))

    def forward(self, hidden_states: Tensor, grid_thw: GridLike) -> Tensor:
        """Return the tokens of every patch of the pack: the reference's `last_hidden_state`.

        Patches stand image after image, in raster order, each flattened in the order (row, column,
        channel), or by `patch_order`. uint8 patches are raw pixels, normalised here in fp32;
        floating point ones are already normalised, and are cast to the encoder's dtype.

        Shapes: hidden_states [T, P], grid_thw [N, 3] integers (frames, rows, columns), best kept
        on the host -> [T, D] in the encoder's dtype, T being the sum of frames * rows * columns.
        Raises: TypeError for other dtypes; ValueError if shapes, device or grid do not fit.
        """
        with current(self.device):
            return self.run(hidden_states, grid_thw).tokens

    def encode(
        self,
        hidden_states: Tensor | Pack,
        grid_thw: GridLike | None = None,
        *,
        taps: Sequence[int] = (),
        pooled: bool = True,
        projected: bool = False,
        merged: bool = False,
        projection: bool | None = None,
        patch_positions: GridLike | None = None,
    ) -> Features:
        """Return the tokens of a pack, and what else is asked for; takes what `forward` takes too.

        `taps` names layers (negative ones from the end) whose patch tokens are wanted as they
        leave the block, before any final norm. `projected` asks for the pooled vectors in the
        space shared with text; `projection` is its old name. `merged` asks for what a language
        model is given: a token for each square of patches, and those of its deepstack's layers.

        `patch_positions` says where patches stand, best on the host: of a whole clip, or of K
        patches chosen from one, which are one row of grid_thw, (1, 1, K).

        Shapes: patch_positions [T, 3] integers (time, row, column).
        Raises: as `forward`; ValueError for a layer, a projection or a merger that the checkpoint
        does not have, an image that does not divide into squares, or a position out of range.
        """
        hidden_states, grid_thw = as_pack(hidden_states, grid_thw)
        if projection is not None:
            warn("encode(projection=...) was renamed: write projected=...", DeprecationWarning, 2)
            projected = projection
        asked = checks.check_outputs(
            self.config, self.family.name, taps, pooled=pooled, projected=projected, merged=merged
        )
        merger = self.merger if merged else None
        deep = merger.layers if merger else ()
        with current(self.device):
            output = self.run(hidden_states, grid_thw, {*asked, *deep}, patch_positions)
            tokens = merger(output.tokens, output.taps, output.plan.grid) if merger else None
            vectors = pool_sequences(output, self.config, self.norm, self.head) if pooled else None
            shared = self.projection(vectors) if projected and self.projection else None
        return Features(
            tokens=output.tokens,
            prefix=output.prefix,
            pooled=vectors,
            projected=shared,
            taps={layer: tap for layer, tap in output.taps.items() if layer in asked},
            segment_image=to_device(segment_images(output.plan.sequences), self.device),
            grid=output.plan.grid,
            merged=tokens.merged if tokens else None,
            deepstack=tokens.deepstack if tokens else {},
            vector_rows=tokens.lengths if tokens else sequence_lengths(output.plan.sequences),
        )

    @property
    def trunk(self) -> Trunk:
        """What every patch runs through, before pooling."""
        return Trunk(self.config, self.embeddings, self.encoder, self.norm)

    def patch_positions(self, grid_thw: GridLike) -> Tensor:
        """Return where the patches of images and clips stand, of which `encode` takes a choice.

        Shapes: grid_thw [N, 3] -> [T, 3] int64 on the host: (time, row, column).
        Raises: ValueError if the grid is malformed, or the checkpoint knows no times.
        """
        frames = checks.check_video(self.config, self.family.name).frames
        return places_in_clips(read_grid(grid_thw, patches=None), frames)

    def run(
        self,
        hidden_states: Tensor,
        grid_thw: GridLike,
        taps: Collection[int] = (),
        patch_positions: GridLike | None = None,
    ) -> TrunkOutput:
        """Check what came in, and run it through the trunk."""
        grid, given = checks.read_inputs(
            hidden_states, grid_thw, patch_positions, self.config, self.family.name, self.device
        )
        backend = resolve(self.backend, self.attention_inputs)
        if self.compiled:
            backend = opaque(backend)
        plan = plan_forward(self.config, grid, backend, taps, self.device, given)
        values = self.to_values(hidden_states)
        if self.fast is None or self.compiled:  # what is compiled is fused by the compiler
            x, tapped = run_trunk(self.trunk, values, plan)
        else:
            x, tapped = self.fast(self, self.trunk, values, plan)
        return trunk_output(x, tapped, plan)

    def pack(
        self,
        images: Sequence[Source | Clip],
        *,
        resize: Resize | None = None,
        max_patches: int | None = None,
    ) -> Pack:
        """Make one pack of paths, bytes of files, PIL images or uint8 arrays [height, width, 3].

        A clip is a list of those, or one array [frames, height, width, 3].
        `resize` "checkpoint" does as the checkpoint's own preprocessing; "native" keeps the aspect
        ratio, rounds each side to the nearest patch, never enlarges beyond that, and shrinks to
        `max_patches` (1024 by default). None: "checkpoint" where that defines a size.

        Raises: ImageError with the index and the code of the first image that cannot be used.
        """
        cutting = Cutting(self.images, self.patch_order, resize, max_patches)
        return make_pack(images, cutting, self.device, self.config.temporal)

    def embed(
        self,
        images: Sequence[Source],
        *,
        token_budget: int = 16384,
        projected: bool = False,
        resize: Resize | None = None,
        max_patches: int | None = None,
        errors: OnError = "raise",
    ) -> np.ndarray:
        """Return one vector for each image, in inference mode.

        It is the pooled one, or without a pooling head the mean of the tokens (of the merged ones,
        where the checkpoint has a merger). `projected` asks for those in the space shared with
        text. Takes any number of images, as `pack` does, in packs of at most `token_budget`
        patches. With `errors` "nan", an image that cannot be used is a row of NaN; a function is
        called with its index and the ImageError besides.

        Shapes: N images -> float32 [N, D].
        Raises: ImageError with the index of the first image that cannot be used; ValueError for an
        image larger than a pack.
        """
        if projected:
            checks.check_projected(self.config, self.family.name)
        merged = bool(self.merger) and not projected
        with torch.inference_mode():
            return embed_images(
                images,
                lambda pack: self.encode(pack, projected=projected, merged=merged).vectors(),
                Cutting(self.images, self.patch_order, resize, max_patches),
                self.device,
                width=(projected and self.config.projection) or self.config.vector_width,
                token_budget=token_budget,
                errors=errors,
            )

    def to_values(self, hidden_states: Tensor) -> Tensor:
        """Return patches in the encoder's dtype, raw pixels normalised."""
        return to_values(hidden_states, self.images, self.patch_order, self.dtype)

    @classmethod
    def from_pretrained(
        cls: type[AnyEncoder],
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **options: Unpack[LoadKeywords],
    ) -> AnyEncoder:
        """Load a checkpoint of this family by its name on the hub, or from a folder.

        `options` are those of `packvit.load`. Other families' checkpoints are refused.

        Raises: as `packvit.load`; TypeError on `Encoder` itself, which has no family.
        """
        chosen = LoadOptions(**options)
        check_family(cls)
        part = image_tower([cls.family])
        checkpoint = checkpoints.read(name_or_folder, revision=revision, part=part)
        return cls.from_checkpoint(checkpoint, chosen)

    @classmethod
    def from_transformers(
        cls: type[AnyEncoder], model: nn.Module, **options: Unpack[LoadKeywords]
    ) -> AnyEncoder:
        """Copy the weights of a transformers model in memory.

        `options` are those of `packvit.load`; device and dtype are by default the model's own.

        Raises: CheckpointError if it is not a vision model of this family.
        """
        check_family(cls)
        checkpoint = read_model(model)
        first = next(model.parameters())
        chosen = LoadOptions(**{"device": first.device, "dtype": first.dtype, **options})
        return cls.from_checkpoint(checkpoint, chosen)

    @classmethod
    def from_checkpoint(
        cls: type[AnyEncoder], checkpoint: Checkpoint, options: LoadOptions
    ) -> AnyEncoder:
        """Build the encoder that a checkpoint describes and fill in every one of its weights.

        Raises: CheckpointError saying what is wrong with the checkpoint; ValueError for an option
        that cannot be taken here.
        """
        described = describe(cls.family, checkpoint)
        encoder, found = build(cls, described, checkpoint, options)
        encoder.carried, encoder.skipped = found.carried, found.skipped
        encoder.origin = saving.Origin(checkpoint.config, described.config)
        # A model in memory is copied, and must not be kept alive by its copy.
        encoder.checkpoint = checkpoint if checkpoint.files else None
        resolve(options.attention, encoder.attention_inputs)  # refused here, not in a forward
        encoder.switch_on(options)
        return encoder

    def switch_on(self, options: LoadOptions) -> None:
        """Make all later forwards run in 8 bits, invariant or compiled, as `options` say.

        Raises: ValueError for 8 bits that cannot run here.
        """
        if options.fp8:
            assert self.fast is not None
            self.fast.to_int8(self, self.encoder)
        if options.invariant:
            make_invariant(self)
        if options.compile:
            for block in self.encoder.blocks():
                block.compile(dynamic=True)  # one after another, so that all share one compilation
        self.fp8, self.invariant, self.compiled = options.fp8, options.invariant, options.compile

    def _apply(
        self: AnyEncoder, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AnyEncoder:
        """Move or cast the encoder. Raises: ValueError for a cast of what is in 8 bits."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device) if self.fp8 else None
        if probe is not None and (asked := fn(probe).dtype) != self.dtype:
            raise ValueError(
                f"This encoder was loaded with fp8=True, which computes beside {self.dtype}, and "
                f"was to be cast to {asked}. Load it without fp8 for that."
            )
        return super()._apply(fn, recurse)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        layout: LayoutName = "transformers",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write config.json and model.safetensors in a published layout, in the encoder's dtype.

        What was loaded in that dtype is written back bit for bit, what it carried unused too.
        `state_dict` are the weights where the encoder's own are sharded over processes.

        Raises: ValueError for a layout that the family does not have, or weights in 8 bits.
        """
        if self.fp8:
            raise ValueError(
                "This encoder was loaded with fp8=True, and its rounded weights are no checkpoint. "
                "Load it without fp8 to save it."
            )
        saving.write(
            folder,
            self.family,
            layout,
            self.config,
            self.state_dict() if state_dict is None else state_dict,
            self.carried,
            origin=self.origin,
            patch_order=self.patch_order,
            preprocessor=self.checkpoint.preprocessor if self.checkpoint else None,
        )
