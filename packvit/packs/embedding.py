"""Images in, one vector each out: packs by a token budget, one after another."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from packvit.images.decode import ImageError, Source, load_image
from packvit.images.patches import Cutting, Patches
from packvit.packs.features import Pack, check_list, join
from packvit.packs.planning import plan_packs


def embed_images(
    images: Sequence[Source],
    run: Callable[[Pack], Tensor],
    cutting: Cutting,
    device: torch.device,
    *,
    width: int,
    token_budget: int,
    skip_errors: bool,
) -> np.ndarray:
    """Return what `run` makes of each image, one after another; NaN for those that are skipped.

    Shapes: run(pack of n images) -> [n, D = width]; -> float32 [N, D].
    Raises: ImageError with the index of the first image that cannot be used, unless `skip_errors`.
    """
    check_list(images)
    waiting: dict[int, Patches] = {}  # by the image's place among those that can be used
    places: list[int] = []

    def lengths() -> Iterator[int]:
        for index, source in enumerate(images):
            try:
                cut = cutting.cut(load_image(source).image)
            except ImageError as error:
                if skip_errors:
                    continue
                error.index = index
                raise
            waiting[len(places)] = cut
            places.append(index)
            yield len(cut.patches)

    vectors = np.full((len(images), width), np.nan, np.float32)
    for pack in plan_packs(lengths(), token_budget):
        found = run(join([waiting.pop(image) for image in pack], device))
        vectors[[places[image] for image in pack]] = found.cpu().numpy()
    return vectors
