"""The embedding job: photographs in, a feature folder out, one row for every input."""


class WrongUse(ValueError):
    """What was asked cannot be done as asked; the message says what to ask instead."""


class WriteError(OSError):
    """What could not be written and why; what was committed before stays whole."""


class DecoderError(RuntimeError):
    """What keeps decode workers from working at all; what is wrong with an image is its row."""


class EmbedderError(RuntimeError):
    """A worker process died again and again, or is not what the job needs."""
