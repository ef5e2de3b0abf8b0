"""Limit the size of a page of links, which fsspec reads whole into the main process. No torch."""

from functools import lru_cache
from typing import Any

from packvit.images.decode import ImageError

MOST_PAGE = 32 << 20  # bytes after decompression: some 300,000 links


async def get_bounded_client(**options: Any) -> Any:
    """Return the session that fsspec asks for, of responses that are read up to `MOST_PAGE`.

    It has fsspec's own signature: whatever fsspec gives goes to aiohttp.
    """
    import aiohttp

    return aiohttp.ClientSession(response_class=bounded_response(), **options)


@lru_cache(maxsize=1)
def bounded_response() -> Any:
    """Return the class of such responses; aiohttp is imported only when a URL is read."""
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        """A response whose whole body may have `MOST_PAGE` bytes."""

        async def read(self) -> bytes:
            """Return the body.

            Raises: ImageError unreadable if it is longer.
            """
            if self._body is None:
                body = bytearray()
                async for chunk in self.content.iter_any():
                    body += chunk
                    if len(body) > MOST_PAGE:
                        self.close()
                        note = f"a page of over {MOST_PAGE >> 20} MiB"
                        raise ImageError("unreadable", "list", note)
                self._body = bytes(body)
            return self._body

    return BoundedResponse
