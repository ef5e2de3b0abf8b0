"""Packs: where their sequences begin and end, what goes in and comes out, how they are planned."""
