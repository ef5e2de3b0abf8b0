"""Prose by hand, and the pages that `docs/generate.py` writes."""
