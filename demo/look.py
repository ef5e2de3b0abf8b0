"""Print what is in a feature folder: every row, and each photograph's nearest neighbour.

python -m demo.look demo-features
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds


def main() -> None:
    """Read the folder as any Parquet reader would."""
    folder = Path(sys.argv[1])
    manifest = json.loads((folder / "_manifest.json").read_text())
    rows = ds.dataset(folder).to_table().to_pylist()
    print(f"\n{folder}: {len(rows)} rows, pooled = {manifest['pooled']}")
    good = [row for row in rows if row["status"] == "ok"]
    vectors = np.array([row["pooled"] for row in good])
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T - 2 * np.eye(len(good))
    print(f"{'photograph':<22}{'pixels':>12}{'patches':>10}  nearest among the others")
    for row, alike in zip(good, likeness, strict=True):
        nearest = good[int(alike.argmax())]
        print(
            f"{Path(row['id']).name:<22}{row['width']:>7}x{row['height']:<4}"
            f"{row['rows']:>6}x{row['columns']:<3}  "
            f"{Path(nearest['id']).name} (cosine {alike.max():.3f})"
        )


if __name__ == "__main__":
    main()
