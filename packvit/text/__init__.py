"""Text towers: the half of a checkpoint that `packvit.load` skips.

`packvit.load_text` (loading.py) reads one; encoder.py is its forward on packs of texts, towers.py
the table of what there is, tokenizing.py the checkpoint's own way from words to ids.
"""

from packvit.text.loading import load_text as load_text
