"""A job's inputs, sorted on disk, so that memory does not grow with their number. No torch.

SQLite keeps them in a temporary file in TMPDIR, which is removed with the listing.
"""

import hashlib
import os
import re
import sqlite3
import struct
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from packvit.corpus import UsageError, no_room_for
from packvit.corpus.inputs.addresses import spell_bytes
from packvit.corpus.inputs.kept import Kind, encode_row, first_values, join_kinds, kind_of
from packvit.corpus.inputs.sources import Cell, Input, Member
from packvit.corpus.inputs.zipped import Zipped

MOST_SUFFIXES = 1000  # that are told apart; names may have as many as there are files
LONGEST_SUFFIX = 12
SUFFIXES_SHOWN = 5
HOW_ZIPPED = struct.Struct("<qHI")  # a zip's member: size, method and sum, in place of a column
PACKED = b""  # a compressed tar's member, likewise


def by_suffix(passed_over: Mapping[str, int]) -> str:
    """Return the suffixes of most files that were passed over, and how many others there are."""
    ranked = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    shown = [(suffix, count) for suffix, count in ranked if suffix][:SUFFIXES_SHOWN]
    others = sum(passed_over.values()) - sum(count for _, count in shown)
    named = [f"{count:,} {suffix}" for suffix, count in shown]
    if others:
        named.append(f"{others:,} others")
    return ", ".join(named) or "none"


@dataclass(frozen=True, slots=True)
class Gone:
    """How a listing differs from a job's recorded inputs: how many, and the first of each."""

    names: tuple[str, ...]  # recorded, and no longer there
    count: int
    there: tuple[str, ...]  # recorded and there, but left out now
    count_there: int
    new: tuple[str, ...]  # not recorded
    count_new: int
    knows_paths: bool = True  # else `there` may hold inputs that are gone


class Listing:
    """All inputs of a job, sorted by the bytes of their names, and how many files were ignored."""

    def __init__(self) -> None:
        self.passed_over: Counter[str] = Counter()  # files, by their suffixes
        self.length = 0
        self.root: dict[str, str] = {}  # where ids start from, for the manifest
        self.gone: Gone | None = None  # beside the recorded inputs of a job, once compared
        self.notes: tuple[str, ...] = ()  # on what comes with inputs and cannot be read
        # No name: SQLite makes a temporary file and unlinks it at once.
        self.rows = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self.rows.close)
        self.rows.create_function("readable", 1, readable, deterministic=True)
        self.rows.executescript("""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE found(
                name BLOB, whole BLOB, path BLOB, code TEXT,
                first INT, second INT, column TEXT, secret INT, repeats INT, kept TEXT);
            CREATE TABLE beside(name BLOB, rank INT, kept TEXT);
            CREATE INDEX by_name ON beside(name);
            CREATE TABLE pending(number INTEGER PRIMARY KEY, path BLOB, name BLOB);
        """)
        self.rows.execute("BEGIN")  # one transaction for all insertions

    def __len__(self) -> int:
        return self.length

    @property
    def ignored(self) -> int:
        """How many files were passed over."""
        return self.passed_over.total()

    def pass_over(self, name: bytes) -> None:
        """Count a file whose name is not that of a photograph."""
        suffix = spell_bytes(os.path.splitext(name)[1].lower()).decode()
        known = suffix in self.passed_over or len(self.passed_over) < MOST_SUFFIXES
        self.passed_over[suffix if known and len(suffix) <= LONGEST_SUFFIX else ""] += 1

    def __iter__(self) -> Iterator[Input]:
        return self.between(0, self.length)

    def between(self, start: int, stop: int) -> Iterator[Input]:
        """Yield the inputs from `start` to before `stop`, in order."""
        rows = self.rows.execute(
            "SELECT id, path, code, first, second, column, kept FROM inputs "
            "WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, stop),
        )
        for name, path, code, first, second, column, kept in rows:
            within = None
            if column == PACKED:
                within = Member(first, second, packed=True)
            elif isinstance(column, bytes):
                within = Zipped(first, second, *HOW_ZIPPED.unpack(column))
            elif column is not None:
                within = Cell(first, second, column)
            elif first is not None:
                within = Member(first, second)
            yield Input(name, os.fsdecode(path), (code, "list") if code else None, within, kept)

    def sha256(self) -> str:
        """Return a digest of the inputs' names and order, which determine parts and packs."""
        ids = self.rows.execute("SELECT id FROM inputs ORDER BY rowid")
        return digest_texts(name for (name,) in ids)

    def settle_kept(self, names: Sequence[str]) -> tuple[tuple[str, Kind], ...]:
        """Return the columns to keep with their types, and give each input an array of values.

        It is called once, when the inputs are those of the job.

        Raises: WriteError if the temporary file cannot be written.
        """
        if not names:
            return ()
        kinds: list[set[str]] = [set() for _ in names]
        with spooling():
            for (text,) in self.rows.execute("SELECT kept FROM inputs WHERE kept IS NOT NULL"):
                for value, seen in zip(first_values(text, names), kinds, strict=True):
                    if value is not None:
                        seen.add(kind_of(value))
            types: tuple[Kind, ...] = tuple(join_kinds(seen) for seen in kinds)

            def settle(text: str | None) -> str:
                return encode_row(first_values(text, names), types)

            self.rows.create_function("settled", 1, settle, deterministic=True)
            self.rows.execute("UPDATE inputs SET kept = settled(kept)")
        return tuple(zip(names, types, strict=True))

    def kept_sha256(self) -> str:
        """Return a digest of what is kept of the inputs, in order."""
        kept = self.rows.execute("SELECT kept FROM inputs ORDER BY rowid")
        return digest_texts(text for (text,) in kept)

    def compare(self, recorded: Iterable[tuple[str, str | None, str | None]]) -> Gone:
        """Compare with the ids, local paths and kept values that a job recorded.

        A path None is taken for gone, and "" for there; values are as `add` takes them.
        """
        run = self.rows.execute
        self.rows.executescript("""
            CREATE TABLE recorded(id TEXT, path BLOB, kept TEXT);
            CREATE TABLE absent(id TEXT, there INT);
            CREATE INDEX IF NOT EXISTS by_id ON inputs(id);
        """)
        rows = (
            (name, path and path.encode("utf-8", "surrogateescape"), kept)
            for name, path, kept in recorded
        )
        run("BEGIN")
        self.rows.executemany("INSERT INTO recorded(id, path, kept) VALUES (?, ?, ?)", rows)
        run("CREATE INDEX by_recorded ON recorded(id)")
        absent = "SELECT id, path FROM recorded WHERE id NOT IN (SELECT id FROM inputs)"
        for name, path in run(absent):
            there = path is not None and (not path or os.path.lexists(path))
            run("INSERT INTO absent VALUES (?, ?)", (name, there))
        run("COMMIT")

        def first(where: str) -> tuple[tuple[str, ...], int]:
            names = run(f"SELECT id FROM {where} ORDER BY rowid LIMIT 3").fetchall()
            return tuple(name for (name,) in names), run(
                f"SELECT count(*) FROM {where}"
            ).fetchone()[0]

        self.gone = Gone(
            *first("absent WHERE there = 0"),
            *first("absent WHERE there = 1"),
            *first("inputs WHERE id NOT IN (SELECT id FROM recorded)"),
        )
        return self.gone

    def take_over(self, digest: str) -> bool:
        """Become the compared job's inputs, of which those that are gone are `missing`.

        Returns False, and changes nothing, if they do not have the digest.
        """
        ids = self.rows.execute("SELECT id FROM recorded ORDER BY rowid")
        if digest_texts(name for (name,) in ids) != digest:
            return False
        self.rows.executescript("""
            CREATE TABLE whole AS
                SELECT recorded.id AS id, coalesce(inputs.path, CAST(recorded.id AS BLOB)) AS path,
                    CASE WHEN inputs.id IS NULL THEN 'missing' ELSE code END AS code,
                    first, second, column, coalesce(inputs.kept, recorded.kept) AS kept
                FROM recorded LEFT JOIN inputs ON inputs.id = recorded.id ORDER BY recorded.rowid;
            DROP TABLE recorded; DROP TABLE inputs; ALTER TABLE whole RENAME TO inputs;
        """)
        self.length = self.rows.execute("SELECT count(*) FROM inputs").fetchone()[0]
        return True

    def add(
        self,
        name: bytes,
        path: bytes,
        code: str | None,
        within: Member | Zipped | Cell | None = None,
        *,
        whole: bytes | None = None,
        repeats: bool = False,
        kept: str | None = None,
    ) -> None:
        """Add an input; `code` is its error if it is known to be unreadable.

        `whole` replaces its name if names in its archive are not distinct: see `settle`. One that
        `repeats` may have a name that others have too, as in archives and lists: see `sort`.
        `kept` are the values that come with it, as a JSON object.
        """
        place: tuple[int | None, int | None, str | bytes | None] = (None, None, None)
        if isinstance(within, Member):
            place = (within.offset, within.size, PACKED if within.packed else None)
        elif isinstance(within, Zipped):
            how = HOW_ZIPPED.pack(within.size, within.method, within.crc)
            place = (within.offset, within.packed, how)
        elif isinstance(within, Cell):
            place = (within.group, within.row, within.column)
        self.length += 1
        row = (name, whole, path, code, *place, spell_bytes(path) != path, repeats, kept)
        self.rows.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def add_beside(self, name: bytes, kept: str, rank: int = 0) -> None:
        """Add values that come with the inputs of this name; the lowest rank counts."""
        self.rows.execute("INSERT INTO beside VALUES (?, ?, ?)", (name, rank, kept))

    def join_beside(self, before: int) -> None:
        """Give the inputs that were added since the length `before` the values added meanwhile."""
        self.rows.execute(JOIN_BESIDE, (before,))
        self.rows.execute("DELETE FROM beside")

    def settle(self, before: int, *, distinct: bool = True) -> None:
        """Give an archive's inputs their whole names, unless their short names are distinct.

        They are the inputs added since the listing had length `before`; `distinct` False says
        that their short names are not.
        """
        repeated = "SELECT 1 FROM found WHERE rowid > ? GROUP BY name HAVING count(*) > 1 LIMIT 1"
        if not distinct or self.rows.execute(repeated, (before,)).fetchone():
            self.rows.execute("UPDATE found SET name = whole WHERE rowid > ?", (before,))

    def push(self, path: bytes, name: bytes) -> None:
        """Add a folder to be read."""
        self.rows.execute("INSERT INTO pending(path, name) VALUES (?, ?)", (path, name))

    def pop(self) -> tuple[bytes, bytes] | None:
        """Remove the folder added last; return its path and name, or None if there is none."""
        last = "SELECT number, path, name FROM pending ORDER BY number DESC LIMIT 1"
        found = self.rows.execute(last).fetchone()
        if found is None:
            return None
        self.rows.execute("DELETE FROM pending WHERE number = ?", found[:1])
        return found[1:]

    def sort(self) -> None:
        """Sort all inputs.

        Members of archives and lines of lists with the same name, and URLs that differ in their
        credentials alone, are told apart by their order: #2, #3 ...

        Raises: UsageError naming an id that two other inputs share.
        """
        while self.rows.execute(SET_APART).rowcount:  # "a#2" may be the name of another
            pass
        self.rows.executescript("""  -- which commits first
            CREATE TABLE inputs AS
                SELECT readable(name) AS id, path, code, first, second, column, kept
                FROM found ORDER BY name;
            DROP TABLE found; DROP TABLE beside; DROP TABLE pending;
        """)
        repeated = "SELECT id FROM inputs GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT 1"
        for (name,) in self.rows.execute(repeated):
            raise UsageError(
                f'Two inputs are called "{name}". Name each path once, and no file that lies in a '
                "folder you name too."
            )


SET_APART = """
    UPDATE found SET name = CAST(CAST(name AS TEXT) || '#' || place AS BLOB) FROM (
        SELECT rowid AS which, row_number() OVER (PARTITION BY name ORDER BY rowid) AS place
        FROM found WHERE name IN (
            SELECT name FROM found GROUP BY name HAVING count(*) > 1 AND (
                min(repeats) OR min(secret) AND count(*) = count(DISTINCT path)))
    ) WHERE found.rowid = which AND place > 1
"""

JOIN_BESIDE = """
    UPDATE found SET kept = (
        SELECT group_concat(kept, char(10)) FROM (
            SELECT kept FROM beside WHERE beside.name = found.name ORDER BY rank, rowid
        )
    ) WHERE rowid > ? AND EXISTS (SELECT 1 FROM beside)
"""


def digest_texts(texts: Iterable[str]) -> str:
    """Return the digest of ids or JSON in order, in which there is no NUL."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


# A backslash that looks like the start of one of our escapes is escaped too, so that no two names
# become equal.
LIKE_AN_ESCAPE = re.compile(rb"\\(?=x(?:00|5c|[89a-f][0-9a-f]))")


def readable(name: bytes) -> str:
    r"""Return `name` as text, distinct for distinct names: bytes that are not UTF-8 become \xNN.

    Arrow takes only UTF-8. NUL, which lists and archives may hold, is escaped too, since it
    separates names in digests.
    """
    plain = LIKE_AN_ESCAPE.sub(rb"\\x5c", name)
    return plain.decode("utf-8", "backslashreplace").replace("\0", r"\x00")


@contextmanager
def spooling() -> Iterator[None]:
    """Turn an error of SQLite into a WriteError with a message for the user."""
    try:
        yield
    except sqlite3.Error as error:
        raise no_room_for("The list of inputs could not be written", error) from error
