"""Vision encoders on packs: all patches of all images laid end to end, one forward, no padding.

Names resolve on first use, so `import packvit` and `packvit --help` never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from packvit import version

if TYPE_CHECKING:
    from packvit.checkpoints.errors import CheckpointError as CheckpointError
    from packvit.corpus.batches import Embedder as Embedder
    from packvit.corpus.folder.merging import merge as merge
    from packvit.corpus.folder.reader import FeatureFolder as FeatureFolder
    from packvit.corpus.folder.reader import read as read
    from packvit.corpus.job import embed as embed
    from packvit.encoder import Encoder as Encoder
    from packvit.families.aimv2 import AIMv2Packing as AIMv2Packing
    from packvit.families.clip import ClipPacking as ClipPacking
    from packvit.families.dinov2 import Dinov2Packing as Dinov2Packing
    from packvit.families.dinov3 import DINOv3ViTPacking as DINOv3ViTPacking
    from packvit.families.kimi_k25 import KimiK25VisionPacking as KimiK25VisionPacking
    from packvit.families.onevision import OneVisionEncoderPacking as OneVisionEncoderPacking
    from packvit.families.perception import PerceptionPacking as PerceptionPacking
    from packvit.families.qwen2_5_vl import (
        Qwen25VisionTransformerPacking as Qwen25VisionTransformerPacking,
    )
    from packvit.families.qwen2_vl import (
        Qwen2VisionTransformerPacking as Qwen2VisionTransformerPacking,
    )
    from packvit.families.qwen3_vl import Qwen3VLVisionPacking as Qwen3VLVisionPacking
    from packvit.families.radio import RadioPacking as RadioPacking
    from packvit.families.siglip import SiglipPacking as SiglipPacking
    from packvit.families.siglip2 import Siglip2NaflexPacking as Siglip2NaflexPacking
    from packvit.families.tipsv2 import Tipsv2VisionPacking as Tipsv2VisionPacking
    from packvit.hub import load as load
    from packvit.images.errors import ImageError as ImageError
    from packvit.model.attention import attend as attend
    from packvit.packs.features import Features as Features
    from packvit.packs.features import Pack as Pack
    from packvit.packs.planning import plan_packs as plan_packs
    from packvit.packs.segments import Segments as Segments
    from packvit.retrieval.search import search as search
    from packvit.text.encoder import TextEncoder as TextEncoder
    from packvit.text.loading import load_text as load_text
    from packvit.towers.replacing import replace_tower as replace_tower
    from packvit.towers.replacing import restore_tower as restore_tower

__version__ = version.VERSION

_HOMES = {
    "AIMv2Packing": "packvit.families.aimv2",
    "CheckpointError": "packvit.checkpoints.errors",
    "ClipPacking": "packvit.families.clip",
    "DINOv3ViTPacking": "packvit.families.dinov3",
    "Dinov2Packing": "packvit.families.dinov2",
    "Embedder": "packvit.corpus.batches",
    "Encoder": "packvit.encoder",
    "FeatureFolder": "packvit.corpus.folder.reader",
    "Features": "packvit.packs.features",
    "ImageError": "packvit.images.errors",
    "KimiK25VisionPacking": "packvit.families.kimi_k25",
    "OneVisionEncoderPacking": "packvit.families.onevision",
    "Pack": "packvit.packs.features",
    "PerceptionPacking": "packvit.families.perception",
    "Qwen25VisionTransformerPacking": "packvit.families.qwen2_5_vl",
    "Qwen2VisionTransformerPacking": "packvit.families.qwen2_vl",
    "RadioPacking": "packvit.families.radio",
    "Qwen3VLVisionPacking": "packvit.families.qwen3_vl",
    "Segments": "packvit.packs.segments",
    "Siglip2NaflexPacking": "packvit.families.siglip2",
    "SiglipPacking": "packvit.families.siglip",
    "Tipsv2VisionPacking": "packvit.families.tipsv2",
    "TextEncoder": "packvit.text.encoder",
    "attend": "packvit.model.attention",
    "embed": "packvit.corpus.job",
    "load": "packvit.hub",
    "load_text": "packvit.text.loading",
    "merge": "packvit.corpus.folder.merging",
    "plan_packs": "packvit.packs.planning",
    "read": "packvit.corpus.folder.reader",
    "replace_tower": "packvit.towers.replacing",
    "restore_tower": "packvit.towers.replacing",
    "search": "packvit.retrieval.search",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] # resolved on first use


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"packvit has no attribute {name!r}. It offers: {', '.join(_HOMES)}.")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
