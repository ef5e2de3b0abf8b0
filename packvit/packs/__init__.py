"""Packs: their segments, their inputs and outputs, and how they are planned."""
