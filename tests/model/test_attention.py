import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from packvit.model.attention import (
    BACKENDS,
    AttentionInputs,
    attend,
    resolve,
    run_in_launches,
    run_sdpa,
    run_torch,
    varlen_arguments,
)
from packvit.packs.segments import Segments

LENGTHS = (24, 4, 15, 24, 4)  # equal lengths that are no neighbours, and a loner
FIRST, REST = slice(0, 24), slice(24, 71)

on_gpu = pytest.mark.gpu
with_fa4 = pytest.mark.skipif(
    find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None,
    reason="flash-attn-4 is not installed",
)


def qkv(
    device: str, dtype: torch.dtype, tokens: int = 71, head_dim: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, tokens, 2, head_dim, generator=generator)
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


@pytest.mark.parametrize("change", [lambda x: x * 3 + 1, lambda x: x * float("nan")])
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        ("sdpa", "cpu", torch.float32),
        ("sdpa", "cpu", torch.bfloat16),
        pytest.param("sdpa", "cuda", torch.bfloat16, marks=on_gpu),
        pytest.param("torch", "cuda", torch.bfloat16, marks=on_gpu),
        pytest.param("fa4", "cuda", torch.bfloat16, marks=[on_gpu, with_fa4]),
    ],
)
def test_changing_image_0_leaves_the_others_bit_identical(change, backend, device, dtype):
    segments = Segments.from_lengths(LENGTHS, device=device)
    tensors = qkv(device, dtype)
    before = attend(*tensors, segments, backend=backend)
    for tensor in tensors:
        tensor[FIRST] = change(tensor[FIRST])
    after = attend(*tensors, segments, backend=backend)
    assert not torch.equal(before[FIRST], after[FIRST])
    assert torch.equal(before[REST], after[REST])


@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 128])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "atol"),
    [
        ("sdpa", "cpu", torch.float64, 1e-12),
        ("sdpa", "cpu", torch.float32, 2e-6),
        pytest.param("sdpa", "cuda", torch.float32, 5e-6, marks=on_gpu),
        pytest.param("sdpa", "cuda", torch.bfloat16, 2e-2, marks=on_gpu),
        pytest.param("torch", "cuda", torch.bfloat16, 2e-2, marks=on_gpu),
        pytest.param("torch", "cuda", torch.float16, 3e-3, marks=on_gpu),
        pytest.param("fa4", "cuda", torch.bfloat16, 2e-2, marks=[on_gpu, with_fa4]),
        pytest.param("fa4", "cuda", torch.float16, 3e-3, marks=[on_gpu, with_fa4]),
    ],
)
def test_backends_agree_with_the_oracle(backend, device, dtype, atol, head_dim):
    tensors = qkv(device, dtype, head_dim=head_dim)
    found = attend(*tensors, Segments.from_lengths(LENGTHS, device=device), backend=backend)
    assert found.dtype == dtype
    expected = reference.attention(*tensors, LENGTHS)
    torch.testing.assert_close(found.double().cpu(), expected, atol=atol, rtol=0)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_any_mix_of_lengths_agrees_with_the_oracle(lengths: list[int]):
    tensors = qkv("cpu", torch.float64, tokens=sum(lengths))
    found = attend(*tensors, Segments.from_lengths(tuple(lengths)))
    expected = reference.attention(*tensors, tuple(lengths))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_one_query_a_sequence_attends_to_its_own_tokens(lengths: list[int]):
    query, key, value = qkv("cpu", torch.float64, tokens=sum(lengths))
    query = query[: len(lengths)]
    queries = Segments.from_lengths((1,) * len(lengths))
    found = run_sdpa(query, key, value, queries, Segments.from_lengths(tuple(lengths)))
    parts = zip(query, key.split(lengths), value.split(lengths), strict=True)
    for row, (q, k, v) in zip(found, parts, strict=True):
        weights = (torch.einsum("hk,thk->ht", q, k) / 4).softmax(-1)
        torch.testing.assert_close(row, torch.einsum("ht,thk->hk", weights, v), atol=1e-12, rtol=0)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    most=st.integers(1, 5),
    causal=st.booleans(),
)
def test_several_launches_find_what_one_would(lengths: list[int], most: int, causal: bool):
    """Forward and backward, whether each token asks or, where not causal, one a sequence."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, sum(lengths), 2, 16, generator=generator, dtype=torch.float64)
    keys = Segments.from_lengths(tuple(lengths), causal=causal)
    queries = keys if causal else Segments.from_lengths((1,) * len(lengths))
    launched: list[tuple[int, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, asked: Segments, held: Segments) -> Tensor:
        assert asked.cu_seqlens.diff().tolist() == list(asked.lengths)
        assert held.cu_seqlens.tolist() == [0, *held.starts[1:], len(k)]
        assert held.cu_seqlens.dtype == torch.int32
        launched.append(held.lengths)
        return run_sdpa(q, k, v, asked, held)

    def run(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        query, key, value = (each.clone().requires_grad_() for each in drawn)
        out = attention(query[: queries.tokens], key, value)
        return out, *torch.autograd.grad(out.square().sum(), (query, key, value))

    found = run(lambda q, k, v: run_in_launches(kernel, q, k, v, queries, keys, most=most))
    expected = run(lambda q, k, v: run_sdpa(q, k, v, queries, keys))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert max(map(len, launched)) <= most
    assert [length for each in launched for length in each] == lengths


@on_gpu
@pytest.mark.parametrize("backend", ["torch", "sdpa", pytest.param("fa4", marks=with_fa4)])
@pytest.mark.parametrize("kinds", [(1, 2, 3), (2,)], ids=["mixed", "equal"])
def test_70_000_sequences_are_attended_to_forward_and_backward(backend: str, kinds: tuple[int]):
    """More than a kernel's grid takes in its second axis; float64 tells what is right."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor(kinds)[torch.randint(len(kinds), (70_000,), generator=generator)]
    lengths = tuple(chosen.tolist())
    drawn = torch.randn(4, sum(lengths), 2, 64, generator=generator).bfloat16()

    def run(drawn: Tensor, name: str) -> list[Tensor]:
        query, key, value, weight = (each.clone().requires_grad_() for each in drawn)
        segments = Segments.from_lengths(lengths, device=drawn.device)
        out = attend(query, key, value, segments, backend=name)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), (query, key, value))]

    for found, exact in zip(run(drawn.cuda(), backend), run(drawn.double(), "sdpa"), strict=True):
        for ours, wanted in zip(found.double().cpu().chunk(16), exact.chunk(16), strict=True):
            assert (ours - wanted).norm() <= 1.2e-2 * wanted.norm()


def test_a_backend_that_cannot_run_says_why_and_auto_steps_past_it():
    work = AttentionInputs(torch.device("cpu"), torch.float32, 8)
    assert resolve("auto", work).name == "sdpa"
    with pytest.raises(ValueError, match=r'"torch" cannot run: it needs CUDA tensors .* on cpu'):
        resolve("torch", work)
    with pytest.raises(ValueError, match=r'"flash"\. Choose auto or one of: fa4, fa3, fa2, torch'):
        resolve("flash", work)
    for name, install in [("fa4", "hopper"), ("fa3", "from its repository"), ("fa2", "flash")]:
        with pytest.raises(ValueError, match=f'"{name}" cannot run: .* not installed; .*{install}'):
            resolve(name, work)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "obstacle"),
    [
        (torch.float32, 64, "needs float16 or bfloat16 and these are torch.float32"),
        (torch.bfloat16, 68, "divisible by 8, up to 256, and this one is 68"),
        (torch.bfloat16, 264, "divisible by 8, up to 256, and this one is 264"),
        (torch.bfloat16, 72, None),
    ],
)
def test_the_torch_backend_knows_its_limits(
    dtype: torch.dtype, head_dim: int, obstacle: str | None
):
    [backend] = [backend for backend in BACKENDS if backend.name == "torch"]
    found = backend.obstacle(AttentionInputs(torch.device("cuda"), dtype, head_dim))
    assert found is None if obstacle is None else obstacle in str(found)


def test_auto_takes_only_what_we_have_run():
    assert [backend.name for backend in BACKENDS if backend.measured] == ["fa4", "torch", "sdpa"]


def test_segments_of_another_pack_are_refused():
    with pytest.raises(ValueError, match="holds 71 tokens, but the segments describe 47"):
        attend(*qkv("cpu", torch.float32), Segments.from_lengths((24, 23)))


@on_gpu
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [
        *((backend, head_dim) for backend in ("torch", "sdpa") for head_dim in (64, 72, 80, 128)),
        *(pytest.param("fa4", head_dim, marks=with_fa4) for head_dim in (64, 72, 80, 128)),
        *(pytest.param("fa4, packed", depth, marks=with_fa4) for depth in (64, 72, 80, 128)),
    ],
)
def test_gradients_agree_with_the_oracle(backend: str, head_dim: int):
    """As near to float64 as FlashAttention-2's are, whatever the lengths, one row and none."""
    lengths = (1, 300, 64, 128, 129, 1, 640, 300)
    generator = torch.Generator().manual_seed(head_dim)
    drawn = torch.randn(4, sum(lengths), 4, head_dim, generator=generator)

    def gradients(drawn: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]):
        leaves = [drawn[part].clone().requires_grad_() for part in range(3)]
        return torch.autograd.grad((attention(*leaves) * drawn[3]).sum(), leaves)

    segments = Segments.from_lengths(lengths, device="cuda")
    half = drawn.bfloat16()
    name, _, packed = backend.partition(", ")

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if packed:
            from packvit.fast.attention import PackedFa4

            packed_attention: Any = PackedFa4.apply
            return packed_attention(torch.stack([query, key, value], 1), segments)
        return attend(query, key, value, segments, backend=name)

    found = gradients(half.cuda(), ours)
    wanted = gradients(half.double(), lambda q, k, v: reference.attention(q, k, v, lengths))
    for gradient, exact in zip(found, wanted, strict=True):
        assert (gradient.double().cpu() - exact).norm() <= 1.2e-2 * exact.norm()


@on_gpu
@pytest.mark.parametrize("backend", ["torch", pytest.param("fa4", marks=with_fa4)])
def test_empty_sequences_are_nothing(backend: str):
    """CUDA graphs fill a pack up with them."""
    tensors = qkv("cuda", torch.bfloat16, head_dim=64)
    full = attend(*tensors, Segments.from_lengths(LENGTHS, device="cuda"), backend=backend)
    lengths = (*LENGTHS, 0, 0, 0)
    holes = Segments.from_lengths(lengths, device="cuda")
    found = attend(*tensors, Segments(lengths, holes.cu_seqlens, 64), backend=backend)
    assert torch.equal(found, full)


class SeenWindows(TorchDispatchMode):
    """The windows that torch's varlen kernel is called with; its backward takes the same."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "varlen_attn" in str(func):
            names = [argument.name for argument in func._schema.arguments]
            self.windows.append(dict(zip(names, args, strict=False))["window_size"])
        return func(*args, **(kwargs or {}))


def test_p4_the_torch_backend_asks_by_argument_for_the_kernel_that_we_measured():
    """Row P4 of the cases: left to itself, torch 2.14 takes cuDNN on Hopper and newer."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fake tensor has no device to ask for its kernels
        segments = Segments((300, 7, 200), torch.empty(4, dtype=torch.int32, device="cuda"), 300)
        query, key, value = (
            torch.empty(507, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)
        )
        with SeenWindows() as seen:
            run_torch(query, key, value, segments, segments)
    assert seen.windows == [[300, 300]]  # as wide as the longest: nothing is left out
    if can_use := getattr(varlen, "_can_use_cudnn", None):
        assert not can_use(query, key, value, 300, seen.windows[0])


@on_gpu
def test_p4_a_window_as_wide_as_the_longest_sequence_changes_no_bit():
    segments = Segments.from_lengths((300, 7, 200), device="cuda")
    query, key, value = (
        torch.randn(507, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for _ in range(3)
    )
    found = run_torch(query, key, value, segments, segments)
    arguments = varlen_arguments(segments, segments)
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *arguments, 0.0, False, False
    )
    assert torch.equal(found, out)
