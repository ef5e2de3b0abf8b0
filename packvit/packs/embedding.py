"""Images in, one vector each out: packs by a token budget, one after another."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from packvit.images.decode import load_image
from packvit.images.errors import ImageError
from packvit.images.patches import Cutting, Patches
from packvit.packs.features import Pack, check_list, join
from packvit.packs.planning import plan_packs


def embed_images(
    images: Sequence[object],
    run: Callable[[Pack], Tensor],
    cutting: Cutting,
    device: torch.device,
    *,
    width: int,
    token_budget: int,
    on_error: Callable[[int, ImageError], None] | None,
) -> np.ndarray:
    """Return what `run` makes of each image, one after another.

    An image that cannot be used is NaN, and `on_error` is called with its index.

    Shapes: run(pack of n images) -> [n, D = width]; -> float32 [N, D].
    Raises: ImageError with the index of the first image that cannot be used, without `on_error`.
    """
    check_list(images)
    waiting: dict[int, Patches] = {}  # by the image's place among those that can be used
    places: list[int] = []

    def lengths() -> Iterator[int]:
        for index, source in enumerate(images):
            try:
                cut = cutting.cut(load_image(source).image)
            except ImageError as error:
                error.index = index
                if on_error is None:
                    raise
                on_error(index, error)
                continue
            waiting[len(places)] = cut
            places.append(index)
            yield len(cut.patches)

    vectors = np.full((len(images), width), np.nan, np.float32)
    for pack in plan_packs(lengths(), token_budget):
        found = run(join([waiting.pop(image) for image in pack], device))
        vectors[[places[image] for image in pack]] = found.cpu().numpy()
    return vectors
