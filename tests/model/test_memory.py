import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch.profiler import ProfilerActivity, profile

from packvit.bench.models import config_of
from packvit.config import HALF_STATISTICS
from packvit.corpus import UsageError
from packvit.corpus.settings import EmbedOptions, check_memory
from packvit.encoder import Encoder
from packvit.families import FAMILIES, AIMv2Packing
from packvit.images.patches import ImageConfig
from packvit.model.memory import peak

LARGE = config_of("aimv2-large")
STATISTICS = ImageConfig(14, *HALF_STATISTICS, "bilinear", None)


def measured_peak(encoder: Encoder, grid: list[tuple[int, int, int]], path: Path) -> int:
    """What torch's profiler saw allocated on the CPU at most, on top of what was there before."""
    patches = reference.draw_patches(grid, encoder.config.patch_dim)
    with torch.inference_mode():
        encoder(patches, torch.tensor(grid))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            encoder(patches, torch.tensor(grid))
    seen.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("kind", ["aimv2", "siglip2", "dinov3, gated", "dinov2"])
def test_a_forward_stays_below_the_formula_and_not_far(kind: str, tmp_path: Path):
    sizes = {"hidden_size": 256, "num_hidden_layers": 2}
    sizes |= {} if kind == "dinov2" else {"intermediate_size": 704}
    native = {"is_native": True} if kind == "aimv2" else {}
    model = reference.build(kind, **sizes, **native)
    [family] = [e for e in FAMILIES if model.config.model_type in e.family.model_types]
    encoder = family.from_transformers(model)
    grid = [(1, 16, 12), (1, 9, 20)] * 5
    tokens = sum(rows * columns for _, rows, columns in grid) + len(grid) * encoder.config.prefix
    bound = tokens * peak(encoder.config, 4).per_token
    most = measured_peak(encoder, grid, tmp_path / "trace.json")
    assert most <= bound
    # The bound knows copies that backends make of unequal neighbours, and not all do.
    assert bound <= 2 * most


def test_a_budget_that_cannot_fit_is_refused_with_one_that_does():
    with torch.device("meta"):
        encoder = AIMv2Packing(LARGE, STATISTICS).to(torch.bfloat16)
    options = EmbedOptions(token_budget=1_000_000)
    check_memory(encoder, options, None)
    check_memory(encoder, options, 200 * 2**30)
    with pytest.raises(UsageError, match=r"up to 31\.7 GiB .* has 8\.0 GiB free") as refused:
        check_memory(encoder, options, 8 * 2**30)
    fits = int(str(refused.value).partition("Lower token_budget to ")[2].partition(",")[0])
    assert peak(LARGE, 2).activations(fits) <= 8 * 2**30 < peak(LARGE, 2).activations(fits + 1)
    check_memory(encoder, EmbedOptions(token_budget=fits), 8 * 2**30)
    with pytest.raises(UsageError, match=r"beside the weights and 1\.1 GiB for decoding, and"):
        check_memory(encoder, EmbedOptions(token_budget=fits, decode="gpu"), 5 * 2**30)
    with pytest.raises(UsageError, match="Choose a smaller model"):
        check_memory(encoder, options, 1000)


def test_taps_and_lists_count():
    alone, more = peak(LARGE, 2), peak(LARGE, 2, taps=3, lists=4)
    assert more.activations(1000) - alone.activations(1000) == 1000 * 1024 * (3 * 2 + 4 * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 33_739])
def test_aimv2_large_on_a_gpu_takes_at_most_what_the_formula_says(tokens: int):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    encoder = AIMv2Packing(LARGE, STATISTICS).to("cuda", torch.bfloat16).eval()
    patches = torch.randn(tokens, LARGE.patch_dim, device="cuda", dtype=torch.bfloat16)
    grid = torch.tensor([(1, 1, 1023)] * (tokens // 1023) + [(1, 1, tokens % 1023)])
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        encoder(patches, grid)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    assert most <= weights + peak(LARGE, 2).activations(tokens) <= 1.6 * most
