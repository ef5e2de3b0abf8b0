"""Read, decode, resize and cut inputs in worker processes that never import torch."""
