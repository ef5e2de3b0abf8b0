"""The table of families: one module each, one line each."""

from packvit.encoder import Encoder
from packvit.families.aimv2 import AIMv2Packing

FAMILIES: tuple[type[Encoder], ...] = (AIMv2Packing,)
