"""P1: what the package imports is what pyproject.toml declares."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from floors import floors

import packvit
from packvit.checkpoints.files import Checkpoint
from packvit.verification.certificate import FORMAT, why_not
from packvit.verification.machine import machine
from packvit.version import version_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}  # the rest is named alike
# Modules of an extra, and what else comes with torch for CUDA or is built by hand.
OPTIONAL = {
    "transformers": {"reference": "transformers"},
    "ray": {"ray": "ray"},
    "timm": {"bench": "timm"},
    "pi_heif": {"heic": "pi-heif"},
    "aiohttp": {"http": "aiohttp"},
    "usearch": {"search": "usearch"},
    "flash_attn": {"flash": "flash-attn", "hopper": "flash-attn-4"},
}
UNDECLARED = {"triton": "comes with torch for CUDA", "flash_attn_interface": "is built by hand"}


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}  # pyright: ignore[reportOptionalSubscript]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield the first part of each imported name, and whether importing the file imports it."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "packvit has no relative imports"
            yield str(node.module).partition(".")[0], at_once
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not inside)

    return walk(ast.parse(source), True)


def undeclared(file: str, source: str) -> list[str]:
    """Return what is wrong with the imports of a file."""
    wrong, core = [], declared(PROJECT["dependencies"])
    for name, at_once in imports(source):
        if name == "packvit" or name in sys.stdlib_module_names:
            continue
        if DISTRIBUTIONS.get(name, name) in core:
            continue
        if name not in OPTIONAL and name not in UNDECLARED:
            wrong.append(f"{file} imports {name}, which pyproject.toml does not declare")
        elif at_once and not (
            name == "triton" and file.split("/")[-2:-1] in (["kernels"], ["gpu"])
        ):
            wrong.append(f"{file} imports {name} at once, but it is optional")
    return wrong


def test_every_import_is_a_declared_dependency():
    files = sorted((ROOT / "packvit").rglob("*.py"))
    assert len(files) > 100
    for file in files:
        assert undeclared(str(file.relative_to(ROOT)), file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import httpx",
        "def f():\n    from httpx import HTTPError",
        "import transformers",
        "import ray.data",
    ],
)
def test_an_import_that_is_not_declared_is_found_wherever_it_stands(source: str):
    assert len(undeclared("packvit/example.py", source)) == 1


def test_every_dependency_is_imported_and_every_optional_one_is_in_its_extra():
    texts = [file.read_text("utf-8") for file in (ROOT / "packvit").rglob("*.py")]
    names = {DISTRIBUTIONS.get(name, name) for text in texts for name, _ in imports(text)}
    assert declared(PROJECT["dependencies"]) - names == set()
    for extras in OPTIONAL.values():
        for extra, distribution in extras.items():
            assert distribution in declared(PROJECT["optional-dependencies"][extra])
            assert any(f"packvit[{extra}]" in text for text in texts)  # the line that installs it


@pytest.mark.parametrize(
    ("module", "extra", "code"),
    [
        (
            "transformers",
            "reference",
            "from packvit.cli import main; main(['verify', '--model', 'tiny'])",
        ),
        (
            "transformers",
            "reference",
            "from packvit.checkpoints.in_memory import read_model; import torch\n"
            "model = torch.nn.Linear(1, 1); model.config = type('C', (), {'to_dict': dict})()\n"
            "read_model(model)",
        ),
        (
            "ray",
            "ray",
            "from packvit.cli import main\n"
            "main(['embed', 'docs', '--model', 'tiny', '--out', 'never', '--ray', 'local'])",
        ),
    ],
)
def test_the_absence_of_an_optional_package_is_answered_with_the_line_that_installs_it(
    module: str, extra: str, code: str
):
    code = f"import sys; sys.modules[{module!r}] = None\n{code}"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode != 0
    assert re.search(rf"pip install ['\"]packvit\[{extra}\]['\"]", ran.stderr), ran.stderr


def test_every_floor_of_the_core_is_one_that_test_floors_installs():
    """P3 and P6: what depends on versions is tested at the floors, and with the newest."""
    runs, targets = (ROOT / ".ci/run").read_text(), (ROOT / "Makefile").read_text()
    assert {"make test", "make test-newest"} <= set(runs.splitlines())
    assert all(f"\n{name}: " in targets for name in ("test", "test-newest", "test-floors"))
    assert declared(PROJECT["dependencies"]) <= floors(PROJECT).keys()


def test_one_function_says_a_version(monkeypatch: pytest.MonkeyPatch):
    """P5: torch of CUDA's wheels calls itself 2.14.1+cu130, and its package 2.14.1."""
    monkeypatch.setattr(torch, "__version__", f"{metadata.version('torch')}+cu130")
    assert machine()["torch"] == version_of("torch") == metadata.version("torch")
    made = {"format": FORMAT, "passed": True, "machine": machine(), "models": []}
    checkpoint = Checkpoint("example", None, {}, None, {})
    said = why_not(made, checkpoint, "0" * 64, device="cpu", dtype="float32", backend="sdpa")
    assert said == "it is for other weights"  # and not of another torch
    assert machine()["packvit"] == packvit.__version__ == PROJECT["version"]


def test_no_other_module_asks_for_a_version():
    files = [f for f in (ROOT / "packvit").rglob("*.py") if f.name != "version.py"]
    asking = [
        f for f in files if re.search(r"importlib.metadata|torch\.__version__", f.read_text())
    ]
    assert asking == []
