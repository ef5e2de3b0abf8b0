"""What must never happen, held to its word by behaviour: calls are counted, not times.

On fake CUDA tensors the varlen backend runs without a GPU, so its calls can be counted anywhere.
"""

import inspect
import re
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onevision
import pytest
import reference
import torch
import towers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import packvit
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.families.aimv2 import (
    AIMv2Packing,
    Aimv2PackingAttention,
    Aimv2PackingEncoder,
    Aimv2PackingEncoderLayer,
    Aimv2VisionEmbeddings,
)
from packvit.families.onevision import OneVisionEncoderPacking

GRIDS = {count: [(1, 1 + image % 7, 1 + image % 5) for image in range(count)] for count in (1, 64)}
EQUAL = {count: [(1, 4, 5)] * count for count in (1, 64)}


class Calls(TorchDispatchMode):
    """Counts every operator that reaches a device, and keeps what attention was given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attended: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        if "attn" in str(func) or "attention" in str(func):
            self.attended.append(args)
        return func(*args, **(kwargs or {}))


def small(**changes: Any) -> AIMv2Packing:
    return AIMv2Packing.from_transformers(reference.aimv2(is_native=True, **changes))


def count_fake(grid: list[tuple[int, int, int]], tower: str | Encoder | None = None) -> Calls:
    """Run bf16 on fake CUDA tensors, and count."""
    encoder = packvit_tower(tower) if isinstance(tower, str) else tower or small()
    total = sum(frames * rows * columns for frames, rows, columns in grid)
    grid_thw = torch.tensor(grid)
    encoder.backend = "torch"
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this machine has no CUDA
        for name, parameter in list(encoder.named_parameters()):
            owner = encoder.get_submodule(name.rpartition(".")[0])
            fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(fake))
        patches = torch.empty(total, encoder.config.patch_dim, dtype=torch.uint8, device="cuda")
        calls = Calls()
        with calls, torch.no_grad():
            found = encoder.encode(patches, grid_thw, taps=(0, -1), merged=bool(encoder.merger))
        assert found.tokens.shape == (total, encoder.config.width)
        assert found.tokens.dtype == torch.bfloat16
    return calls


def test_forward_takes_a_pack_and_its_grid():
    assert list(inspect.signature(AIMv2Packing.forward).parameters) == [
        "self",
        "hidden_states",
        "grid_thw",
    ]


def test_the_published_module_names_are_what_the_encoder_is_made_of():
    encoder = small()
    kinds = Counter(type(module) for module in encoder.modules())
    assert kinds[Aimv2VisionEmbeddings] == 1
    assert kinds[Aimv2PackingEncoder] == 1
    assert kinds[Aimv2PackingEncoderLayer] == 3
    assert kinds[Aimv2PackingAttention] == 3


@pytest.mark.parametrize("grids", [GRIDS, EQUAL], ids=["mixed", "equal"])
def test_varlen_calls_are_as_many_for_64_images_as_for_one(grids):
    one, many = count_fake(grids[1]), count_fake(grids[64])
    assert many.counts == one.counts
    assert len(one.attended) == 3 + 1  # a call a layer, and the pooling head's


def packvit_tower(kind: str) -> Encoder:
    model = towers.build(kind)
    [family] = [e for e in FAMILIES if e.family.claims(model.config.to_dict())]
    return family.from_transformers(model)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])  # no tables, resized for each grid
def test_windows_and_mergers_take_as_many_calls_for_64_images_as_for_one(kind: str):
    one, many = (
        count_fake([(1, 2 * tall, 2 * wide) for _, tall, wide in grids], kind)
        for grids in GRIDS.values()
    )
    assert many.counts == one.counts
    assert len(one.attended) == 3


def test_clips_with_places_in_time_take_as_many_calls_for_64_as_for_one():
    family = OneVisionEncoderPacking.family
    config = family.layouts[0].read(onevision.SIZES, ())
    found = []
    for grids in GRIDS.values():
        grid = [(1 + wide, tall, wide) for _, tall, wide in grids]
        encoder = OneVisionEncoderPacking(config, family.images(config))
        encoder.patch_positions(grid)  # times are kept, and no fake tensor can give them
        found.append(count_fake(grid, encoder))
    one, many = found
    assert many.counts == one.counts
    assert len(one.attended) == 3 + 1


def test_cu_seqlens_reach_varlen_attention_as_int32_on_the_device_made_once():
    grid = [(1, 3, 4), (2, 1, 5)]
    attended = count_fake(grid).attended
    found = {id(x): x for args in attended[:3] for x in args if is_cu_seqlens(x)}
    assert len(found) == 1  # the same tensor in every layer
    [cu_seqlens] = found.values()
    assert (cu_seqlens.shape, cu_seqlens.dtype) == ((4,), torch.int32)
    assert cu_seqlens.device.type == "cuda"
    assert all(type(longest) is int for args in attended for longest in args[5:7])
    assert [args[5:7] for args in attended] == [(12, 12)] * 3 + [(1, 12)]


def is_cu_seqlens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.int32


def count_real(grid: list[tuple[int, int, int]]) -> Counter[str]:
    encoder = small()
    patches = reference.draw_patches(grid, encoder.config.patch_dim)
    calls = Calls()
    with calls, torch.no_grad():
        encoder(patches, torch.tensor(grid))
    return calls.counts


def test_sdpa_calls_grow_with_distinct_lengths_alone():
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    lengths = {rows * columns for _, rows, columns in GRIDS[64]}
    assert count_real(EQUAL[64])[attention] == count_real(EQUAL[1])[attention] == 3
    assert count_real(GRIDS[64])[attention] == 3 * len(lengths)


def test_matmul_calls_are_as_many_for_64_images_as_for_one():
    one, many = count_real(GRIDS[1]), count_real(GRIDS[64])
    for name in ("mm", "addmm", "rms_norm", "_fused_rms_norm", "index_select"):
        assert many[name] == one[name]
    assert one["mm"] + one["addmm"] > 0


def test_nothing_is_padded_or_masked():
    grid = [(1, 2, 3), (1, 9, 1)]
    encoder = small()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            transposed = func.overloadpacket.__name__ == "t"  # a weight, on its way to a matmul
            computed = isinstance(out, Tensor) and not transposed
            if computed and out.ndim >= 2 and out.shape[-1] == encoder.config.width:
                largest = max(largest, out.numel() // out.shape[-1])
            return out

    with Largest(), torch.no_grad():
        encoder(reference.draw_patches(grid, encoder.config.patch_dim), torch.tensor(grid))
    assert largest == 15  # tokens, and not one more


@pytest.mark.gpu
def test_no_sync_inside_the_model():
    encoder = small().to("cuda", torch.bfloat16)
    patches = torch.zeros(64, encoder.config.patch_dim, dtype=torch.uint8, device="cuda")
    grid_thw = torch.tensor([(1, 4, 4), (1, 1, 16), (2, 4, 4)])
    for backend in ("torch", "sdpa"):
        encoder.backend = backend
        encoder.encode(patches, grid_thw, taps=(0, -1))  # kernels are loaded on first use
        torch.cuda.set_sync_debug_mode("error")
        try:
            encoder.encode(patches, grid_thw, taps=(0, -1))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_importing_packvit_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, packvit, packvit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve():
    for name in dir(packvit):
        assert getattr(packvit, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'lod'\. It offers: AIMv2"):
        packvit.lod  # noqa: B018 # the access is what is tested


ROOT = Path(__file__).parents[1]


def test_the_list_of_packages_is_the_order_that_the_import_linter_holds_us_to():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert tools["exclude_type_checking_imports"] is False
    [order] = [one for one in tools["contracts"] if one["type"] == "layers"]
    layers = [name for layer in order["layers"] for name in re.split(r" [|:] ", layer)]
    page = (ROOT / "ARCHITECTURE.md").read_text().partition("## The packages")[2]
    listed = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", page.partition("\n## ")[0], re.M)
    assert listed == layers
    assert "ignore_imports" not in order


def test_every_module_of_the_package_is_in_that_list():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [order] = [one for one in tools["contracts"] if one["type"] == "layers"]
    assert order["exhaustive"] is True  # the linter itself names the missing ones
    modules = {path.name for path in (ROOT / "packvit").glob("*.py")} - {"__init__.py"}
    assert modules == {
        "__main__.py",
        "hub.py",
        "encoder.py",
        "config.py",
        "version.py",
        "out_of_memory.py",
        "atomic.py",
    }


def test_encoder_opens_no_file_and_imports_nothing_that_imports_it():
    code = (
        "import sys, packvit.encoder\n"
        "found = [m for m in sys.modules if m.startswith(('packvit.families', 'packvit.hub'))]\n"
        "sys.exit(str(found) if found else 0)"
    )
    import subprocess
    import sys

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    source = (ROOT / "packvit" / "encoder.py").read_text()
    assert not re.search(r"\bopen\(|read_text|write_text|read_bytes|write_bytes", source)


def test_a_family_stays_one_short_file():
    """And so do the files that hold what two of them share, or what config.json says."""
    lines = {
        path.name: len(path.read_text().splitlines())
        for path in (ROOT / "packvit" / "families").glob("*.py")
    }
    assert len(lines) > len(FAMILIES)
    assert {name: count for name, count in lines.items() if count > 150} == {}
