"""Machines that we do not have, pretended by what torch says of them: point 10 of issue 16."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import packvit
from packvit.fast import blocks as fast_blocks
from packvit.fast.int8 import int8_obstacle, is_hopper
from packvit.model import attention
from packvit.model.attention import AttentionInputs, resolve
from packvit.model.device import find_dtype
from packvit.model.positions import MODES, interpolate

# Of docs/start.md: capability; then dtype, attention with and without flash-attn-4, kernels, fp8.
MACHINES = {
    "H100, H200": ((9, 0), "bfloat16", "fa4", "torch", "yes", "yes"),
    "B200": ((10, 0), "bfloat16", "fa4", "torch", "yes", "no"),
    "RTX 50": ((12, 0), "bfloat16", "torch", "torch", "yes", "no"),
    "L4, RTX 40": ((8, 9), "bfloat16", "torch", "torch", "yes", "no"),
    "A100": ((8, 0), "bfloat16", "torch", "torch", "yes", "no"),
    "T4, RTX 20": ((7, 5), "float32", "sdpa", "sdpa", "no", "no"),
    "Mac (`mps`)": (None, "float32", "sdpa", "sdpa", "no", "no"),
    "CPU": (None, "float32", "sdpa", "sdpa", "no", "no"),
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a machine, which torch takes this one for."""
    found, *_ = MACHINES[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    resolve.cache_clear()
    is_hopper.cache_clear()
    yield request.param
    resolve.cache_clear()
    is_hopper.cache_clear()


def device_of(machine: str) -> torch.device:
    found, *_ = MACHINES[machine]
    return torch.device("cuda" if found else "mps" if "mps" in machine else "cpu")


def test_what_runs_on_a_machine_is_what_the_table_says(
    machine: str, monkeypatch: pytest.MonkeyPatch
):
    _, dtype, best, plain, kernels, fp8 = MACHINES[machine]
    device = device_of(machine)
    chosen = find_dtype(None, device)
    assert chosen == getattr(torch, dtype)
    inputs = AttentionInputs(device, chosen, 64)
    for name, there in ((best, True), (plain, False)):
        monkeypatch.setattr(attention, "find_spec", lambda module, there=there: there or None)
        resolve.cache_clear()
        assert resolve("auto", inputs).name == name
    monkeypatch.setattr(fast_blocks, "HAS_TRITON", True)
    with FakeTensorMode():
        tokens = torch.empty(4, 8, dtype=torch.bfloat16, device=device)
        assert fast_blocks.can_hold(tokens) == (kernels == "yes")
    assert (int8_obstacle(nn.Identity(), device, torch.bfloat16) is None) == (fp8 == "yes")


def test_a_backend_that_is_named_is_refused_in_words_where_it_has_no_kernel(
    machine: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "find_spec", lambda module: True)
    device = device_of(machine)
    for backend in attention.BACKENDS:
        inputs = AttentionInputs(device, torch.bfloat16, 64)
        if obstacle := backend.obstacle(inputs):
            with pytest.raises(ValueError, match=re.escape(obstacle)):
                resolve(backend.name, inputs)
            assert re.search(r"(older|newer|on cpu|on mps)$", obstacle)


def test_the_table_of_the_docs_is_this_one():
    page = (Path(packvit.__file__).parents[1] / "docs/start.md").read_text()
    for name, (found, dtype, best, plain, kernels, fp8) in MACHINES.items():
        number = f"{found[0]}.{found[1]}" if found else "-"
        backends = plain if best == plain else f"{best}, else {plain}"
        assert f"|{name}|{number}|{dtype}|{backends}|{kernels}|{fp8}|" in page


class Resizes(TorchDispatchMode):
    """Notes the device of every resize."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "upsample" in str(func):
            self.devices.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["mps", "cuda", "cpu"])
def test_tables_are_resized_on_the_cpu_where_a_device_lacks_the_kernel(device: str):
    with FakeTensorMode(allow_non_fake_inputs=True), Resizes() as resizes:
        table = torch.empty(1, 8, 5, 7, dtype=torch.float32, device=device)
        found = interpolate(table, (3, 4), MODES["bicubic_antialias"])
    assert found.device.type == device
    assert resizes.devices == {"cuda" if device == "cuda" else "cpu"}
