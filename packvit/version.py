"""Which version of packvit this is, and of any other package: one function says it everywhere."""

import re

VERSION = "0.1.0"

# The newest version of each package that the tests have run with.
TESTED = {
    "torch": "2.13",
    "transformers": "5.24",
    "numpy": "2.4",
    "pillow": "13.0",
    "pyarrow": "26.0",
    "safetensors": "0.8",
    "huggingface_hub": "2.4",
    "fsspec": "2026.9",
    "flash-attn-4": "4.0.0b36",
}


def version_of(package: str) -> str:
    """Return the version of an installed package, or words for its absence.

    It is the version that pip shows: `torch.__version__` can have the CUDA version behind it, and
    the same torch would then be taken for two.
    """
    if package == "packvit":
        return VERSION
    from importlib import metadata  # takes 24 ms, which a decode worker does not need

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def newer_than_tested() -> dict[str, str]:
    """Return the installed version of each package that is newer than the newest we have tested."""
    found = {package: version_of(package) for package in TESTED}
    return {
        package: version
        for package, version in found.items()
        if version[0].isdigit() and is_newer(version, TESTED[package])
    }


def is_newer(version: str, tested: str) -> bool:
    """Return whether a version is newer than a tested one, in the numbers that the latter has.

    A beta, 4.0.0b36, comes before the release of its numbers.
    """
    numbers, last = parse(version), parse(tested)
    if len(last[0]) < 3:  # 2.13 stands for 2.13.1 too
        return numbers[0][: len(last[0])] > last[0]
    return numbers > last


def parse(version: str) -> tuple[tuple[int, ...], float]:
    """Return a version's numbers, and its beta, infinite for a release."""
    found = re.match(r"(\d+(?:\.\d+)*)(?:(?:a|b|rc|\.dev)(\d+))?", version)
    assert found is not None  # every version starts with a number
    beta = float(found[2]) if found[2] else float("inf")
    return tuple(int(part) for part in found[1].split(".")), beta
