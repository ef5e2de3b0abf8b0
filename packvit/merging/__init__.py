"""Squares of neighbouring patches merged into one token: the public name of `model/merging.py`."""

from packvit.model.merging import Merging

__all__ = ["Merging"]
