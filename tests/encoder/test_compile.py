"""`compile=True` compiles once for packs of all sizes. In a process of its own: shape checks of the
tests' import hook would be compiled along.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAM = """
import json, random, sys
import torch
sys.path.insert(0, sys.argv[1])
import reference
from torch._dynamo.utils import counters
from packvit.families import FAMILIES

device, dtype, attention, teach = sys.argv[2], getattr(torch, sys.argv[3]), sys.argv[4], sys.argv[5]
model = reference.build("aimv2", is_native=True).to(device, dtype)
aimv2 = next(f for f in FAMILIES if f.family.name == "AIMv2")
eager = aimv2.from_transformers(model, attention=attention)
compiled = aimv2.from_transformers(model, attention=attention, compile=True)
draw = random.Random(0)
worst, graphs, warm = 0.0, [], 4

def run(encoder, patches, grid):
    if teach == "train":
        encoder.zero_grad()
        tokens = encoder(patches, grid)
        tokens.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    with torch.inference_mode():
        return encoder(patches, grid)

for step in range(50 + warm):
    grid = [(1, draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(2, 9))]
    patches = reference.draw_patches(grid, 588, step).to(device)
    a, b = (run(encoder, patches, torch.tensor(grid)) for encoder in (eager, compiled))
    worst = max(worst, ((a - b).abs().max() / a.abs().max()).item())
    graphs.append(counters["stats"]["unique_graphs"])
print(json.dumps({"worst": worst, "graphs": graphs, "warm": warm}))
"""


def run(*words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(TESTS), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.soak
@pytest.mark.parametrize("teach", ["train", "infer"])
def test_50_random_packs_recompile_nothing(teach: str):
    said = run("cpu", "float32", "sdpa", teach)
    assert said["graphs"][0] > 0
    assert said["graphs"][said["warm"] - 1] == said["graphs"][-1]
    assert said["worst"] <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("teach", ["train", "infer"])
def test_50_random_packs_recompile_nothing_on_a_gpu(teach: str):
    said = run("cuda", "bfloat16", "torch", teach)
    assert said["graphs"][0] > 0
    assert said["graphs"][said["warm"] - 1] == said["graphs"][-1]
    assert said["worst"] <= 0.05
