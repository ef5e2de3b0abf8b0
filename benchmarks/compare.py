"""Two checkouts of packvit side by side on one GPU: was a change slower?

    python benchmarks/compare.py BEFORE AFTER --cases aimv2-large clip-l14 --json out.json

Each tree runs in a process of its own, which loads its own code. The two take turns, a few
forwards at a time, in shuffled order; the figure is the median of the ratios of neighbouring turns,
so a clock that drifts is in both.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

SIDES = {"dinov2-b14": 37, "siglip-so400m": 27}  # of a grid, where it is not 16
CASES = {  # name: model, grid, what is done, options of `load`
    "aimv2-large": ("aimv2-large", "mixed", "infer", {}),
    "aimv2-large invariant": ("aimv2-large", "mixed", "infer", {"invariant": True}),
    "aimv2-large fp8": ("aimv2-large", "mixed", "infer", {"fp8": True}),
    "aimv2-large 8 x 256": ("aimv2-large", "small", "infer", {}),
    "aimv2-large training": ("aimv2-large", "mixed", "train", {}),
    "aimv2-large LoRA": ("aimv2-large", "mixed", "lora", {}),
    "aimv2-large LoRA training": ("aimv2-large", "mixed", "lora train", {}),
    "siglip2-so400m": ("siglip2-so400m", "mixed", "infer", {}),
    "siglip2-so400m fp8": ("siglip2-so400m", "mixed", "infer", {"fp8": True}),
    "siglip2-so400m training": ("siglip2-so400m", "mixed", "train", {}),
    "clip-l14": ("clip-l14", 128, "infer", {}),
    "dinov3-l16": ("dinov3-l16", 128, "infer", {}),
    "dinov3-l16 512": ("dinov3-l16", (32, 32), "infer", {}),
    "dinov3-l16 training": ("dinov3-l16", 64, "train", {}),
    "dinov2-b14": ("dinov2-b14", 32, "infer", {}),
    "siglip-so400m": ("siglip-so400m", 48, "infer", {}),
}
TURN_SECONDS = 0.25


def checkpoint(name: str, folder: Path) -> None:
    """Write small random weights of a published size, by transformers."""
    import torch

    hf: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    so400m = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    }
    made: dict[str, Any] = {
        "aimv2-large": lambda: hf.Aimv2VisionModel(
            hf.Aimv2VisionConfig(
                **large | {"num_attention_heads": 8, "intermediate_size": 2816},
                is_native=True,
                use_head=False,
            )
        ),
        "siglip2-so400m": lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(**so400m, vision_use_head=False)
        ),
        "clip-l14": lambda: hf.CLIPVisionModel(
            hf.CLIPVisionConfig(**large, patch_size=14, image_size=224)
        ),
        "dinov3-l16": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**large, patch_size=16, num_register_tokens=4)
        ),
        "dinov2-b14": lambda: hf.Dinov2Model(
            hf.Dinov2Config(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                patch_size=14,
                image_size=518,
            )
        ),
        "siglip-so400m": lambda: hf.SiglipVisionModel(
            hf.SiglipVisionConfig(**so400m, patch_size=14, image_size=378, vision_use_head=False)
        ),
    }
    made[name]().save_pretrained(folder)


def grid_of(name: str, what: Any) -> list[tuple[int, int, int]]:
    """Return a workload's images."""
    side = SIDES.get(name, 16)
    if what == "small":
        return [(1, 16, 16)] * 8
    if isinstance(what, tuple):
        return [(1, *what)] * 32
    if isinstance(what, int):
        return [(1, side, side)] * what
    draw, grid = random.Random(0), []
    while len(grid) < 52:
        area, aspect = draw.uniform(240, 1008), 2 ** draw.uniform(-1, 1)
        rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 240 <= rows * columns <= 1008:
            grid.append((1, rows, columns))
    return grid


def worker(folder: str, case: str) -> None:
    """Load one tree's encoder; then for each line read, run a turn and print its milliseconds."""
    import torch

    import packvit

    name, what, mode, options = CASES[case]
    grid = grid_of(name, what)
    encoder: Any = packvit.load(folder, device="cuda", dtype=torch.bfloat16, **options)
    patches = torch.randn(
        sum(rows * columns for _, rows, columns in grid),
        encoder.config.patch_dim,
        device="cuda",
        generator=torch.Generator("cuda").manual_seed(0),
    ).bfloat16()
    grid_thw, model = torch.tensor(grid), encoder
    if "lora" in mode:
        import peft

        from packvit.training.blocks import block_linears

        made = peft.LoraConfig(r=16, target_modules=block_linears(encoder))
        model = peft.get_peft_model(encoder, made, autocast_adapter_dtype=False)

    def once() -> torch.Tensor:
        if "train" in mode:
            tokens = model(patches, grid_thw)
            tokens.float().square().mean().backward()
            model.zero_grad()
            return tokens.detach()
        with torch.inference_mode():
            return model(patches, grid_thw)

    out = once()
    for _ in range(3):
        out = once()
    gradient = 0.0
    if "train" in mode:
        model(patches, grid_thw).float().square().mean().backward()
        wanted = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        gradient = torch.stack(wanted).norm().item() if wanted else 0.0
        print(len(wanted), "gradients", file=sys.stderr)
        model.zero_grad()
    torch.cuda.synchronize()
    start = time.perf_counter()
    once()
    torch.cuda.synchronize()
    count = max(1, round(TURN_SECONDS / (time.perf_counter() - start)))
    said = {"norm": out.float().norm().item(), "gradient": gradient, "attention": encoder.attention}
    print(json.dumps(said), flush=True)
    for _ in sys.stdin:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            once()
            if what == "small":
                torch.cuda.synchronize()  # from idle to idle
        torch.cuda.synchronize()
        print((time.perf_counter() - start) / count * 1e3, flush=True)


def compare(trees: list[Path], case: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the medians of both trees, and of the ratios after / before."""
    workers = []
    for tree in trees:
        path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--worker", str(folder), case]
        workers.append(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        )
    facts = [json.loads(each.stdout.readline() or "{}") for each in workers]  # pyright: ignore[reportOptionalMemberAccess]
    times: list[list[float]] = [[], []]
    draw = random.Random(0)
    for _ in range(rounds):
        for place in draw.sample((0, 1), 2):
            process = workers[place]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            times[place].append(float(process.stdout.readline()))
    for process in workers:
        process.communicate()
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return {
        "case": case,
        "before_ms": median(times[0]),
        "after_ms": median(times[1]),
        "after_over_before": middle,
        "quartiles": [low, high],
        "facts": facts,
    }


def main() -> None:
    """Compare two trees case by case, and print a line for each."""
    if "--worker" in sys.argv:
        worker(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no case after so long")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    import torch

    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "cases": [],
    }
    begun = time.monotonic()
    with TemporaryDirectory() as scratch:
        for case in asked.cases:
            if time.monotonic() - begun > asked.seconds:
                print(f"{case}: not begun, the time is over", flush=True)
                continue
            folder = Path(scratch) / CASES[case][0]
            if not folder.is_dir():
                made = [sys.executable, __file__, "--write", CASES[case][0], str(folder)]
                subprocess.run(made, check=True)
            try:
                found = compare([asked.before, asked.after], case, folder, asked.rounds)
            except (ValueError, BrokenPipeError, json.JSONDecodeError) as error:
                found = {"case": case, "error": str(error)}
            report["cases"].append(found)
            print(json.dumps(found), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    if "--write" in sys.argv:
        checkpoint(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
