"""Print the paths of eight real photographs that come with scikit-image and scikit-learn.

Both libraries keep other pictures beside them, so they are named one by one.
"""

from importlib.util import find_spec
from pathlib import Path

NAMES = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def photographs() -> list[Path]:
    """Return the paths; the libraries themselves are found, and not imported."""
    paths = []
    for library, names in NAMES.items():
        spec = find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{library} is not installed. Install: pip install 'packvit[demo]'")
        paths += [Path(spec.submodule_search_locations[0]) / name for name in names]
    return paths


if __name__ == "__main__":
    print(*photographs(), sep="\n")
