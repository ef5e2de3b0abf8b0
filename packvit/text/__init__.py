"""Text towers: the half of a checkpoint that `packvit.load` skips.

loading.py reads one; encoder.py is its forward, packs.py what that takes and gives, towers.py the
table of what there is, tokenizing.py the checkpoint's own way from words to ids.
"""

from packvit.text.loading import load_text as load_text
