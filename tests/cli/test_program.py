"""The command as a process: what it imports for a job, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rotten import write_good
from small_checkpoint import write_checkpoint

from packvit.corpus.decode.processes import Worker

# Each takes a job from 20 ms to seconds to import, and none needs it.
UNNEEDED = {
    "transformers",
    "huggingface_hub",
    "fsspec",
    "pandas",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "pyarrow.compute",
    "pyarrow.dataset",
    "rich",
}


def test_a_job_of_local_files_imports_only_what_it_needs_and_ends_when_it_is_done(tmp_path: Path):
    write_good(tmp_path / "photos", 2)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"")
    words = ["embed", "photos", "--model", str(write_checkpoint(tmp_path / "model"))]
    words += ["--out", "out", "--device", "cpu", "--json"]
    # An object that Python would take apart at its end, after what is registered for it.
    code = (
        "import atexit, json, sys; from packvit.cli.program import run\n"
        "class Late:\n    def __del__(self): print('late', flush=True)\n"
        "late = Late(); late.itself = late\n"
        "atexit.register(lambda: json.dump([*sys.modules], open('modules', 'w')))\n"
        "run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["ok"] == 2  # it is whole, and nothing comes behind it
    imported = set(json.loads((tmp_path / "modules").read_text()))
    assert "torch" in imported
    assert not UNNEEDED & imported


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_decode_worker_loads_neither_torch_nor_pyarrow(tmp_path: Path):
    from packvit.config import HALF_STATISTICS, ImageConfig
    from packvit.corpus.decode.prepare import Preprocessing
    from packvit.corpus.inputs.sources import Input

    (name,) = write_good(tmp_path, 1)
    images = ImageConfig(14, *HALF_STATISTICS, "bicubic", None)
    how = Preprocessing(images, "hwc", "native", 64, 10**7)
    worker = Worker()
    try:
        (prepared,), _ = worker.prepare(
            [Input(name, str(tmp_path / name))], how, lambda pixels: None, 60.0
        )
        assert prepared.row.status == "ok"
        mapped = Path(f"/proc/{worker.process.pid}/maps").read_text()
    finally:
        worker.end()
    loaded = {Path(line.split()[-1]).name for line in mapped.splitlines() if "/" in line}
    assert any(name.startswith("_multiarray_umath") for name in loaded)  # numpy, for comparison
    for library in ("libtorch", "libarrow", "libtriton"):
        assert not any(name.startswith(library) for name in loaded)
