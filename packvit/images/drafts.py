"""Decode a JPEG at a half, a quarter or an eighth of its size, where a resize needs no more.

libjpeg skips what smaller pixels do not show, which is most of the work of a large photograph. The
result is not that of decoding the whole: `benchmarks/drafts.py` says how far apart they are.
"""

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from packvit.images.decode import Opened, read_turn
from packvit.images.errors import ImageError
from packvit.images.patches import Cutting, Whole
from packvit.images.turns import FLIPPED_COLUMNS, FLIPPED_ROWS, TRANSPOSED

MARGIN = 2  # a draft has at least so many pixels for each one that it is resized to, along a side
SCALES = (8, 4, 2)


def draft(opened: Opened, cutting: Cutting, margin: float = MARGIN) -> Whole | None:
    """Have an opened JPEG decoded smaller if it is far larger than what it is resized to.

    Returns the photograph that the decoded image is a draft of; None if it is decoded whole.
    """
    image = opened.image
    if image.format != "JPEG" or not isinstance(image, JpegImageFile):
        return None
    turn, _ = read_turn(image)
    width, height = image.size
    upright = (width, height) if turn in TRANSPOSED else (height, width)
    try:
        size = cutting.resized(*upright)
    except ImageError:  # to be said of the decoded image, which may be found broken before
        return None
    larger = min(upright[0] / size[0], upright[1] / size[1])
    scale = next((scale for scale in SCALES if larger >= margin * scale), None)
    if scale is None or not image.draft(None, (width // scale, height // scale)):
        return None
    return Whole(*upright, turned(image.size, (width / scale, height / scale), turn))


def turned(
    size: tuple[int, int], shown: tuple[float, float], turn: Image.Transpose | None
) -> tuple[float, float, float, float]:
    """Return the part of a turned draft that shows the photograph: (left, top, right, bottom).

    A draft's last column and row are of what the photograph has for them, which may be less than a
    whole pixel; `size` and `shown` are (width, height) of all and of that part, as stored.
    """
    width, height = (round_up - part for round_up, part in zip(size, shown, strict=True))
    left, right = (width, 0.0) if turn in FLIPPED_COLUMNS else (0.0, width)
    top, bottom = (height, 0.0) if turn in FLIPPED_ROWS else (0.0, height)
    across, down = size
    if turn in TRANSPOSED:
        left, top, right, bottom, across, down = top, left, bottom, right, down, across
    return left, top, across - right, down - bottom
