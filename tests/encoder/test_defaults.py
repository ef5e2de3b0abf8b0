"""Row N3 of the cases: torch's default dtype and device change no bit of ours."""

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch import Tensor

import packvit

SOURCE = Path(packvit.__file__).parent
# What torch makes in its default dtype, or on its default device, unless told.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty"),
    *("empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window"),
    *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def bare_factories(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield calls that make a tensor and do not say of which dtype, or where.

    A parameter's are passed over: modules are built in torch's defaults, as torch's own are, and
    loading gives every parameter another tensor.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            words = ast.unparse(node.func)
            if words == "nn.Parameter":
                continue
            said = {keyword.arg for keyword in node.keywords}
            is_factory = words.startswith("torch.") and words[6:] in FACTORIES
            if is_factory and not {"dtype", "device"} <= said:
                yield node
        yield from bare_factories(node)


def test_n3_every_tensor_that_is_made_says_its_dtype_and_its_device():
    bare = [
        f"{path.relative_to(SOURCE)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(SOURCE.rglob("*.py"))
        for call in bare_factories(ast.parse(path.read_text("utf-8")))
    ]
    assert not bare, "\n".join(bare)


def test_n3_a_bare_factory_is_found_and_a_parameter_is_not():
    said = "a = torch.zeros(3, dtype=x)\nb = nn.Parameter(torch.ones(2))\nc = f(torch.tensor(1))"
    assert [call.lineno for call in bare_factories(ast.parse(said))] == [1, 3]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def outputs(folder: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """Load, pack, encode and forward, as a user would."""
    encoder = packvit.load(folder, device="cpu", dtype=torch.float32, positions="interpolate")
    pack = encoder.pack(images, resize="native", max_patches=30)
    with torch.inference_mode():
        found = encoder.encode(pack.hidden_states, pack.grid_thw, taps=(0, -1))
        said = {
            "patches": pack.hidden_states,
            "grid": pack.grid_thw,
            "values": encoder.to_values(pack.hidden_states),
            "tokens": found.tokens,
            "prefix": found.prefix,
            "forward": encoder(pack.hidden_states, pack.grid_thw),
            **{f"tap {layer}": tap for layer, tap in found.taps.items()},
        }
        if found.pooled is not None:
            said["pooled"] = found.pooled
    return said


@pytest.fixture(scope="module", params=list(reference.KINDS))
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Image.Image], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("model")
    reference.build(request.param).save_pretrained(folder)
    draw = np.random.default_rng(0)
    sizes = ((70, 70), (50, 90), (200, 30))
    images = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    return folder, images, outputs(folder, images)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "with a device": lambda: torch.device("meta"),
    "nothing": nullcontext,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_n3_torchs_defaults_change_no_bit(
    plain: tuple[Path, list[Image.Image], dict[str, Tensor]], name: str
):
    folder, images, expected = plain
    from packvit.model.positions import side_weights

    side_weights.cache_clear()  # made under these defaults too
    context: AbstractContextManager[object] = DEFAULTS[name]()
    with context:
        found = outputs(folder, images)
    assert found.keys() == expected.keys()
    for kind, tensor in expected.items():
        assert found[kind].dtype == tensor.dtype, kind
        assert found[kind].device == tensor.device, kind
        assert torch.equal(found[kind], tensor), kind
