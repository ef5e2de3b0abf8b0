"""Check the protocols of URLs, and print URLs without their credentials. No torch.

fsspec opens more than photographs need; `reference://`, for example, opens whatever a file names.
So only listed protocols are allowed, for each link of a chained URL.
"""

import os
import re
from urllib.parse import unquote

from packvit.corpus import UsageError

ALLOWED = ("http", "https", "s3", "gs", "az", "hf", "file", "zip")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://", re.ASCII)
WORD = re.compile(r"[A-Za-z][A-Za-z0-9+_-]*", re.ASCII)
IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+", re.ASCII)
# Up to the host; a password may hold a slash that is not escaped, but a port is a number.
USER = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*|[^/?#@:]+:(?!:|[0-9]*[/?#])[^@\s]*)@", re.ASCII
)
NO_USER = ("az", "hf", "file")  # an @ there is part of a name; what has a colon is a password
PARAMETERS = re.compile(r"([?#]|(?<=[^&?#]);(?=[\w-]+=))([^?#]*?)(?=::|[?#]|$)", re.DOTALL)
PART = re.compile(r"(&(?:amp;)?|;)")
# Parameters that give access to whoever has them, and those that a signature of S3, Google, Azure,
# CloudFront and others brings, and that change with it. Names are compared in lower case.
SECRET = re.compile(
    r".*(signature|token|secret|passw|passphrase|credential|apikey|access[-_]?key|auth[-_]?key|jwt).*"
    r"|.*[-_]?authorization|bearer|pass|md5|.*session[-_]?id"
    r"|(.*[-_])?(auth|key|sig|sign|session|sessionid|pwd|hmac)|x-(amz|goog|oss|cos|obs|tos|bz|ms)-.*"
    r"|hdnea|hdnts|sas|googleaccessid|key-pair-id|pw|pswd|otp|tk|tok|ticket|creds?|.*sessid"
)
# Names that also mean other things, such as a size: secret is a value of LONG characters, as the
# signatures of imgix (s), Discord (hm), Facebook (oh), iStock (c), and Azure's function keys.
SHORT = re.compile(r"code|st|sid|hm|oh|[sckt]")
LONG = 16
BESIDE_SECRET = re.compile(
    r"expires|expiry|expiration|exp|policy|date|timestamp|nonce|ex|is|oe"
    # Azure's shared access signatures.
    r"|s[vsrpeti]|srt|spr|sip|sdd|sk(oid|tid|t|e|s|v)|saoid|suoid|scid|sduoid"
)
SCHEME_LIKE = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]+:/|({'|'.join(ALLOWED)}):", re.ASCII)


def is_url(path: str) -> bool:
    """Return whether `path` is a URL for fsspec, chained ones such as zip://a::s3://b/c.zip too."""
    return URL.match(path) is not None


def protocols(url: str) -> list[str]:
    """Return the protocol of each link of a URL, as fsspec reads them; `file` if it names none.

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
    """Refuse a URL with a protocol that is not allowed.

    Raises: UsageError naming the protocol.
    """
    for protocol in protocols(url):
        if protocol not in ALLOWED:
            raise UsageError(
                f"{spell(url)} is not read: {protocol}:// is not an allowed protocol. Allowed are "
                f"{', '.join(ALLOWED)}. For a file or folder of that name put ./ before it."
            )


def spell(path: str) -> str:
    """Return a path as it may be printed: a URL without user, password and signature.

    Other paths are returned unchanged.
    """
    if not is_url(path):
        return path
    return PARAMETERS.sub(spell_parameters, USER.sub(spell_user, path))


def spell_user(found: re.Match[str]) -> str:
    """Return the start of a link without its user and password."""
    protocol, user = found.groups()
    named = protocol in NO_USER and ":" not in user  # az://container@account.dfs.core.windows.net
    return found[0] if named or protocol == "zip" else f"{protocol}://"


def spell_parameters(found: re.Match[str]) -> str:
    """Return a query or fragment without its credentials."""
    mark, text = found.groups()
    parts = PART.split(text)  # every other one is what joins them
    names = [unquote(part).partition("=")[0].strip().lower() for part in parts[::2]]
    secret = [is_secret(*each) for each in zip(names, parts[::2], strict=True)]
    if not any(secret):
        return found[0]
    kept = [
        (joint, part)
        for joint, part, name, hidden in zip(
            ["", *parts[1::2]], parts[::2], names, secret, strict=True
        )
        if not (hidden or BESIDE_SECRET.fullmatch(name))
    ]
    joined = "".join(joint + part for joint, part in kept)
    return mark + joined.removeprefix(kept[0][0]) if kept else ""


def is_secret(name: str, part: str) -> bool:
    """Return whether a parameter of this name, written as `part`, gives access by itself."""
    value = unquote(part).partition("=")[2].strip()
    return bool(SECRET.fullmatch(name) or (len(value) >= LONG and SHORT.fullmatch(name)))


def spell_bytes(path: bytes) -> bytes:
    """Return `spell` of a path in bytes."""
    return os.fsencode(spell(os.fsdecode(path))) if b"://" in path else path


def spell_text(text: str) -> str:
    """Return a text with the credentials of every URL in it removed."""
    return IN_TEXT.sub(lambda found: spell(found[0]), text)


def bare(path: str) -> str:
    """Return a path without the rest of a URL's chain and without its query."""
    if not is_url(path):
        return path
    first = path.partition("::")[0] if "://" in path.partition("::")[0] else path
    return re.split(r"[?#]", first)[0] if first.startswith(("http://", "https://")) else first


def check_local(out: str | os.PathLike[str], *, name: str = "out") -> None:
    """Refuse an output that is a URL: it would create a local folder of that name.

    Raises: UsageError.
    """
    path = os.fspath(out)
    if is_url(path) or SCHEME_LIKE.match(path):
        raise UsageError(
            f"{name} is {spell(path)}, but results are written to local folders only. Name a "
            "local path; if it really has that name, put ./ before it."
        )
