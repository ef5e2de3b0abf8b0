"""What a job on a GPU imports ahead of its first forward, and what it leaves out."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from packvit.fast import imports
from packvit.fast.imports import import_ahead, import_sparing

PACKAGE = {
    "operators/__init__.py": "from operators.patches import PATCHED\n"
    "from operators.softmax import softmax\n__version__ = '2.1'\n",
    "operators/patches.py": "PATCHED = True\n",
    "operators/softmax.py": "import operators_compiler\n\ndef softmax() -> str:\n"
    "    return operators_compiler.NAME\n",
    "operators/layouts.py": "ROWS = 3\n",
    "operators_compiler.py": "NAME = 'compiled'\n",
    "attention_kernels.py": "import sys\nfrom operators import layouts\n"
    "import operators.layouts as again\n"
    "AFTER_PATCHES = 'operators.patches' in sys.modules\nROWS = again.ROWS\n",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    names = [name.removesuffix(".py").replace("/", ".") for name in PACKAGE]
    for name in ("operators", *names):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("packages")
def test_a_package_is_run_whole_only_once_something_of_its_own_is_asked_for() -> None:
    import_sparing("attention_kernels", "operators", first=("operators.patches",))
    found = sys.modules["attention_kernels"]
    assert found.ROWS == 3
    assert found.AFTER_PATCHES
    assert "operators_compiler" not in sys.modules

    from operators import softmax  # pyright: ignore[reportMissingImports]

    assert softmax() == "compiled"
    assert sys.modules["operators"].__version__ == "2.1"


@pytest.mark.usefixtures("packages")
def test_a_package_that_is_imported_already_is_taken_as_it_is() -> None:
    import operators  # pyright: ignore[reportMissingImports]

    import_sparing("attention_kernels", "operators", first=("operators.patches",))
    assert sys.modules["operators"] is operators
    assert callable(operators.softmax)


@pytest.mark.usefixtures("packages")
def test_two_threads_may_ask_a_package_for_what_it_has_not_run_yet(tmp_path: Path) -> None:
    slow = "import time\ntime.sleep(0.2)\nNAME = 'compiled'\n"
    (tmp_path / "operators_compiler.py").write_text(slow)
    import_sparing("attention_kernels", "operators", first=())
    operators = sys.modules["operators"]
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(lambda name: getattr(operators, name)(), ["softmax"] * 2)] == [
            "compiled",
            "compiled",
        ]
    assert not hasattr(operators, "nothing")


def test_one_thread_a_process_imports_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that import modules with circles among them would give each other half of one."""
    calls: list[None] = []
    monkeypatch.setattr(imports, "import_kernels", lambda: calls.append(None))
    import_ahead.cache_clear()
    threads = {import_ahead() for _ in range(3)}
    for thread in threads:
        thread.join()
    import_ahead.cache_clear()
    assert len(calls) == len(threads) == 1


@pytest.mark.skipif(
    not (find_spec("flash_attn") and find_spec("flash_attn.cute") and find_spec("triton")),
    reason="flash-attn-4 is not installed",
)
def test_flash_attention_is_imported_without_the_compiler_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from packvit.fast.imports import import_kernels; import_kernels();"
        "sys.exit('torch._dynamo' in sys.modules or 'flash_attn.cute' not in sys.modules)"
    )
    told = os.environ | {"PACKVIT_CACHE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=told, check=False).returncode == 0
