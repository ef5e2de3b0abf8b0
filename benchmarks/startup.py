"""How long `import packvit` and `packvit --help` take, beside Python alone and `import torch`.

python -m benchmarks.startup
"""

import json
import subprocess
import sys
from functools import partial

from packvit.bench.measuring import interleave, median_ms, times_faster, where

BASELINE = "python alone"
COMMANDS = {
    BASELINE: ["-c", "pass"],
    "import packvit": ["-c", "import packvit"],
    "packvit --help": ["-m", "packvit", "--help"],
    "packvit embed --help": ["-m", "packvit", "embed", "--help"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    """Print one JSON object with the machine and the results."""
    runs = {
        name: partial(subprocess.run, [sys.executable, *words], capture_output=True, check=True)
        for name, words in COMMANDS.items()
    }
    taken = interleave(runs, rounds=15, warmup=2)
    results = {
        name: {
            "median_ms": median_ms(taken, name),
            "times_faster_than_baseline": times_faster(taken, name, BASELINE),
        }
        for name in runs
    }
    json.dump(where() | {"baseline": BASELINE, "results": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
