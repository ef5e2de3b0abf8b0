"""Inputs to prepared images, in worker processes that never import torch."""
