"""What can be wrong with a checkpoint. No torch."""

MOST_SAID = 20_000  # characters of a message: a damaged index may name a million files


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one sentence or with a list of all problems."""

    def __init__(self, said: str) -> None:
        if len(said) > MOST_SAID:
            said = f"{said[:MOST_SAID]} ... and {len(said) - MOST_SAID:,} characters more."
        super().__init__(said)


class NotCachedError(CheckpointError):
    """A file that the hub may have, but that was not downloaded while it could be reached."""
