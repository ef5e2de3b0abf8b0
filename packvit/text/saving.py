"""Both towers, trained, as the checkpoint that they came from."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints.layouts import EMBEDDING
from packvit.checkpoints.parameters import store
from packvit.checkpoints.rules import permute_patches
from packvit.encoder import Encoder
from packvit.text.encoder import TextEncoder
from packvit.text.loading import tower_of
from packvit.text.tokenizing import TOKENIZER_FILES, locate


def save_towers(
    folder: str | os.PathLike[str],
    encoder: Encoder,
    text: TextEncoder,
    *,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> None:
    """Write two towers of one checkpoint in its layout, with its tokenizer and image settings.

    `packvit.load`, `packvit.load_text` and transformers read it. `states` are the state dicts of
    both, where they are sharded.

    Raises: ValueError if the towers do not come from one checkpoint of two; CheckpointError if the
    folder cannot be written.
    """
    source = text.checkpoint
    if source is None or encoder.checkpoint is None or encoder.checkpoint.files != source.files:
        raise ValueError(
            "The two towers come from different checkpoints. Load both by the name of one, with "
            "packvit.load and packvit.load_text."
        )
    images, words = states or (encoder.state_dict(), text.state_dict())
    embedding = permute_patches(images[EMBEDDING], encoder.patch_order, back=True)
    layout = encoder.family.layout(source.tensors, source.config)
    stored = store({**images, EMBEDDING: embedding}, layout.rules)
    stored |= store(words, tower_of(source).layout(source.tensors, source.config).rules)
    dtype = str(embedding.dtype).removeprefix("torch.")
    checkpoints.write(
        folder,
        config={**source.config, "dtype": dtype},
        tensors={name: source.tensors[name] for name in source.tensors} | stored,
        preprocessor=source.preprocessor,
    )
    for name in TOKENIZER_FILES:
        if file := locate(source, name):
            shutil.copyfile(file, Path(folder) / name)
