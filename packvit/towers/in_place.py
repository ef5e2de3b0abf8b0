"""An encoder that is called as the vision tower of a transformers model is."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packvit.encoder import Encoder


class TowerInPlace(nn.Module):
    """An encoder with the attributes that models ask their towers for."""

    def __init__(self, encoder: Encoder, tower: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = tower.config
        self.theirs: type[Any] = type(tower)  # what `restore_tower` loads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models cast pixels to."""
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        """The device that models move pixels to."""
        return self.encoder.device

    @property
    def patch_size(self) -> int:
        """Pixels along the side of a patch."""
        return self.encoder.config.patch

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Refuse a model that reads what is not there.

        Raises: ValueError.
        """


class PatchTower(TowerInPlace):
    """A tower of Qwen's: patches in squares of the merger, square after square, and their grid."""

    @property
    def spatial_merge_size(self) -> int:
        """Patches along the side of a merged token."""
        assert self.encoder.config.merger
        return self.encoder.config.merger.side

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **unused: Any) -> Any:
        """Return `pooler_output`, the merged tokens, and `deepstack_features` where there are any.

        `last_hidden_state` stands square after square, as patches came. `unused` are what the
        reference may be given to spare it work: cu_seqlens, positions.

        Shapes: hidden_states [T, P], grid_thw [N, 3] -> merged [M, L], tokens [T, D].
        """
        grid = grid_thw.tolist()  # once a forward, as in the reference
        raster = torch.cat([square_order(*image, side=self.spatial_merge_size) for image in grid])
        sizes = np.array([t * h * w for t, h, w in grid])
        raster += torch.from_numpy(np.repeat(sizes.cumsum() - sizes, sizes))
        raster = raster.to(hidden_states.device, non_blocking=True)
        patches = torch.empty_like(hidden_states)
        patches[raster] = hidden_states
        found = self.encoder.encode(patches, grid, merged=True, pooled=False)
        tokens = found.tokens.index_select(0, raster)
        if not found.deepstack:
            return output(last_hidden_state=tokens, pooler_output=found.merged)
        outputs = import_module(self.theirs.__module__).BaseModelOutputWithDeepstackFeatures
        return outputs(
            last_hidden_state=tokens,
            pooler_output=found.merged,
            deepstack_features=[found.deepstack[layer] for layer in sorted(found.deepstack)],
        )


def output(**parts: Any) -> Any:
    """Return the output of a tower of transformers."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(**parts)


def square_order(frames: int, rows: int, columns: int, *, side: int) -> Tensor:
    """Return the place in raster order of each patch of an image, square after square.

    Source: transformers 5.17, `get_vision_position_ids` in vision_utils.py.
    """
    places = torch.arange(frames * rows * columns, dtype=torch.int64, device="cpu")
    squares = places.view(frames, rows // side, side, columns // side, side)
    return squares.transpose(2, 3).flatten()


class BatchTower(TowerInPlace):
    """CLIP's or SigLIP's tower: a batch of pixels in, the tokens of some layers out."""

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Refuse a model that reads the class tokens of a layer, which we do not keep.

        Raises: ValueError.
        """
        config: Any = getattr(model, "config", None)
        if getattr(config, "vision_feature_select_strategy", "default") != "default":
            tower = getattr(config, "vision_config", None)
            if getattr(tower, "model_type", "") == "clip_vision_model":
                raise ValueError(
                    'The model reads class tokens (vision_feature_select_strategy "full"), which '
                    'our encoders do not keep for each layer. Load it with "default".'
                )

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **unused: Any,
    ) -> Any:
        """Return `last_hidden_state`, `pooler_output`, and of `hidden_states` those asked for.

        The class tokens in `hidden_states` are zeros: models leave them out. What enters block 0,
        and since transformers 5.24 every layer that the model does not name, is None.

        Shapes: pixel_values [N, 3, height, width] -> tokens [N, prefix + rows * columns, D].
        """
        side, config = self.patch_size, self.encoder.config
        images, _, height, width = pixel_values.shape
        rows, columns = height // side, width // side
        squares = pixel_values[:, :, : rows * side, : columns * side]
        squares = squares.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        patches = squares.permute(0, 2, 4, 1, 3, 5).reshape(images * rows * columns, -1)
        taps = layers_asked_for(output_hidden_states, config.layers)
        found = self.encoder.encode(patches, [(1, rows, columns)] * images, taps=taps)

        def whole(tokens: Tensor) -> Tensor:
            return tokens.unflatten(0, (images, -1))

        prefix = found.prefix
        blank = torch.zeros_like(prefix)
        hidden: list[Tensor | None] = [None] * (config.layers + 1)
        for layer in taps:
            hidden[layer + 1] = torch.cat([blank, whole(found.taps[layer])], 1)
        return output(
            last_hidden_state=torch.cat([prefix, whole(found.tokens)], 1),
            pooler_output=found.pooled,
            hidden_states=tuple(hidden) if taps else None,
        )


def layers_asked_for(asked: bool | int | Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the blocks whose tokens a model of transformers asks for, from 0 on.

    Its numbers count from what enters block 0, or from the end.

    Raises: ValueError for what enters block 0.
    """
    if asked is None or isinstance(asked, bool):
        return tuple(range(layers)) if asked else ()
    numbers = [asked] if isinstance(asked, int) else asked
    places = sorted({number % (layers + 1) for number in numbers})
    if places and places[0] == 0:
        raise ValueError(
            "The model reads what enters the tower's first block (layer 0), which our encoders do "
            "not keep. Name another layer, or call packvit.restore_tower first."
        )
    return tuple(place - 1 for place in places)
