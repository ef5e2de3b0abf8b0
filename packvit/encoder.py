"""The encoder: one forward for all images of a pack.

This is the public API: it checks its arguments and reports errors to the user; the modules it calls
trust what they are given. cu_seqlens and patch places are computed here, once, on the host.
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import pretrained
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import Family
from packvit.config import EncoderConfig, ImageConfig, PatchOrder, SinCos
from packvit.fast.blocks import choose_blocks
from packvit.fast.graphs import Graphs
from packvit.images.decode import Source
from packvit.images.patches import Resize
from packvit.loading import AnyEncoder, fill
from packvit.model.attention import AttentionInputs, Backend, opaque, resolve
from packvit.model.embeddings import PatchEmbeddings, normalize, rotary_cos_sin
from packvit.model.layers import Blocks
from packvit.model.linear import Linear
from packvit.model.memory import peak
from packvit.model.norms import norm
from packvit.model.pooling import pooling_head
from packvit.model.positions import sine_cosine
from packvit.options import GridPolicy, Options
from packvit.packs.features import Features, Pack, make_pack
from packvit.packs.segments import (
    Grid,
    PatchPlaces,
    PrefixPlaces,
    Segments,
    frame_table,
    read_grid,
    segment_images,
    sequence_lengths,
    to_device,
)


class Ran(NamedTuple):
    """What a run through the blocks leaves behind for pooling and bookkeeping."""

    tokens: Tensor  # [T, D], of the patches
    prefix: Tensor  # [S, R, D]
    taps: dict[int, Tensor]
    grid: Grid
    lengths: tuple[int, ...]  # tokens of each sequence
    backend: Backend


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, which is where kernels that are no operators of torch launch."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if on_gpu else nullcontext()


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
        if not isinstance(config, EncoderConfig):
            name = type(self).__name__
            raise TypeError(
                f"{name} is built from an EncoderConfig, not from {config!r}. To load a checkpoint "
                f"write {name}.from_pretrained(name_or_folder), or packvit.load(name_or_folder)."
            )
        self.config = config
        self.images = images
        self.patch_order: PatchOrder = patch_order
        self.backend = attention
        self.checkpoint: Checkpoint | None = None  # where the weights came from
        self.graphs: Graphs | None = Graphs()  # None: none are made
        self.fp8 = self.invariant = self.compiled = False
        self.carried: Mapping[str, Tensor] = {}  # a checkpoint's tensors that nothing here uses
        self.skipped: tuple[str, ...] = ()  # its names left unread, of another tower's tensors
        self.embeddings = PatchEmbeddings(config, interpolate=positions == "interpolate")
        self.encoder = Blocks(config)
        self.norm = norm(config)
        self.head = pooling_head(config)
        shared = config.projection
        self.projection = Linear(config.width, shared, bias=False) if shared else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.patches.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, and so the tokens, are made of."""
        return self.embeddings.patches.weight.dtype

    @property
    def attention(self) -> str:
        """The name of the attention backend that inference would take now."""
        return resolve(self.backend, self.attention_inputs).name

    @property
    def attention_inputs(self) -> AttentionInputs:
        """What decides which attention backends can run."""
        kind = self.device.type
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else self.dtype
        return AttentionInputs(self.device, dtype, self.config.head_dim)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        """Return the tokens of every patch of the pack: the reference's `last_hidden_state`.

        Patches stand image after image, in raster order, each flattened in the order (row, column,
        channel), or as `patch_order` said. uint8 patches are raw pixels, normalised here in fp32;
        floating point ones are already normalised and are cast to the encoder's dtype. Every frame
        is a sequence of its own.

        Shapes: hidden_states [T, P], grid_thw [N, 3] integers (frames, rows, columns), best kept
        on the host -> [T, D] in the encoder's dtype, T being the sum of frames * rows * columns.
        Raises: TypeError for other dtypes; ValueError if shapes, device or grid do not fit.
        """
        with current(self.device):
            return self.run(hidden_states, grid_thw).tokens

    def encode(
        self,
        hidden_states: Tensor,
        grid_thw: Tensor,
        *,
        taps: Sequence[int] = (),
        projected: bool = False,
        projection: bool | None = None,
    ) -> Features:
        """Return all outputs of the encoder for a pack; `forward` describes the arguments.

        `taps` names layers, negative ones from the end, whose patch tokens are wanted as they
        leave the block, before any final norm. `projected` asks for the pooled vectors in the
        space shared with text. Only outputs that were asked for are kept. `projection` is the
        old name of `projected` and warns.

        Raises: as `forward`; ValueError for a layer that is not there, or a projection that the
        checkpoint does not have.
        """
        if projection is not None:
            warnings.warn(
                "encode(projection=...) was renamed: write projected=... instead.",
                DeprecationWarning,
                stacklevel=2,
            )
            projected = projection
        if projected and self.projection is None:
            raise ValueError(
                f"projected=True asks for a space shared with text, but this {self.family.name} "
                "checkpoint has no projection. Use `pooled`."
            )
        asked = [self.check_layer(layer) for layer in taps]
        with current(self.device):
            ran = self.run(hidden_states, grid_thw, asked)
            pooled = self.pool(ran)
        return Features(
            tokens=ran.tokens,
            prefix=ran.prefix,
            pooled=pooled,
            projected=self.projection(pooled) if projected and self.projection else None,
            taps=ran.taps,
            segment_image=to_device(segment_images(ran.grid), self.device),
            grid=ran.grid,
        )

    def run(self, hidden_states: Tensor, grid_thw: Tensor, taps: Collection[int] = ()) -> Ran:
        """Check what came in, embed it, run the blocks, norm, and part prefixes from patches."""
        self.check_patches(hidden_states)
        config, device = self.config, self.device
        grid = read_grid(grid_thw, patches=len(hidden_states))
        lengths = sequence_lengths(grid, config.prefix)
        places = (
            PrefixPlaces.from_grid(grid, config.prefix, device=device) if config.prefix else None
        )
        backend = resolve(self.backend, self.attention_inputs)
        if self.compiled:
            backend = opaque(backend)

        values = self.to_values(hidden_states)
        table = axis = None
        if isinstance(config.positions, SinCos) and places is None:
            rows, table, axis = [values], frame_table(grid), self.embeddings.axis(grid)
        else:
            stream = self.embeddings(values, grid, places)
            rows = [stream, *(rotary_cos_sin(config, grid, places, stream) or ())]
        work = partial(self.compute, grid, axis, backend, taps)
        eager = self.training or self.compiled
        if self.graphs is not None and not eager and self.graphs.serve(rows[0], backend):
            bound = peak(config, self.dtype.itemsize, taps=len(taps))
            stream, tapped = self.graphs(
                work, rows, table, lengths, backend, taps, owner=self, held=axis, peak=bound
            )
        else:
            frames = None if table is None else to_device(table, device)
            stream, tapped = work(rows, frames, Segments.from_lengths(lengths, device=device))
        if places is None:
            prefix = stream.new_empty(len(lengths), 0, config.width)
            return Ran(stream, prefix, tapped, grid, lengths, backend)
        return Ran(
            stream.index_select(0, places.patches),
            stream.index_select(0, places.prefix).unflatten(0, (-1, config.prefix)),
            {layer: tap.index_select(0, places.patches) for layer, tap in tapped.items()},
            grid,
            lengths,
            backend,
        )

    def compute(
        self,
        grid: Grid,
        axis: Tensor | None,
        backend: Backend,
        taps: Collection[int],
        rows: Sequence[Tensor],
        table: Tensor | None,
        segments: Segments,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the normed stream, and taps: what the device does once the host has planned.

        `rows` are patches, where `axis` and `table` tell their places, or else the embedded stream,
        with the cosines and sines of rotary positions.
        """
        stream, *rotary = rows
        if axis is not None and table is not None:
            sines = sine_cosine(axis, PatchPlaces.from_table(table, len(stream)))
            stream = self.embeddings(stream, grid, None, sines)
        run = choose_blocks(self.encoder, stream)
        stream, tapped = run(stream, segments, tuple(rotary) or None, backend, taps)
        return self.norm(stream) if self.config.final_norm == "tokens" else stream, tapped

    def train(self: AnyEncoder, mode: bool = True) -> AnyEncoder:
        """Switch between training and inference, and forget the CUDA graphs."""
        if self.graphs is not None and mode != self.training:
            self.graphs.forget()
        return super().train(mode)

    def _apply(
        self: AnyEncoder, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AnyEncoder:
        """Move or cast; graphs read the weights where they were."""
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load weights, also of a model that this is part of; graphs read them where they were."""
        if self.graphs is not None:
            self.graphs.forget()
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def pool(self, ran: Ran) -> Tensor | None:
        """Return the checkpoint's one vector a sequence, or None where it has no word for one."""
        if self.config.pool == "class":
            first = ran.prefix[:, 0]
            return self.norm(first) if self.config.final_norm == "pooled" else first
        if self.head is None:
            return None
        segments = Segments.from_lengths(ran.lengths, device=self.device)
        return self.head(ran.tokens, segments, ran.backend)

    def pack(
        self,
        images: Sequence[Source],
        *,
        resize: Resize | None = None,
        max_patches: int | None = None,
    ) -> Pack:
        """Make one pack of paths, PIL images or uint8 arrays [height, width, 3].

        `resize` "checkpoint" does as the checkpoint's own preprocessing; "native" keeps the aspect
        ratio, rounds each side to the nearest patch, never enlarges beyond that, and shrinks to
        `max_patches` (1024 by default). None: "checkpoint" where that defines a size.

        Raises: ImageError with the index and the code of the first image that cannot be used.
        """
        return make_pack(
            images,
            self.images,
            resize=resize,
            max_patches=max_patches,
            patch_order=self.patch_order,
            device=self.device,
        )

    def check_layer(self, layer: int) -> int:
        """Return the number of a tapped layer, counted from the front."""
        if not -self.config.layers <= layer < self.config.layers:
            raise ValueError(
                f"taps asks for layer {layer}, but this encoder has {self.config.layers}: "
                f"0 to {self.config.layers - 1}, or -1 to {-self.config.layers} from the end."
            )
        return layer % self.config.layers

    def check_patches(self, hidden_states: Tensor) -> None:
        """Refuse what cannot be a pack's patches."""
        side = self.config.patch
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.config.patch_dim:
            raise ValueError(
                f"hidden_states is {list(hidden_states.shape)}, but must be "
                f"[total_patches, {self.config.patch_dim}]: flattened patches of {side} x {side} "
                "pixels and 3 channels. `encoder.pack(images)` makes them."
            )
        if hidden_states.dtype != torch.uint8 and not hidden_states.is_floating_point():
            raise TypeError(
                f"hidden_states holds {hidden_states.dtype}, but must be uint8 (raw pixels) or "
                "floating point (already normalised)."
            )
        if hidden_states.device != self.device:
            raise ValueError(
                f"hidden_states is on {hidden_states.device}, but the encoder is on {self.device}. "
                f'Move it: hidden_states.to("{self.device}").'
            )

    def to_values(self, hidden_states: Tensor) -> Tensor:
        """Return patches in the encoder's dtype, raw pixels normalised."""
        if hidden_states.dtype == torch.uint8:
            hidden_states = normalize(
                hidden_states,
                self.images.mean,
                self.images.std,
                channels_last=self.patch_order == "hwc",
            )
        return hidden_states.to(self.dtype)

    @classmethod
    def from_pretrained(
        cls: type[AnyEncoder],
        name_or_folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        revision: str | None = None,
        patch_order: PatchOrder = "hwc",
        positions: GridPolicy = "checkpoint",
        invariant: bool = False,
        compile: bool = False,
        fp8: bool = False,
    ) -> AnyEncoder:
        """Load a checkpoint of this family by its name on the hub, or from a folder.

        Takes what `packvit.load` takes, and refuses other families' checkpoints.

        Raises: CheckpointError saying what is wrong with the checkpoint.
        """
        checkpoint = checkpoints.read(name_or_folder, revision=revision)
        options = Options(device, dtype, attention, patch_order, positions, invariant, compile, fp8)
        return cls.from_checkpoint(checkpoint, options)

    @classmethod
    def from_transformers(
        cls: type[AnyEncoder],
        model: nn.Module,
        *,
        attention: str = "auto",
        patch_order: PatchOrder = "hwc",
        positions: GridPolicy = "checkpoint",
        invariant: bool = False,
        compile: bool = False,
        fp8: bool = False,
    ) -> AnyEncoder:
        """Copy the weights of a transformers model in memory, to its device, in its dtype.

        Raises: CheckpointError if it is not a vision model of this family.
        """
        checkpoint = pretrained.in_memory(model)
        first = next(model.parameters())
        options = Options(
            first.device,
            first.dtype,
            attention,
            patch_order,
            positions,
            invariant,
            compile,
            fp8,
        )
        return cls.from_checkpoint(checkpoint, options)

    @classmethod
    def from_checkpoint(
        cls: type[AnyEncoder], checkpoint: Checkpoint, options: "Options"
    ) -> AnyEncoder:
        """Build the encoder that a checkpoint describes and fill in every one of its weights."""
        with torch.inference_mode(False):  # so that it can be trained, wherever it is loaded
            return fill(cls, checkpoint, options)

    def save_pretrained(
        self, folder: str | os.PathLike[str], layout: pretrained.LayoutName = "transformers"
    ) -> None:
        """Write config.json and model.safetensors in a published layout, in the encoder's dtype.

        What was loaded in that dtype is written back bit for bit, what it carried unused too.

        Raises: ValueError for a layout that the family does not have, or weights in 8 bits.
        """
        if self.fp8:
            raise ValueError(
                "This encoder was loaded with fp8=True, and its rounded weights are no checkpoint. "
                "Load it without fp8 to save it."
            )
        pretrained.write(
            folder,
            self.family,
            layout,
            self.config,
            self.state_dict(),
            self.carried,
            patch_order=self.patch_order,
            preprocessor=self.checkpoint.preprocessor if self.checkpoint else None,
        )
