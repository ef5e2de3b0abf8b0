"""What is said of the images of a pack, by an encoder or its reference."""

from collections.abc import Mapping, Sequence

from torch import Tensor

# The outputs of an encoder for each image of a pack, by kind.
# Shapes: tokens [patches, D], taps [layers, patches, D]; of each frame: prefix [R, D], pooled [D],
# projected [E]; of each square: merged [squares, L], deepstack [layers, squares, L].
Answers = Mapping[str, Sequence[Tensor]]
PER_FRAME = ("prefix", "pooled", "projected")
PER_SQUARE = ("merged", "deepstack")
