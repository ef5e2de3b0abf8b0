"""Vision encoders on packs: all patches of all images laid end to end, one forward, no padding.

Names resolve on first use, so `import packvit` and `packvit --help` never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packvit.attention import attend as attend
    from packvit.checkpoints import CheckpointError as CheckpointError
    from packvit.corpus.job import embed as embed
    from packvit.encoder import Encoder as Encoder
    from packvit.encoder import Features as Features
    from packvit.encoder import Pack as Pack
    from packvit.families.aimv2 import AIMv2Packing as AIMv2Packing
    from packvit.hub import load as load
    from packvit.images import ImageError as ImageError
    from packvit.packed import Segments as Segments
    from packvit.packing import plan_packs as plan_packs

__version__ = "0.1.0"

_HOMES = {
    "AIMv2Packing": "packvit.families.aimv2",
    "CheckpointError": "packvit.checkpoints",
    "Encoder": "packvit.encoder",
    "Features": "packvit.encoder",
    "ImageError": "packvit.images",
    "Pack": "packvit.encoder",
    "Segments": "packvit.packed",
    "attend": "packvit.attention",
    "embed": "packvit.corpus.job",
    "load": "packvit.hub",
    "plan_packs": "packvit.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"packvit has no attribute {name!r}. It offers: {', '.join(_HOMES)}.")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
