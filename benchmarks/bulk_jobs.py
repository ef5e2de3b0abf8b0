"""One job of `benchmarks.bulk`: a folder of photographs to Parquet files of paths and vectors.

Each peer is set up as its documentation shows: the decoding that it brings, the processes that it
suggests, on a GPU also the resizing there where torchvision can. All take CLIP's projected vector
of the same checkpoint, in fp32 on a CPU and in bf16 on a GPU, in batches of 32 or 256. Prints one
JSON object: seconds.

python -m benchmarks.bulk_jobs NAME PHOTOS MODEL OUT
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CPUS = len(os.sched_getaffinity(0))
MARK = "PACKVIT_BULK"  # in the environment of all processes of a job


def on_gpu() -> bool:
    """Return whether there is a GPU to encode on."""
    import torch

    return torch.cuda.is_available()


def batch_size() -> int:
    """Return how many images peers encode at a time."""
    return 256 if on_gpu() else 32


class Transformers:
    """A batch of images to vectors, by transformers alone."""

    def __init__(self, model: str, threads: int | None = None) -> None:
        import torch
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

        if threads:
            torch.set_num_threads(threads)
        self.device = "cuda" if on_gpu() else "cpu"
        dtype = torch.bfloat16 if on_gpu() else torch.float32
        found: Any = CLIPVisionModelWithProjection.from_pretrained(model, dtype=dtype)
        self.model = found.to(self.device).eval()
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.resizing = {"device": self.device} if find_spec("torchvision") else {}

    def embed(self, images: Sequence[Any]) -> Any:
        """Return vectors [N, E]."""
        import torch

        with torch.inference_mode():
            made = self.processor(images=list(images), return_tensors="pt", **self.resizing)
            pixels = made["pixel_values"]
            found = self.model(pixels.to(self.device, self.model.dtype)).image_embeds
            return found.float().cpu().numpy()


class RayBatches(Transformers):
    """What Ray Data calls with a batch."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return paths and vectors."""
        return {"path": batch["path"], "vector": self.embed(batch["image"])}


def run_packvit(photos: str, model: str, out: str) -> None:
    """Embed by `packvit.embed`, as it comes."""
    import packvit

    packvit.embed(photos, out=out, model=model)


def run_packvit_gpu(photos: str, model: str, out: str) -> None:
    """Embed by `packvit.embed` with the GPU's JPEG decoder."""
    import packvit

    packvit.embed(photos, out=out, model=model, decode="gpu")


def run_packvit_processes(photos: str, model: str, out: str) -> None:
    """Embed by `packvit.embed` with a process for each CPU or GPU."""
    import torch

    import packvit

    count = torch.cuda.device_count() if on_gpu() else CPUS
    packvit.embed(photos, out=out, model=model, processes=count)


def run_ray(photos: str, model: str, out: str) -> None:
    """Embed by Ray Data: readers of images, and an actor for each GPU or CPU."""
    import ray
    import ray.data

    # One CPU more than there are, for the readers beside an actor on each.
    ray.init(num_cpus=CPUS + 1, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    images = ray.data.read_images(photos, include_paths=True, mode="RGB")
    vectors = images.map_batches(
        RayBatches,
        fn_constructor_args=(model,),
        batch_size=batch_size(),
        num_gpus=1 if on_gpu() else None,
        concurrency=1 if on_gpu() else CPUS,
    )
    vectors.write_parquet(out)


def run_daft(photos: str, model: str, out: str) -> None:
    """Embed by Daft and a class of transformers: its own image provider wants torchvision."""
    import daft  # pyright: ignore[reportMissingImports] # a peer, installed for this alone
    from daft.functions import (  # pyright: ignore[reportMissingImports]
        decode_image,
        download,
    )

    encoder = Transformers(model)  # loaded before Daft's threads want it at once

    @daft.cls(gpus=1 if on_gpu() else 0, max_concurrency=1)
    class Embed:
        def __init__(self) -> None:
            self.encoder = encoder

        @daft.method.batch(
            return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=batch_size()
        )
        def embed(self, images: daft.Series) -> list[Any]:
            found = images.to_pylist()
            good = [place for place, image in enumerate(found) if image is not None]
            vectors: list[Any] = [None] * len(found)
            chosen = self.encoder.embed([found[place] for place in good]) if good else []
            for place, vector in zip(good, chosen, strict=True):
                vectors[place] = vector.tolist()
            return vectors

    data = download(daft.col("path"), on_error="null")
    image = decode_image(data, on_error="null", mode="RGB")
    found = daft.from_glob_path(f"{photos}/*").with_column("image", image)
    found = found.with_column("vector", Embed().embed(daft.col("image")))
    found.select("path", "vector").write_parquet(out)


def run_datasets(photos: str, model: str, out: str) -> None:
    """Embed by `datasets.map` in a process for each CPU; in this one on a GPU."""
    import datasets
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    cache = f"{out}-cache"
    found: Any = datasets.load_dataset(
        "imagefolder", data_dir=photos, split="train", cache_dir=cache
    )
    held = found.cast_column("image", datasets.Image(decode=False))["image"]
    found = found.add_column("path", [each["path"] for each in held])
    loaded: dict[int, Transformers] = {}  # by process, for the function is copied to each

    def embed(batch: Mapping[str, Any]) -> dict[str, Any]:
        if os.getpid() not in loaded:
            loaded[os.getpid()] = Transformers(model, None if on_gpu() else 1)
        images = [image.convert("RGB") for image in batch["image"]]
        return {"path": batch["path"], "vector": list(loaded[os.getpid()].embed(images))}

    done = found.map(
        embed,
        batched=True,
        batch_size=batch_size(),
        remove_columns=found.column_names,
        num_proc=None if on_gpu() else CPUS,
    )
    Path(out).mkdir(exist_ok=True)
    pq.write_table(done.with_format("arrow")[:], f"{out}/vectors.parquet")


def run_sentence_transformers(photos: str, model: str, out: str) -> None:
    """Embed by sentence-transformers' `encode`."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sentence_transformers import (  # pyright: ignore[reportMissingImports] # a peer
        SentenceTransformer,
    )

    dtype = "bfloat16" if on_gpu() else "float32"
    encoder: Any = SentenceTransformer(model, model_kwargs={"dtype": dtype})
    paths = sorted(str(path) for path in Path(photos).iterdir())
    Path(out).mkdir(exist_ok=True)
    for start in range(0, len(paths), 1024):  # files that are open at once
        named = paths[start : start + 1024]
        vectors = encoder.encode([Image.open(path) for path in named], batch_size=batch_size())
        table = pa.table({"path": named, "vector": list(vectors)})
        pq.write_table(table, f"{out}/{start:09d}.parquet")


JOBS: dict[str, Callable[[str, str, str], None]] = {
    "packvit": run_packvit,
    "packvit --processes": run_packvit_processes,
    "packvit --decode gpu": run_packvit_gpu,
    "Ray Data": run_ray,
    "Daft": run_daft,
    "datasets.map": run_datasets,
    "sentence-transformers": run_sentence_transformers,
}


def marked(mark: str) -> list[int]:
    """Return the processes whose environment has a mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process, or 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run one job and print what it took."""
    name, photos, model, out = sys.argv[1:]
    start = time.perf_counter()
    JOBS[name](photos, model, out)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
