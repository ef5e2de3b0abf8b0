"""Images in, one vector each out: packs by a token budget, one after another."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from packvit.config import check_choice
from packvit.images.decode import load_image
from packvit.images.errors import ImageError
from packvit.images.patches import Cutting, Patches
from packvit.packs.features import Pack, check_list, join
from packvit.packs.planning import plan_packs

# What to do about an image that cannot be used; its row is NaN, unless it is raised.
OnError = Literal["raise", "nan"] | Callable[[int, ImageError], object]


def embed_images(
    images: Sequence[object],
    run: Callable[[Pack], Tensor],
    cutting: Cutting,
    device: torch.device,
    *,
    width: int,
    token_budget: int,
    errors: OnError,
) -> np.ndarray:
    """Return what `run` makes of each image, one after another.

    Shapes: run(pack of n images) -> [n, D = width]; -> float32 [N, D].
    Raises: ImageError with the index of the first image that cannot be used, where `errors` is
    "raise".
    """
    if not callable(errors):
        check_choice("errors", errors, ("raise", "nan"))
    check_list(images)
    waiting: dict[int, Patches] = {}  # by the image's place among those that can be used
    places: list[int] = []

    def lengths() -> Iterator[int]:
        for index, source in enumerate(images):
            try:
                cut = cutting.cut(load_image(source).image)
            except ImageError as error:
                error.index = index
                if errors == "raise":
                    raise
                if callable(errors):
                    errors(index, error)
                continue
            waiting[len(places)] = cut
            places.append(index)
            yield len(cut.patches)

    vectors = np.full((len(images), width), np.nan, np.float32)
    for pack in plan_packs(lengths(), token_budget):
        found = run(join([waiting.pop(image) for image in pack], device))
        vectors[[places[image] for image in pack]] = found.cpu().numpy()
    return vectors
