"""The command as a process: what it imports for a job, and how it ends."""

import json
import signal
import subprocess
import sys
from functools import partial
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


@pytest.mark.parametrize(
    ("module", "swallow"),
    [
        ("click", "()"),  # before there is a command
        ("packvit.cli.embed", "()"),
        ("packvit.corpus.job", "BaseException"),  # as parts of torch do while they are imported
    ],
)
def test_ctrl_c_during_any_import_ends_a_command_with_130_and_one_sentence(
    tmp_path: Path, module: str, swallow: str
):
    # Once it is raised in code given as a string, Python ends by SIGINT, however it is handled.
    code = (
        "import os, signal, sys\n"
        "from contextlib import suppress\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            with suppress({swallow}): exec('signal.raise_signal(signal.SIGINT)')\n"
        "from packvit.__main__ import run\n"
        "sys.meta_path.insert(0, Finder)\n"
        "run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "embed", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        # These tests may themselves run in a shell's background, which ignores SIGINT for them.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Stopped")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_under_what_is_printed_is_one_sentence():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "packvit", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no space is left on the device" in done.stderr
