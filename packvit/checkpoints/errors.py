"""What can be wrong with a checkpoint. No torch."""


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one sentence or with a list of all problems."""


class NotCachedError(CheckpointError):
    """A file that the hub may have, but that was not downloaded while it could be reached."""
