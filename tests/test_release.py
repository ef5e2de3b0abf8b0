"""What `make dist` builds holds what it should, and works where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest
from packaging.metadata import Metadata
from PIL import Image

import packvit
from demo.photographs import photographs

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "demo", "docs", "packvit", "recipes", "tests")
FILES = ("LICENSE", "Makefile", "MANIFEST.in", "constraints.txt", "pyproject.toml")
CACHES = shutil.ignore_patterns("__pycache__", ".*")


def extras() -> set[str]:
    """Return the names of the extras that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints, in an environment that does not lead to the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout: a build writes into the tree that it builds."""
    source = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=CACHES)
    for file in [*(ROOT / name for name in FILES), *ROOT.glob("*.md")]:
        shutil.copy(file, source)
    return source


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the command of `make dist` wrote: the sdist, and the wheel built from it."""
    dist = tmp_path_factory.mktemp("dist")
    command = re.findall(r"python (-m build.*)", (ROOT / "Makefile").read_text())
    assert len(command) == 1
    shutil.copytree(source, dist / "tree")
    run(sys.executable, *command[0].split(), "--outdir", dist, cwd=dist / "tree")
    return dist


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(source: Path, dist: Path):
    [wheel] = dist.glob("*.whl")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"packvit/{name}" for name in files_of(source / "packvit")}
    assert {"packvit/py.typed", "packvit/models/tiny/model.safetensors"} <= names


def test_the_sdist_holds_what_the_tests_and_the_makefile_need(source: Path, dist: Path):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files_of(source) <= names


def test_the_wheels_metadata_is_valid_and_says_what_pyproject_says(dist: Path):
    [wheel] = dist.glob("*.whl")
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(name), validate=True)
        assert metadata.license_files == ["LICENSE"]
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert str(metadata.version) == packvit.__version__
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description is not None
    assert metadata.description.strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.provides_extra or ()) == extras()


@pytest.mark.soak
def test_an_installed_wheel_works_away_from_the_checkout(dist: Path, tmp_path: Path):
    """The wheel is installed by pip; its dependencies are those of this environment."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    [packages] = fresh.glob("lib/python*/site-packages")
    [wheel] = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", fresh / "bin" / "python", "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # Only now: pip would take a packvit of this environment for the one to install. A .pth file
    # in these folders, such as an editable installation's, is not read.
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))

    # As the messages advise: packvit itself is asked of no index once it is installed.
    said = run(*pip, "--no-index", "--dry-run", "packvit[reference,ray,demo,train]", cwd=tmp_path)
    assert "Would install" not in said

    command = fresh / "bin" / "packvit"
    survey = json.loads(run(command, "info", "--json", cwd=tmp_path))
    assert Path(survey["embedded"]["tiny"]) == packages / "packvit" / "models" / "tiny"
    assert survey["machine"]["packvit"] == packvit.__version__

    paths = [str(path) for path in photographs()]
    run(command, "embed", *paths, "--model", "tiny", "--out", "features", cwd=tmp_path)
    table = pq.read_table(tmp_path / "features" / "data/part-00000.parquet")
    assert table["status"].to_pylist() == ["ok"] * len(paths)
    packvit.embed(paths, model="tiny", out=tmp_path / "ours")
    assert table.equals(pq.read_table(tmp_path / "ours" / "data/part-00000.parquet"))

    Image.open(paths[1]).convert("RGB").save(tmp_path / "cat.jpg")
    Image.open(paths[2]).save(tmp_path / "street.png")
    example = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[0]
    (tmp_path / "example.py").write_text(f"{example}\nprint(packvit.__file__, vectors.shape)\n")
    printed = run(fresh / "bin" / "python", "example.py", cwd=tmp_path)
    said = printed.splitlines()[-1].split(maxsplit=1)  # what it prints itself, test_docs.py reads
    assert Path(said[0]) == packages / "packvit" / "__init__.py"
    vectors = packvit.load("tiny").embed([tmp_path / "cat.jpg", tmp_path / "street.png"])
    assert said[1].strip() == str(vectors.shape)


@pytest.mark.parametrize("folder", ["packvit", "demo", "docs", "recipes", "README.md"])
def test_advice_to_install_an_extra_names_one_that_exists(folder: str):
    path = ROOT / folder
    texts = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.md")]
    advised = {
        name.strip()
        for text in texts
        for names in re.findall(r"packvit\[([^\]]*)\]", text.read_text())
        for name in names.split(",")
    }
    advised.discard("{protocol}")  # of an object store: tests of stores ask for each
    assert advised <= extras()
    assert advised or folder == "recipes"
