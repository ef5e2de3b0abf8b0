"""What a server, a hub or an archive has for tests, and what became of it."""

import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rotten import write_good

from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.sources import read
from packvit.images.errors import ImageError


def outcome(listing: Listing) -> dict[str, str | bytes]:
    """Return what each input's bytes are, or the code of why there are none."""
    found: dict[str, str | bytes] = {}
    for source in listing:
        if source.error:
            found[source.id] = source.error[0]
            continue
        try:
            found[source.id] = read(pickle.loads(pickle.dumps(source)))
        except ImageError as error:
            found[source.id] = error.code
    return found


def outcome_of(*paths: str, lists: Sequence[str] = ()) -> dict[str, str | bytes]:
    """Return the outcome of what paths, and lists of paths, name."""
    return outcome(list_inputs(paths, lists))


def write_served(count: int) -> dict[str, bytes]:
    """Write photographs into a folder, a tar and a Parquet file; return those of the folder.

    `count` are in the folder itself, and two in one below.
    """
    write_good(Path("photos"), count)
    write_good(Path("photos/more"), 2)
    Path("photos/notes.txt").write_text("no photograph")
    paths = sorted(Path("photos").rglob("good*"))
    with tarfile.open("x.tar", "w") as tar:
        for path in paths:
            tar.add(path)
    rows = [{"bytes": path.read_bytes(), "path": str(path)} for path in paths]
    pq.write_table(pa.table({"image": rows}), "x.parquet")
    return {str(path.relative_to("photos")): path.read_bytes() for path in paths}
