"""Print pyproject's floors as pip's constraints: `python tests/floors.py > floors.txt`."""

import re
import tomllib
from pathlib import Path
from typing import Any

# What runs where there is no GPU; `dev` names the other extras that tests need.
# Linters are left out, since no test runs them.
EXTRAS = ("reference", "ray", "demo", "train", "dev")
LINTERS = ("import-linter", "pyright", "ruff")


def floors(project: dict[str, Any]) -> dict[str, str]:
    """Return the lowest version that each requirement allows, by package."""
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for name in EXTRAS for r in extras[name])]
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement)
        if match and match[1] not in LINTERS:
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    for name, version in floors(project["project"]).items():
        print(f"{name}=={version}")
