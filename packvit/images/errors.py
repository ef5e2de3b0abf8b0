"""Why an image cannot be used: a code, the stage it failed in, and what to do. No torch."""

from typing import Literal

Stage = Literal["list", "read", "header", "decode", "resize", "encode", "write"]

CODES = {
    "missing": "there is no file at this path",
    "unreadable": "the file is there but cannot be read; look at its permissions and its disk",
    "not_a_file": "this is a folder, pipe, socket or device; name a regular file",
    "unidentified": "these bytes are no image that can be recognised",
    "truncated": "the file is cut short or damaged; fetch it again from where it came",
    "unsupported_format": "images of this format are not read; convert it to JPEG or PNG",
    "unsupported_mode": "pixels of this kind are not read; convert them to 8-bit RGB",
    "too_many_pixels": "it has more pixels than the limit; make it smaller, or raise max_pixels",
    "aspect_ratio": "its sides are too short or too unequal for the model's patches; "
    'crop it, or ask for resize="native"',
    "decoder_crash": "the process that decoded it died",
    "timeout": "decoding it took longer than allowed",
    "out_of_memory": "there was not enough memory for it; make it smaller, or run fewer workers",
    "overflow": "its features are too large for the output type; write them as float32",
    "non_finite": "its features hold NaN or infinity; encode it in float32",
}


class ImageError(ValueError):
    """One image that cannot be used: `code` (a key of CODES), the `stage` it failed in, a `note`.

    `note` holds words of ours alone: a library's message holds addresses and paths, and changes
    from run to run. `index` says which image of a list, and may be set by whoever knows.
    """

    def __init__(self, code: str, stage: Stage, note: str | None = None, index: int | None = None):
        assert code in CODES, code
        super().__init__(code, stage, note, index)  # what pickle hands to a new process
        self.code = code
        self.stage: Stage = stage
        self.note = note
        self.index = index

    def __str__(self) -> str:
        who = "The image" if self.index is None else f"Image {self.index}"
        where = self.stage if self.note is None else f"{self.stage}: {self.note}"
        return f"{who} cannot be used: {CODES[self.code]} ({where})."
