"""What a URL may reach, and how it is spelled for people: without its credentials. No torch.

fsspec opens far more than photographs need, `reference://` through a file that says what to open in
turn; so protocols are allowed by name, each link of a chain.
"""

import os
import re

from packvit.corpus import UsageError

ALLOWED = ("http", "https", "s3", "gs", "az", "hf", "file", "zip")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://", re.ASCII)
WORD = re.compile(r"[A-Za-z][A-Za-z0-9+_-]*", re.ASCII)
IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+", re.ASCII)
USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)@", re.ASCII)
NO_USER = ("hf", "file", "zip")  # an @ there is part of a name
PARAMETERS = re.compile(r"([?#])([^?#]*?)(?=::|[?#]|$)", re.DOTALL)
# Parameters that let whoever has them in, and those of S3, Google, Azure, CloudFront and others
# that a signature brings and that change with it. Names are compared in lower case.
SECRET = re.compile(
    r".*(signature|token|secret|passw|credential|apikey|access[-_]?key|jwt).*|.*[-_]?authorization"
    r"|(.*[-_])?(auth|key|sig|sign|session|sessionid|pwd|hmac)|x-(amz|goog|oss|cos|obs|tos|bz|ms)-.*"
    r"|hdnea|hdnts|sas|googleaccessid|key-pair-id"
)
BESIDE_SECRET = re.compile(
    r"expires|expiry|expiration|exp|policy|date|timestamp|nonce"
    # Azure's shared access signatures.
    r"|s[vsrpeti]|srt|spr|sip|sdd|sk(oid|tid|t|e|s|v)|saoid|suoid|scid|sduoid"
)
SCHEME_LIKE = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]+:/|({'|'.join(ALLOWED)}):", re.ASCII)


def is_url(path: str) -> bool:
    """Tell whether `path` is a URL for fsspec; a chained one, zip://a.jpg::s3://b/c.zip, too."""
    return URL.match(path) is not None


def protocols(url: str) -> list[str]:
    """Return the protocols that a URL's links name, as fsspec reads them; `file` without any.

    Source: fsspec 2026.9, core.py, `_un_chain` and `split_protocol`.
    """
    found = []
    for link in url.split("::"):
        protocol, slashes, _ = link.partition("://")
        if slashes and len(protocol) > 1:
            found.append(protocol)
        elif link.startswith("data:"):
            found.append("data")
        else:  # a word alone names a protocol, as in simplecache::s3://bucket/x
            found.append(link if "::" in url and WORD.fullmatch(link) else "file")
    return found


def check_protocols(url: str) -> None:
    """Refuse a URL that reaches for anything but what photographs are read from.

    Raises: UsageError naming the protocol.
    """
    for protocol in protocols(url):
        if protocol not in ALLOWED:
            raise UsageError(
                f"{spell(url)} is not read: {protocol}:// is none of the protocols that are, which "
                f"are {', '.join(ALLOWED)}. For a file or folder of that name put ./ before it."
            )


def spell(path: str) -> str:
    """Return a path as people may see it: a URL without user, password and signature.

    What is not a URL stays as it is.
    """
    if not is_url(path):
        return path
    return PARAMETERS.sub(spell_parameters, USER.sub(spell_user, path))


def spell_user(found: re.Match[str]) -> str:
    """Return how a link begins, without who logs in."""
    protocol, user = found.groups()
    container = protocol == "az" and ":" not in user  # az://container@account.dfs.core.windows.net
    return found[0] if protocol in NO_USER or container else f"{protocol}://"


def spell_parameters(found: re.Match[str]) -> str:
    """Return a query or fragment without what lets somebody in."""
    mark, text = found.groups()
    parts = text.split("&")
    names = [part.partition("=")[0].lower() for part in parts]
    if not any(SECRET.fullmatch(name) for name in names):
        return found[0]
    kept = [
        part
        for part, name in zip(parts, names, strict=True)
        if not (SECRET.fullmatch(name) or BESIDE_SECRET.fullmatch(name))
    ]
    return mark + "&".join(kept) if kept else ""


def spell_bytes(path: bytes) -> bytes:
    """Return `spell` of a path as the file system has it."""
    return os.fsencode(spell(os.fsdecode(path))) if b"://" in path else path


def spell_text(text: str) -> str:
    """Return a text with every URL in it as people may see it."""
    return IN_TEXT.sub(lambda found: spell(found[0]), text)


def bare(path: str) -> str:
    """Return the part of a path that ends as its file's name does: no chain, no query."""
    if not is_url(path):
        return path
    first = path.partition("::")[0] if "://" in path.partition("::")[0] else path
    return re.split(r"[?#]", first)[0] if first.startswith(("http://", "https://")) else first


def check_local(out: str | os.PathLike[str], *, name: str = "out") -> None:
    """Refuse an output that is spelled as a URL: it would be made as a local folder of that name.

    Raises: UsageError.
    """
    path = os.fspath(out)
    if is_url(path) or SCHEME_LIKE.match(path):
        raise UsageError(
            f"{name} is {spell(path)}, but results are written to local folders alone. Name a "
            "local path; for one that really is spelled so put ./ before it."
        )
