"""Facts about this machine and the supported models, for `packvit info`."""

import os
import platform
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from packvit.checkpoints.folders import EMBEDDED
from packvit.families import FAMILIES
from packvit.model.attention import BACKENDS, AttentionInputs, Backend, resolve
from packvit.text.towers import TEXT_TOWERS
from packvit.version import TESTED, newer_than_tested, version_of

PACKAGES = ("torch", "safetensors", "numpy", "pillow", "pyarrow", "transformers", "flash-attn-4")


def survey() -> dict[str, Any]:
    """Return machine, backends, families and embedded models, as plain values."""
    on_gpu = torch.cuda.is_available()
    work = AttentionInputs(
        torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32, 128
    )
    return {
        "machine": machine(),
        "asked": f"{work.dtype} on {work.device.type} at head_dim {work.head_dim}".removeprefix(
            "torch."
        ),
        "auto": resolve("auto", work).name,
        "kernel": kernel(resolve("auto", work), work),
        "newer_than_tested": {
            package: {"installed": version, "tested": TESTED[package]}
            for package, version in newer_than_tested().items()
        },
        "backends": [
            {
                "name": backend.name,
                "title": backend.title,
                "obstacle": backend.obstacle(work),
                "kernel": kernel(backend, work) if backend.obstacle(work) is None else None,
                "measured": backend.measured,
            }
            for backend in BACKENDS
        ],
        "families": [
            {
                "name": encoder.family.name,
                "class": encoder.__name__,
                "layouts": list(dict.fromkeys(layout.name for layout in encoder.family.layouts)),
                "checkpoints": list(encoder.family.checkpoints),
            }
            for encoder in FAMILIES
        ],
        "text_towers": [
            {"name": t.name, "space": t.space, "checkpoints": list(t.checkpoints)}
            for t in TEXT_TOWERS
        ],
        "embedded": {name: str(folder) for name, folder in EMBEDDED.items()},
    }


def kernel(backend: Backend, inputs: AttentionInputs) -> str:
    """Return which kernel a call of a backend that runs here takes."""
    if backend.name == "torch":
        from torch.nn.attention import varlen

        chosen = getattr(varlen, "_should_use_cudnn", None)
        if chosen is not None and chosen(torch.cuda.current_device()):
            return "cuDNN, which torch chooses by itself"
        return "FlashAttention-2 inside torch"
    if backend.name != "sdpa":
        return backend.title
    sizes = (1, 1, 256, inputs.head_dim)  # batch, heads, tokens, head_dim
    heads = torch.empty(sizes, dtype=inputs.dtype, device=inputs.device)
    choice = SDPBackend(
        torch._fused_sdp_choice(heads, heads, heads)  # pyright: ignore[reportPrivateImportUsage]
    )
    return f"{choice.name.lower().replace('_', ' ')}, which SDPA chooses for 256 tokens"


def machine() -> dict[str, Any]:
    """Return the hardware, and the versions of the packages that compute."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packvit": version_of("packvit"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpus": ", ".join(gpus) or "none",
        "cuda": torch.version.cuda or "none",
    } | {name: version_of(name) for name in PACKAGES}
