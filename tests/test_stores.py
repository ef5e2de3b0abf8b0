"""Every block of docs/stores.md finds what packvit finds, where its store is installed."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import packvit
from demo.photographs import photographs
from packvit.retrieval.folders import open_vectors
from packvit.retrieval.search import scan

PAGE = (Path(__file__).parents[1] / "docs" / "stores.md").read_text()
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```", PAGE, re.S | re.M))
LIGHT = ("duckdb", "faiss", "usearch")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    packvit.embed([str(path) for path in photographs()], out=folder / "features", model="tiny")
    return folder


@pytest.mark.parametrize(
    "store",
    [each if each in LIGHT else pytest.param(each, marks=pytest.mark.soak) for each in BLOCKS],
)
def test_a_store_finds_the_neighbours_that_packvit_finds(
    work: Path, store: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others, while they are imported
        pytest.importorskip(store)
        names: dict[str, Any] = {}
        [first] = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
        exec(compile(first, "docs", "exec"), names)
        query = names["vectors"][:1].copy()
        exec(compile(BLOCKS[store], "docs", "exec"), names)
    _, rows = scan(open_vectors("features"), np.asarray(query), 3, "cpu")
    assert names["nearest"] == [names["ids"][row] for row in rows[0]]


def test_the_page_names_the_five_stores():
    assert sorted(BLOCKS) == ["duckdb", "faiss", "lancedb", "qdrant_client", "usearch"]
