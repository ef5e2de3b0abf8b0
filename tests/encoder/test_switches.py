"""torch's switches, thrown as users throw them: the same numbers, or a sentence."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor, nn

import packvit
from packvit.encoder import Encoder

GRID = torch.tensor([[1, 5, 5], [1, 3, 7], [1, 1, 4]])


@pytest.fixture(scope="module", params=["aimv2", "siglip2", "clip", "dinov3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    reference.build(request.param).save_pretrained(path)
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    return packvit.load(folder, device="cpu", dtype=dtype, positions="interpolate")


def outputs(encoder: Encoder) -> list[Tensor]:
    patches = reference.draw_patches([(1, 1, 50)], encoder.config.patch_dim)
    found = encoder.encode(patches, GRID, taps=(0,))
    return [x for x in (found.tokens, found.prefix, found.pooled, found.taps[0]) if x is not None]


@contextmanager
def kept(get: Callable[[], object], set_: Callable[..., object], value: object) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def deterministic(value: object) -> None:
    torch.use_deterministic_algorithms(bool(value))


def flag(name: str) -> Callable[[object], None]:
    backend = torch.backends.cuda.matmul if name == "matmul" else torch.backends.cudnn
    return lambda value: setattr(backend, "allow_tf32", value)


# A switch, how it is read, how it is set, and to what.
SWITCHES = {
    "deterministic": (torch.are_deterministic_algorithms_enabled, deterministic, True),
    "high": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "TF32 in matmuls": (lambda: torch.backends.cuda.matmul.allow_tf32, flag("matmul"), True),
    "TF32 in cuDNN": (lambda: torch.backends.cudnn.allow_tf32, flag("cudnn"), False),
    "denormals": (lambda: False, torch.set_flush_denormal, True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_no_bit_on_a_cpu(folder: Path, name: str):
    with torch.inference_mode():
        expected = outputs(load(folder))
    with kept(*SWITCHES[name]), torch.inference_mode():
        found = outputs(load(folder))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_medium_precision_rounds_matmuls_to_bf16_where_a_cpu_can_and_no_further(folder: Path):
    """What torch says that "medium" may do; docs/numerics.md repeats it."""
    with torch.inference_mode():
        expected = outputs(load(folder))
        get = torch.get_float32_matmul_precision
        with kept(get, torch.set_float32_matmul_precision, "medium"):
            found = outputs(load(folder))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert reference.scaled_difference(a, b) < 0.1


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_moves_the_last_bits_at_most(folder: Path, threads: int):
    with torch.inference_mode():
        expected = outputs(load(folder))
        with kept(torch.get_num_threads, torch.set_num_threads, threads):
            found = outputs(load(folder))
    for a, b in zip(found, expected, strict=True):
        assert reference.scaled_difference(a, b) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_a_call_gives_finite_numbers_near_those_without(
    folder: Path, dtype: torch.dtype
):
    encoder = load(folder, dtype)
    with torch.inference_mode():
        expected = outputs(encoder)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outputs(encoder)
        with torch.autocast("cpu", enabled=False):
            off = outputs(encoder)
    for a, b, c in zip(found, expected, off, strict=True):
        assert reference.scaled_difference(a, b) < 0.2
        assert torch.equal(b, c)


def test_a_model_loaded_in_inference_mode_gives_the_same_and_says_how_it_could_be_trained(
    folder: Path,
):
    with torch.inference_mode():
        expected = outputs(load(folder))
        encoder = load(folder)
    with torch.no_grad():
        found = outputs(encoder)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    encoder.train()
    for parameter in encoder.parameters():
        assert isinstance(parameter, nn.Parameter)
        parameter.requires_grad_(True)
    patches = reference.draw_patches([(1, 1, 50)], encoder.config.patch_dim)
    encoder(patches, GRID).sum().backward()
    assert all(p.grad is not None for p in encoder.encoder.parameters())


def test_loading_without_gradients_leaves_a_model_that_trains(folder: Path):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = load(folder)
    patches = reference.draw_patches([(1, 1, 50)], encoder.config.patch_dim)
    encoder(patches, GRID).sum().backward()
    assert all(p.grad is not None for p in encoder.encoder.parameters())
