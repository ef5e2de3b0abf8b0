"""Our own contenders: a table of titles and load options."""

from typing import Any, NamedTuple

from packvit.bench.contenders import Call, Contender, Subject, Unavailable, cut
from packvit.model.attention import BACKENDS


class Ours(NamedTuple):
    """Our encoder, loaded with the options of a user."""

    title: str
    options: dict[str, Any]  # of `packvit.load`
    limit: float | None = None  # on the relative difference, if not the dtype's

    def build(self, subject: Subject) -> Contender:
        """Load the encoder. Raises: Unavailable; whatever loading raises."""
        model = subject.model
        load = model.encoder.from_transformers
        if self.options.get("compile") and not subject.compiled:
            raise Unavailable("compilation takes minutes: add --compiled")
        positions = "interpolate" if model.resizes else "checkpoint"
        patches, grid, pixels = subject.patches, subject.grid_thw, subject.pixels
        rows = subject.rows[0].new_tensor(range(len(patches)))
        if pixels is not None:  # [N, 3, H, W], of which the order "chw" is cut soonest
            options: dict[str, Any] = {"patch_order": "chw"} | self.options
            encoder = load(model.reference, positions=positions, **options)
            patch = encoder.config.patch
            return Contender(
                [Call(lambda: encoder(cut(pixels, patch, "chw"), grid), rows)], encoder
            )
        encoder = load(model.reference, positions=positions, **self.options)
        if encoder.head is None or model.encoder.family.reference.library == "timm":
            return Contender([Call(lambda: encoder(patches, grid), rows)], encoder)
        # transformers' forward pools too, and timm's is asked for tokens alone.
        return Contender([Call(lambda: encoder.encode(patches, grid).tokens, rows)], encoder)


OURS = (
    *(Ours(f"packvit, {backend.name}", {"attention": backend.name}) for backend in BACKENDS),
    Ours("packvit, compiled", {"compile": True}),
    Ours("packvit, fp8", {"fp8": True}, limit=0.05),
    Ours("packvit, invariant", {"invariant": True}),
    Ours("packvit, compiled, invariant", {"compile": True, "invariant": True}),
)
