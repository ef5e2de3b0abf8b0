"""The encoders of a folder's space: its own model for photographs, and its text tower for words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from packvit.corpus import UsageError
from packvit.corpus.folder.names import names_of
from packvit.corpus.folder.opening import is_count
from packvit.corpus.folder.reader import damaged
from packvit.corpus.folder.stores import Folder
from packvit.corpus.loading import digest_weights, load_encoder
from packvit.corpus.settings import ModelChoice
from packvit.encoder import Encoder
from packvit.images.decode import Source
from packvit.model.options import LoadOptions
from packvit.retrieval.folders import Vectors
from packvit.retrieval.nearest import choose_device
from packvit.text.encoder import TextEncoder
from packvit.text.loading import load_text

UNKNOWN = "\ue000"  # for private use: every tokenizer encodes it as an unknown character


def load_model(
    manifest: dict[str, Any], folder: Folder, model: str | None = None, device: str | None = None
) -> Encoder:
    """Return the encoder that wrote a folder; `model` says where it is now, if it was moved.

    Raises: UsageError if its weights are others; CheckpointError.
    """
    check_entries(manifest, folder)
    loading = LoadOptions(device=device, positions=manifest["positions"])
    name, revision = model or manifest["model"], manifest["revision"]
    encoder, _ = load_encoder(ModelChoice(model=name, revision=revision, options=loading))
    check_model(encoder, manifest, folder)
    return encoder


def check_entries(manifest: dict[str, Any], folder: Folder) -> None:
    """Refuse a manifest, which others may have made, that lacks the settings to embed alike.

    Raises: UsageError.
    """
    asked = manifest.get("preprocessing")
    if absent := [name for name in ("revision", "weights_sha256") if name not in manifest]:
        raise UsageError(
            f"{folder / names_of(folder).manifest} has no {absent[0]}, so the weights that wrote "
            "the features are not known. Embed the photographs again."
        )
    if not (
        isinstance(manifest.get("model"), str)
        and isinstance(manifest.get("revision"), str | None)
        and manifest.get("positions") in ("checkpoint", "interpolate")
        and is_count(manifest.get("token_budget"), least=1)
        and isinstance(asked, dict)
        and asked.get("resize") in ("checkpoint", "native", None)
        and (asked.get("max_patches") is None or is_count(asked["max_patches"], least=1))
    ):
        raise damaged(folder, names_of(folder).manifest)


def check_model(encoder: Encoder, manifest: dict[str, Any], folder: Folder) -> None:
    """Raise UsageError unless the folder's features come from the encoder's weights."""
    known = {encoder.checkpoint.sha256()} if encoder.checkpoint else set()
    if manifest["weights_sha256"] in known:
        return
    if manifest["weights_sha256"] != digest_weights(encoder):
        mine = encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__
        raise other_weights(manifest, folder, mine)


def other_weights(manifest: dict[str, Any], folder: Folder, mine: str) -> UsageError:
    """Return the error for a model that did not write a folder."""
    return UsageError(
        f'The features in {folder} come from the model "{manifest["model"]}", and "{mine}" has '
        "other weights, so they cannot be compared. Leave `model` out, or embed the folder's "
        "photographs again."
    )


def embed_photographs(
    photos: Sequence[Source], vectors: Vectors, model: str | None, device: str | None
) -> np.ndarray:
    """Return the vectors of photographs, preprocessed as the folder's were.

    Shapes: N photographs -> float32 [N, D].
    Raises: ImageError with the index of the first that cannot be used; as `load_model`.
    """
    manifest = vectors.manifest
    encoder = load_model(manifest, vectors.folder, model, device)
    asked = manifest["preprocessing"]
    return encoder.embed(
        photos,
        token_budget=manifest["token_budget"],
        projected=vectors.column == "projected",
        resize=asked["resize"],
        max_patches=asked["max_patches"],
    )


def word_column(vectors: Vectors) -> str:
    """Return the column of the space that the folder's model shares with words.

    Raises: UsageError if it shares none.
    """
    named = vectors.manifest.get("text_space")
    if named is None:
        raise UsageError(
            f'The model of {vectors.folder}, "{vectors.manifest["model"]}", knows no words. Search '
            "by photographs, or embed with a model that has a text tower, such as CLIP or SigLIP."
        )
    return named


def load_words(vectors: Vectors, model: str | None, device: str | None) -> TextEncoder:
    """Return the text tower of the model that wrote a folder.

    Raises: UsageError if its weights are others; CheckpointError.
    """
    manifest = vectors.manifest
    check_entries(manifest, vectors.folder)
    where = choose_device(device)
    tower = load_text(model or manifest["model"], device=where, revision=manifest["revision"])
    assert tower.checkpoint
    if manifest["weights_sha256"] != tower.checkpoint.sha256():
        raise other_weights(manifest, vectors.folder, tower.checkpoint.name)
    return tower


def embed_words(
    texts: Sequence[str], vectors: Vectors, model: str | None, device: str | None
) -> np.ndarray:
    """Return the vectors of texts in the space of the folder's vectors.

    Shapes: N texts -> float32 [N, D].
    Raises: UsageError for words that the tower cannot read; as `load_words`.
    """
    tower = load_words(vectors, model, device)
    read_words(tower, texts)
    return tower.embed(texts)


def read_words(tower: TextEncoder, texts: Sequence[str]) -> None:
    """Refuse texts in which the tokenizer knows no letter.

    Raises: UsageError naming the first.
    """
    if tower.tokenizer is None:
        name = tower.checkpoint.name if tower.checkpoint else "The text tower"
        raise UsageError(f"{name} has no tokenizer, so it reads no words. Search by photographs.")
    nothing, unknown, *known = (set(ids) for ids in tower.tokenize(["", UNKNOWN, *texts]))
    for text, ids in zip(texts, known, strict=True):
        if not ids - nothing - unknown:
            raise UsageError(
                f'The model\'s tokenizer reads nothing in "{text}": it knows no such language. Use '
                "words of a language that the model was trained on."
            )
