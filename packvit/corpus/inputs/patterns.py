"""Patterns such as photos/**/*.jpg: the folder they start in, and the names they match."""

import re

from packvit.corpus import UsageError

MAGIC = re.compile(rb"[*?]|\[[^\]]+\]")
MAGIC_URL = re.compile(rb"\*|\[[^\]]+\]")  # a question mark begins a URL's query


def split(path: bytes, magic: re.Pattern[bytes] = MAGIC) -> tuple[bytes, bytes]:
    """Return the folder that a pattern starts in, with its slash, and the rest, or b""."""
    found = magic.search(path)
    if found is None:
        return path, b""
    start = path.rfind(b"/", 0, found.start()) + 1
    return path[:start], path[start:]


def depth(pattern: bytes) -> int | None:
    """Return how many folders deep a pattern matches, or None if unlimited."""
    parts = pattern.split(b"/")
    return None if b"**" in parts else len(parts) - 1


def compile_pattern(pattern: bytes) -> re.Pattern[bytes]:
    """Return a regular expression that matches the same whole names as `pattern`.

    `**` stands for any number of folders; `*`, `?` and `[...]` stay within one. Names that begin
    with a dot are matched as any other.
    """
    parts = pattern.split(b"/")
    words = []
    for part in parts[:-1]:
        words.append(rb"(?:[^/]+/)*" if part == b"**" else translate(part) + b"/")
    words.append(rb"(?:[^/]+/)*[^/]+" if parts[-1] == b"**" else translate(parts[-1]))
    try:
        return re.compile(b"".join(words), re.DOTALL)
    except re.error as error:
        shown = pattern.decode("utf-8", "backslashreplace")
        raise UsageError(
            f"{shown} is not a valid pattern: a range in [...] is reversed."
        ) from error


def translate(part: bytes) -> bytes:
    """Return the expression for one part between slashes."""
    words = re.split(rb"(\*+|\?|\[!?\]?[^\]]*\])", part)
    plain = {b"?": b"[^/]"}
    for place, word in enumerate(words):
        if place % 2 == 0:
            words[place] = re.escape(word)
        elif word.startswith(b"["):
            inside = word[1:-1]
            sign, inside = (b"^/", inside[1:]) if inside.startswith(b"!") else (b"", inside)
            words[place] = b"[" + sign + re.sub(rb"([\\\[\]&~|^])", rb"\\\1", inside) + b"]"
        else:
            words[place] = plain.get(word, b"[^/]*")
    return b"".join(words)
