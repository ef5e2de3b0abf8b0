"""Find the directory of a zip file, without reading it. No torch.

Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3.14 to 4.3.16.
"""

import os
import struct
from dataclasses import dataclass
from typing import Any

from packvit.images.errors import ImageError

END, END64, FINDER = b"PK\5\6", b"PK\6\6", b"PK\6\7"
END_SIZE, END64_SIZE, FINDER_SIZE = 22, 56, 20
MOST_COMMENT = 65535


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the members of a zip are listed, and what is to be added to their offsets."""

    start: int
    size: int
    before: int  # bytes before the zip, as a program that unpacks itself has


def find_directory(file: Any) -> Directory:
    """Return where the directory of an open zip is.

    Raises: ImageError truncated if there is none.
    """
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - END_SIZE - MOST_COMMENT - FINDER_SIZE - END64_SIZE)
    file.seek(tail_start)
    tail = file.read(length - tail_start)
    at = tail.rfind(END)
    if at < 0 or at + END_SIZE > len(tail):
        raise ImageError("truncated", "list")
    size, start = struct.unpack_from("<II", tail, at + 12)
    end = at
    finder = at - FINDER_SIZE
    if finder >= 0 and tail.startswith(FINDER, finder):
        end = finder - END64_SIZE
        if end < 0 or not tail.startswith(END64, end):
            raise ImageError("truncated", "list")
        size, start = struct.unpack_from("<QQ", tail, end + 40)
    before = tail_start + end - size - start
    if before < 0 or size > length:
        raise ImageError("truncated", "list")
    return Directory(start + before, size, before)
