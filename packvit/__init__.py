"""Vision encoders on packs: all patches of all images laid end to end, one forward, no padding.

Names resolve on first use, so `import packvit` and `packvit --help` never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from packvit import version

if TYPE_CHECKING:
    from packvit.attention import attend as attend
    from packvit.checkpoints import CheckpointError as CheckpointError
    from packvit.corpus.job import embed as embed
    from packvit.encoder import Encoder as Encoder
    from packvit.families.aimv2 import AIMv2Packing as AIMv2Packing
    from packvit.families.clip import ClipPacking as ClipPacking
    from packvit.families.dinov2 import Dinov2Packing as Dinov2Packing
    from packvit.families.dinov3 import DINOv3ViTPacking as DINOv3ViTPacking
    from packvit.families.siglip import SiglipPacking as SiglipPacking
    from packvit.families.siglip2 import Siglip2NaflexPacking as Siglip2NaflexPacking
    from packvit.features import Features as Features
    from packvit.features import Pack as Pack
    from packvit.hub import load as load
    from packvit.images import ImageError as ImageError
    from packvit.packed import Segments as Segments
    from packvit.packing import plan_packs as plan_packs

__version__ = version.VERSION

_HOMES = {
    "AIMv2Packing": "packvit.families.aimv2",
    "CheckpointError": "packvit.checkpoints",
    "ClipPacking": "packvit.families.clip",
    "DINOv3ViTPacking": "packvit.families.dinov3",
    "Dinov2Packing": "packvit.families.dinov2",
    "Encoder": "packvit.encoder",
    "Features": "packvit.features",
    "ImageError": "packvit.images",
    "Pack": "packvit.features",
    "Segments": "packvit.packed",
    "Siglip2NaflexPacking": "packvit.families.siglip2",
    "SiglipPacking": "packvit.families.siglip",
    "attend": "packvit.attention",
    "embed": "packvit.corpus.job",
    "load": "packvit.hub",
    "plan_packs": "packvit.packing",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] # resolved on first use


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"packvit has no attribute {name!r}. It offers: {', '.join(_HOMES)}.")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
