from collections.abc import Iterator

import pytest
from object_store import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server
