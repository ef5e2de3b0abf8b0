"""Whether anything watches a module: then it must be called, and not stepped past."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Return whether anything wants to see a module called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))
