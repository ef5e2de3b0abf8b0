"""Which version of packvit this is, and of any other package: one function says it everywhere."""

from importlib import metadata

VERSION = "0.1.0"


def version_of(package: str) -> str:
    """Return the version of an installed package, or words for its absence.

    It is the version that pip shows: `torch.__version__` can have the CUDA version behind it, and
    the same torch would then be taken for two.
    """
    if package == "packvit":
        return VERSION
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
