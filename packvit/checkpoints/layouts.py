"""What a family of encoders is: the layouts its checkpoints come in, and how to tell them.

A family is a frozen value; its file in `families/` fills one in. Nothing here guesses: a layout is
recognised by a tensor that only it has, and a tensor that no layout explains is an error that names
it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from packvit.checkpoints.config_json import Json
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.ranges import Part
from packvit.checkpoints.rules import Rule, find, prefixed, rename
from packvit.config import EncoderConfig, ImageConfig

LayoutName = Literal["transformers", "original"]

EMBEDDING = "embeddings.patches.weight"  # ours: the one weight that depends on a patch's order


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a family's checkpoints name and shape their tensors."""

    name: str  # as `save_pretrained(layout=...)` and `packvit convert --layout` take it
    marker: str  # a tensor that tells this layout from the family's others
    rules: tuple[Rule, ...]
    read: Callable[[Json, Collection[str]], EncoderConfig]  # config.json, names of the tensors
    write: Callable[[EncoderConfig], dict[str, Any]]  # config.json
    # Tensors kept for `save_pretrained` and used by nothing: our label to the layout's name.
    carried: Mapping[str, str] = field(default_factory=dict)
    # What some of them hold, since the numbers are the family's and are not read.
    known: Mapping[str, Sequence[float]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # what names of another tower's or head's tensors begin with
    # Whether an encoder can be written so, where two layouts have a word for every parameter.
    takes: Callable[[EncoderConfig], bool] = lambda config: True

    def skips(self, name: str) -> bool:
        """Return whether a tensor is another tower's or head's."""
        return any(outer[:-1] in self.skipped for outer in outer_prefixes(f"{name}."))


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of checkpoint within a family, as a small random model of transformers shows it."""

    name: str
    model: str  # the class in transformers, or timm's name of an architecture
    entries: Json = field(default_factory=dict)  # of its configuration, beside the sizes
    since: str = ""  # the first version of the library that reads it as we write it, if not all do


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers, or timm, calls a family's models; only `packvit verify` uses it."""

    variants: tuple[Variant, ...]
    processor: str  # the class in transformers that prepares images
    processor_options: Json = field(default_factory=dict)  # where the class's defaults are others
    interpolates: bool = False  # whether the models take `interpolate_pos_encoding`
    library: Literal["transformers", "timm"] = "transformers"  # whose models they are
    elsewhere: str = ""  # where there are no variants: what it is compared with, in a sentence

    @property
    def models(self) -> frozenset[str]:
        """The classes that a config.json of this family names as its architecture."""
        return frozenset(variant.model for variant in self.variants)


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints that share an architecture and a naming of weights."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    layouts: tuple[Layout, ...]
    images: Callable[[EncoderConfig], ImageConfig]  # where the checkpoint says nothing
    checkpoints: tuple[str, ...]  # published, by their names on the hub
    reference: Reference
    pools_to_text: bool = False  # whether a text tower shares the space of the pooled vectors
    processor_normalizes: bool = True  # and leaves pixels from 0 to 1 otherwise

    def claims(self, config: Json) -> bool:
        """Return whether a checkpoint with this config.json is one of ours."""
        return named_type(config) in self.model_types

    def layout(self, names: Collection[str], config: Json) -> Layout:
        """Return the layout whose marker is among the tensors' names, or behind one prefix.

        A prefix is what a wrapper (`module.`, `_orig_mod.`) or a larger model (`vision_tower.`,
        `dinov2.`) writes before every name. A classifier's matrix is skipped where config.json says
        that there is one.

        Raises: CheckpointError if no layout's is, or more than one.
        """
        found = [(layout, "") for layout in self.layouts if layout.marker in names]
        found = found or self.prefixed_layouts(names)
        if len(found) != 1:
            markers = ", ".join(f"{layout.marker} ({layout.name})" for layout in self.layouts)
            held = ", ".join(f'one behind "{prefix}"' for _, prefix in found if prefix)
            raise CheckpointError(
                f"This is no {self.name} vision checkpoint: of the tensors that tell its layouts "
                f"apart it must hold exactly one, and it holds {held or len(found)}: {markers}."
            )
        [(layout, prefix)] = found
        skipped = tuple(prefix + name for name in layout.skipped)
        if classifies(config):
            skipped += tuple(f"{outer}classifier" for outer in outer_prefixes(prefix))
        if not prefix:
            return replace(layout, skipped=skipped)

        def read(config: Json, names: Collection[str]) -> EncoderConfig:
            return layout.read(config, {name.removeprefix(prefix) for name in names})

        return replace(beside_text(layout, skipped, prefix=prefix), read=read)

    def prefixed_layouts(self, names: Collection[str]) -> list[tuple[Layout, str]]:
        """Return the layouts found behind a prefix, together with their patch embedding.

        If two layouts match the same tensor, the one with the longer marker is taken.
        """
        found: dict[str, tuple[Layout, str]] = {}
        for layout in sorted(self.layouts, key=lambda layout: len(layout.marker)):
            _, embedding = find(EMBEDDING, layout.rules)
            for name in names:
                prefix = name.removesuffix("." + layout.marker) + "."
                if name == prefix + layout.marker and prefix + embedding[0] in names:
                    found[name] = (layout, prefix)
        return list(found.values())

    def writable(self, name: str, parameters: Collection[str], config: EncoderConfig) -> Layout:
        """Return the layout called `name` that has a name for every one of our `parameters`.

        Raises: ValueError listing the names there are.
        """
        for layout in self.layouts:
            named = (any(rule.names(ours) for rule in layout.rules) for ours in parameters)
            if layout.name == name and layout.takes(config) and all(named):
                return layout
        known = ", ".join(dict.fromkeys(f'"{layout.name}"' for layout in self.layouts))
        raise ValueError(f'{self.name} has no layout "{name}". Choose one of: {known}.')


def named_type(config: Json) -> Any:
    """Return the type of model that config.json names.

    timm calls it an architecture, and code that comes with a checkpoint names its class alone.
    """
    classes = config.get("architectures")
    only = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    return config.get("model_type") or config.get("architecture") or only


def image_tower(families: Sequence[Family]) -> Part:
    """Return what encoders of these families read of a larger model: see `ranges.Part`."""

    def applies(config: Json) -> bool:
        return "vision_config" in config and any(family.claims(config) for family in families)

    def wanted(config: Json, names: Collection[str]) -> Collection[str]:
        family = next(family for family in families if family.claims(config))
        layout = family.layout(names, config)
        return [name for name in names if not layout.skips(name)]

    return Part("vision", applies, wanted)


def outer_prefixes(prefix: str) -> list[str]:
    """Return what a prefix of whole parts begins with: of "a.b." that is "", "a." and "a.b."."""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]


def classifies(config: Json) -> bool:
    """Return whether config.json is that of an image classifier of transformers."""
    named = config.get("architectures")
    return isinstance(named, list) and any(
        isinstance(name, str) and name.endswith("ForImageClassification") for name in named
    )


def beside_text(
    layout: Layout,
    skipped: tuple[str, ...],
    *,
    prefix: str = "vision_model.",
    projection: str | None = None,
) -> Layout:
    """Return a layout as it is written in a file with two towers: behind `prefix`.

    `projection` names the matrix into the space that both towers share, where there is one.
    """
    shared = (rename("projection.weight", projection),) if projection else ()
    return replace(
        layout,
        marker=prefix + layout.marker,
        rules=(*prefixed(layout.rules, prefix), *shared),
        carried={label: prefix + name for label, name in layout.carried.items()},
        skipped=skipped,
    )


def check_family(encoder: type) -> None:
    """Refuse to load with the class that all families share.

    Raises: TypeError.
    """
    if not hasattr(encoder, "family"):
        raise TypeError(
            f"{encoder.__name__} is the class that all families share. Use "
            "packvit.load, which finds a checkpoint's family, or a family's own class."
        )
