"""C-RADIO's config.json: transformers' RadioConfig, or `args` of training, as its authors publish.

Source: transformers 5.17, models/radio; NVlabs/RADIO of 2026-05 (c0f3701), hf_model.py,
radio_model.py, cls_token.py, extra_timm_models.py, enable_cpe_support.py.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, entry
from packvit.checkpoints.errors import CheckpointError
from packvit.config import CLIP_STATISTICS, EncoderConfig, Summary, Table
from packvit.families.dinov2_blocks import read_blocks, write_blocks

# By the name that timm or the authors gave an architecture: width, blocks, heads, width of the MLP.
ARCHITECTURES = {
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
    "vit_giant_patch16_224": (1536, 40, 24, 6144),
    "vit_so400m_patch16_224": (1152, 27, 16, 4304),
    "vit_so400m_v2_patch16_224": (1152, 27, 16, 4320),
}
SIDE = 224  # of the images of all of them, in pixels
STATISTICS = {"norm_mean": list(CLIP_STATISTICS[0]), "norm_std": list(CLIP_STATISTICS[1])}
# All ones in published checkpoints, which leave them out.
FIRST_SCALE = "radio_model.model.blocks.0.layer_scale1.lambda1"
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
    table = entry(args, "cpe_max_size", int)
    if table == SIDE:  # which has the table cropped, and never resized
        more["cpe_max_size"] = table
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
        "max_img_size": round(table / patch) * patch,
        "num_cls_tokens": tokens,
        "num_registers": registers,
        "summary_idxs": [i for i, each in enumerate(teachers) if each.get("use_summary", True)],
    }


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json; the names say whether there are scales.

    Raises: CheckpointError for class tokens, statistics or scales that no published model has.
    """
    if "args" in config and "hidden_size" not in config:
        config = entries_of(config)
    blocks = read_blocks({"patch_size": 16, **config}, width=1280, layers=32, heads=16)
    side = entry(config, "max_img_size", int, 2048) // blocks["patch"]
    tokens = entry(config, "num_cls_tokens", int, 3)
    registers = entry(config, "num_registers", int, 7)
    chosen = entry({"summary_idxs": [0, 1], **config}, "summary_idxs", (list, tuple))
    if not chosen or not all(type(x) is int and x in range(tokens) for x in chosen):
        raise CheckpointError(
            f'config.json says "summary_idxs": {chosen}, which are none of {tokens} class tokens.'
        )
    for name, known in STATISTICS.items():
        if list(entry({name: known, **config}, name, (list, tuple))) != known:
            raise CheckpointError(
                f'config.json says "{name}": {config[name]}; packvit knows CLIP\'s, {known}.'
            )
    scaled = FIRST_SCALE in names
    if not scaled and entry(config, "layerscale_value", float, 1.0) != 1.0:
        raise CheckpointError(
            f'config.json says "layerscale_value": {config["layerscale_value"]}, but there are no '
            "tensors of scales, and without them packvit knows 1."
        )
    return EncoderConfig(
        **blocks,
        positions=Table(side, side, "square_then_crop", any_grid=True),
        patch_bias=False,
        layer_scale=scaled,
        registers=tokens + registers,
        final_norm=None,
        pool="class",
        summary=Summary(tokens, tuple(chosen)),
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' RadioConfig."""
    table, summary = config.positions, config.summary
    assert isinstance(table, Table)
    assert summary is not None
    written = write_blocks(config)
    return {
        **written,
        **STATISTICS,
        "model_type": "radio",
        "architectures": ["RadioModel"],
        "max_img_size": table.rows * config.patch,
        "mlp_ratio": float(written["mlp_ratio"]),
        "num_cls_tokens": summary.tokens,
        "num_registers": config.registers - summary.tokens,
        "summary_idxs": list(summary.chosen),
    }
