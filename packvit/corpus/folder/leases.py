"""Who may write to a feature folder in an object store: one job at a time. No torch.

    _lease/00001.json   the name that a job gave itself, and how often it has renewed its lease

A job takes a lease by putting this object if there is none (`StorePath.create`), renews it every
`RENEW` seconds, and removes it at its end. A lease that another job sees unchanged for `EXPIRY`
seconds belongs to a job that was killed; it takes the next number, which again one alone can
create. No clock is compared with another machine's.

A job writes only if it has renewed its lease within half of `EXPIRY`; one that was stopped for
longer renews it first, and ends if the lease is another's by then. What it had sent before may
still arrive: a part of the same bytes, whose commit is checked against it when it is read.

Where a store ignores the condition, of two jobs that begin within the same request the later has
the lease, and the earlier ends when it next renews: within `RENEW` seconds, or before.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from secrets import token_hex

from packvit.corpus import StoreError, UsageError
from packvit.corpus.folder.names import LEASE
from packvit.corpus.folder.stores import StorePath, remove_many

RENEW, EXPIRY = 10.0, 40.0  # seconds
FRESH = EXPIRY / 2  # seconds after which a write renews the lease first
PAUSE = 2.0  # between two looks at another's lease


@contextmanager
def leased(folder: StorePath) -> Iterator[StorePath]:
    """Yield a claimed path of a folder, which may be written to until the end.

    Waits for up to `EXPIRY` seconds for the lease of a job that may have been killed.

    Raises: UsageError if another job holds it; StoreError.
    """
    leases = folder / LEASE
    found = list(leases.iterdir())
    number = 1
    if found:
        wait_for_expiry(folder, found[-1])
        number += int(found[-1].name.partition(".")[0])
    lease = Lease(leases / f"{number:05d}.json")
    try:
        lease.path.create(lease.data)
    except FileExistsError as error:
        raise in_use(folder) from error
    remove_many(found)
    renewing = threading.Thread(target=lease.keep, name="packvit-lease", daemon=True)
    renewing.start()
    try:
        yield replace(folder, check=lease.check)
    finally:
        lease.ended.set()
        renewing.join()
        with suppress(StoreError, FileNotFoundError):  # it expires
            if lease.is_ours():
                lease.path.unlink()


def wait_for_expiry(folder: StorePath, lease: StorePath) -> None:
    """Return once nobody has renewed a lease for `EXPIRY` seconds, or it is gone.

    Raises: UsageError if somebody does.
    """
    before, start = lease.find_bytes(), time.monotonic()
    while before is not None and time.monotonic() < start + EXPIRY:
        time.sleep(PAUSE)
        now = lease.find_bytes()
        if now is None:
            return
        if now != before:
            raise in_use(folder)


def in_use(folder: StorePath) -> UsageError:
    """Return the error for a folder that another job writes to."""
    return UsageError(f"Another job is writing to {folder}. Wait for it, or choose another folder.")


class Lease:
    """The lease of this job, renewed by a thread."""

    def __init__(self, path: StorePath) -> None:
        self.path = path
        self.job = token_hex(16)
        self.renewals = 0
        self.renewed = time.monotonic()
        self.ended = threading.Event()
        self.lock = threading.Lock()

    @property
    def data(self) -> bytes:
        """The bytes of the object."""
        return json.dumps({"job": self.job, "renewals": self.renewals}).encode()

    def keep(self) -> None:
        """Renew the lease until the job ends; after an error the next write tries again."""
        while not self.ended.wait(RENEW):
            with suppress(StoreError):
                self.renew()

    def renew(self) -> None:
        """Put the object again, if it is still ours.

        Raises: StoreError.
        """
        with self.lock:
            start = time.monotonic()
            if not self.is_ours() or list(self.path.parent.iterdir()) != [self.path]:
                raise StoreError(
                    f"{self.path.parent.parent} was taken over by another job, since this one was "
                    "stopped for a while or its store did not answer. Wait for that job's end."
                )
            self.renewals += 1
            self.path.write(self.data)
            self.renewed = start

    def is_ours(self) -> bool:
        """Return whether the object is the one that this job has put."""
        return self.path.find_bytes() == self.data

    def check(self) -> None:
        """Raise StoreError if the lease may be another's."""
        if time.monotonic() > self.renewed + FRESH:
            self.renew()
