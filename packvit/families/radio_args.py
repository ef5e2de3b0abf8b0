"""C-RADIO's config.json as its authors publish it: `args` of training, read as RadioConfig's.

Source: NVlabs/RADIO of 2026-05, hf_model.py, radio_model.py, cls_token.py, extra_timm_models.py.
"""

from typing import Any

from packvit.checkpoints.config_json import Json, entry
from packvit.checkpoints.errors import CheckpointError

# By the name that timm or the authors gave an architecture: width, blocks, heads, width of the MLP.
ARCHITECTURES = {
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
    "vit_giant_patch16_224": (1536, 40, 24, 6144),
    "vit_so400m_patch16_224": (1152, 27, 16, 4304),
    "vit_so400m_v2_patch16_224": (1152, 27, 16, 4320),
}
UNKNOWN = (  # what would change outputs without a tensor that shows it
    "feature_normalizer_config",
    "vitdet_window_size",
)


def entries_of(config: Json) -> dict[str, Any]:
    """Return the entries of transformers' RadioConfig that say what the authors' `args` do.

    Raises: CheckpointError for what no published ViT of theirs has.
    """
    args = entry(config, "args", dict)
    name = entry(args, "model", str)
    teachers = entry(args, "teachers", list)
    more = {key: value for key in UNKNOWN if (value := config.get(key)) is not None}
    more |= {key: value for key in ("model_norm", "model_kwargs") if (value := args.get(key))}
    if name not in ARCHITECTURES or more or not all(isinstance(each, dict) for each in teachers):
        said = {"model": name, **more}
        raise CheckpointError(
            f'"args" in config.json describe {said}; packvit knows {", ".join(ARCHITECTURES)}, '
            "with nothing changed in them."
        )
    width, layers, heads, mlp = ARCHITECTURES[name]
    tokens = 1
    if entry(args, "cls_token_per_teacher", bool, False):
        tokens = len({entry(each, "name", str) for each in teachers})
    multiple = args.get("register_multiple") or 0
    registers = args.get("cpe_num_registers") or (multiple and multiple - tokens % multiple)
    patch = entry(config, "patch_size", int, 16)
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mlp_ratio": mlp / width,
        "patch_size": patch,
        "max_img_size": round(entry(args, "cpe_max_size", int) / patch) * patch,
        "num_cls_tokens": tokens,
        "num_registers": registers,
        "summary_idxs": [i for i, each in enumerate(teachers) if each.get("use_summary", True)],
    }
