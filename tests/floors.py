"""Print pyproject's floors as pip's constraints: `python tests/floors.py > floors.txt`."""

import re
import tomllib
from pathlib import Path
from typing import Any

# Left out, since no test runs them.
LINTERS = ("import-linter", "pyright", "ruff")


def floors(project: dict[str, Any]) -> dict[str, str]:
    """Return the lowest version that each requirement of the package and its tests allows."""
    extras = project["optional-dependencies"]
    (tested,) = (r for r in extras["dev"] if r.startswith("packvit["))
    names = ["dev", *re.findall(r"[\w-]+", tested)[1:]]
    found = {}
    for requirement in [*project["dependencies"], *(r for name in names for r in extras[name])]:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement)
        if match and match[1] not in LINTERS:
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    for name, version in floors(project["project"]).items():
        print(f"{name}=={version}")
