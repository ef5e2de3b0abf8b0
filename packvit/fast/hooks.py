"""Whether anything watches a module: then it must be called, and not stepped past."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_hooked(module: nn.Module) -> bool:
    """Return whether anything wants to see a module called, or has put its own `forward` there."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    watched = any((*hooks, module._backward_hooks, module._backward_pre_hooks))
    return bool(watched or "forward" in vars(module) or _has_any_global_hook())
