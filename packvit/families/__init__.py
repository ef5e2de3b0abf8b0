"""The table of families: one module each, one line each."""

from packvit.encoder import Encoder
from packvit.families.aimv2 import AIMv2Packing
from packvit.families.clip import ClipPacking
from packvit.families.dinov2 import Dinov2Packing
from packvit.families.dinov3 import DINOv3ViTPacking
from packvit.families.kimi_k25 import KimiK25VisionPacking
from packvit.families.onevision import OneVisionEncoderPacking
from packvit.families.perception import PerceptionPacking
from packvit.families.qwen2_5_vl import Qwen25VisionTransformerPacking
from packvit.families.qwen2_vl import Qwen2VisionTransformerPacking
from packvit.families.qwen3_vl import Qwen3VLVisionPacking
from packvit.families.radio import RadioPacking
from packvit.families.siglip import SiglipPacking
from packvit.families.siglip2 import Siglip2NaflexPacking
from packvit.families.tipsv2 import Tipsv2VisionPacking

FAMILIES: tuple[type[Encoder], ...] = (
    AIMv2Packing,
    Siglip2NaflexPacking,
    DINOv3ViTPacking,
    Dinov2Packing,
    SiglipPacking,
    ClipPacking,
    Qwen3VLVisionPacking,
    Qwen25VisionTransformerPacking,
    Qwen2VisionTransformerPacking,
    KimiK25VisionPacking,
    RadioPacking,
    Tipsv2VisionPacking,
    PerceptionPacking,
    OneVisionEncoderPacking,
)
