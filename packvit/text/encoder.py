"""The text encoder: one forward for all texts of a pack, on the blocks that images run through.

A pack of texts is the ids of their tokens laid end to end. Where the reference fills texts up to a
fixed length, so does the tokenizer, and what fills them is part of the text.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from packvit.checkpoints.files import Checkpoint
from packvit.config import TextConfig
from packvit.fast.blocks import choose_blocks
from packvit.model.attention import AttentionInputs, resolve
from packvit.model.device import current
from packvit.model.layers import Blocks
from packvit.model.linear import Linear
from packvit.model.norms import norm
from packvit.model.parameters import drawn
from packvit.packs.grid import to_device
from packvit.packs.planning import plan_packs
from packvit.packs.segments import Segments
from packvit.text.packs import TextFeatures, TextPack, as_text_pack, pool
from packvit.text.tokenizing import Tokenizer

Vectors = Tensor | np.ndarray


class TextEmbeddings(nn.Module):
    """Ids to the token stream: a row of a table for the id, and one for its place in the text."""

    positions: Tensor  # a parameter, or sinusoids

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.scale = config.width**0.5 if config.scaled_tokens else 1.0
        if config.sinusoids:
            self.register_buffer("positions", sinusoids(config), persistent=False)
        else:
            self.positions = drawn(config.positions, config.width)

    def forward(self, input_ids: Int[Tensor, " T"], places: Int[Tensor, " T"]) -> Tensor:
        """Embed T tokens; `places` counts them within their text. Shapes: -> [T, D]."""
        return self.tokens(input_ids) * self.scale + self.positions.index_select(0, places)


def sinusoids(config: TextConfig) -> Float[Tensor, "positions D"]:
    """Return sines and cosines of the positions, by frequencies from 1 to 1 / 10,000.

    Source: tensor2tensor's, as in transformers 5.17, models/tipsv2.
    """
    half = config.width // 2
    frequency = torch.arange(half, dtype=torch.float32, device="cpu")
    rates = torch.exp(frequency * (-math.log(10000) / (half - 1)))
    place = torch.arange(config.positions, dtype=torch.float32, device="cpu")
    angles = place[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, config.width % 2))


class TextEncoder(nn.Module):
    """A text tower on packs: tokens laid end to end, attention per text."""

    def __init__(
        self, config: TextConfig, tokenizer: Tokenizer | None = None, *, attention: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.backend = attention
        self.checkpoint: Checkpoint | None = None  # where the weights came from
        self.embeddings = TextEmbeddings(config)
        self.encoder = Blocks(config)
        self.norm = norm(config)
        self.head = Linear(config.width, config.head) if config.head else None
        shared = config.projection
        self.projection = Linear(config.width, shared, bias=False) if shared else None
        # Logarithm of what cosines are multiplied by, and what is added: as checkpoints keep them.
        # Vectors of one number, since FSDP2 shards nothing without a dimension.
        scale = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if config.scaled else None
        self.logit_scale = scale
        bias = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if config.logit_bias else None
        self.logit_bias = bias

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, and so the tokens, are made of."""
        return self.embeddings.positions.dtype

    @property
    def width(self) -> int:
        """E, the width of the space shared with images."""
        return self.config.projection or self.config.head or self.config.width

    @property
    def attention_inputs(self) -> AttentionInputs:
        """What decides which attention backends can run."""
        return AttentionInputs.of(self.device, self.dtype, self.config.head_dim)

    def __call__(
        self, input_ids: Tensor | TextPack, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Return what `forward` returns of ids and lengths, or of one pack."""
        return super().__call__(*as_text_pack(input_ids, lengths))

    def forward(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the normed tokens of every text of the pack: the reference's `last_hidden_state`.

        Shapes: input_ids [T] integers, lengths N host ints whose sum is T -> [T, D].
        Raises: TypeError for ids that are no integers; ValueError if shapes, device, lengths or
        ids do not fit.
        """
        with current(self.device):
            return self.run(input_ids, self.check(input_ids, lengths))

    def encode(
        self, input_ids: Tensor | TextPack, lengths: Sequence[int] | None = None
    ) -> TextFeatures:
        """Return tokens, pooled and projected vectors of a pack, or of what `forward` takes.

        Raises: as `forward`.
        """
        input_ids, lengths = as_text_pack(input_ids, lengths)
        segments = self.check(input_ids, lengths)
        with current(self.device):
            tokens = self.run(input_ids, segments)
            pooled = pool(self.config, tokens, input_ids, segments)
            pooled = pooled if self.head is None else self.head(pooled)
            projected = None if self.projection is None else self.projection(pooled)
        return TextFeatures(tokens, pooled, projected, segments.lengths)

    def run(self, input_ids: Tensor, segments: Segments) -> Tensor:
        """Embed ids, run the blocks, and norm."""
        counted = np.concatenate([np.arange(length) for length in segments.lengths])
        stream = self.embeddings(input_ids, to_device(counted, self.device))
        backend = resolve(self.backend, self.attention_inputs)
        stream, _ = choose_blocks(self.encoder, stream)(stream, segments, None, backend)
        return self.norm(stream)

    def check(self, input_ids: Tensor, lengths: Sequence[int]) -> Segments:
        """Return the segments of a pack, whose ids and lengths must fit each other and the tower.

        Raises: TypeError; ValueError.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            kind = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"input_ids are {kind}, but must be a tensor of int64 or int32.")
        counts = tuple(int(length) for length in lengths)
        most = self.config.positions
        if input_ids.ndim != 1 or not counts or sum(counts) != len(input_ids):
            raise ValueError(
                f"input_ids is {list(input_ids.shape)} and lengths sum to {sum(counts)} tokens of "
                f"{len(counts)} texts, but input_ids must be [T], T the sum of lengths. Lay the "
                "ids of all texts end to end."
            )
        if not 1 <= min(counts) <= max(counts) <= most:
            raise ValueError(
                f"lengths go from {min(counts)} to {max(counts)}, but a text of this checkpoint "
                f"has 1 to {most} tokens. Truncate it as `pack` does."
            )
        if input_ids.device != self.device:
            raise ValueError(
                f"input_ids is on {input_ids.device}, but the encoder is on {self.device}. Move "
                "one of them."
            )
        # On a GPU, looking at them would wait for it.
        if input_ids.device.type == "cpu":
            least, largest = (int(end) for end in torch.aminmax(input_ids))
            if least < 0 or largest >= self.config.vocabulary:
                raise ValueError(
                    f"input_ids go from {least} to {largest}, but the vocabulary has the ids 0 to "
                    f"{self.config.vocabulary - 1}. Use the checkpoint's own tokenizer."
                )
        return Segments.from_lengths(counts, device=self.device, causal=self.config.causal)

    def pack(self, texts: Sequence[str]) -> TextPack:
        """Make one pack of texts by the checkpoint's own tokenizer.

        A text that is too long is truncated as the reference does.

        Raises: as `tokenize`.
        """
        return self.lay(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as the reference's tokenizer makes them.

        Raises: TypeError for what is no list of strings; ValueError without a tokenizer, or for a
        text that is not valid Unicode.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts must be a list of strings; a single text is a list of one.")
        if self.tokenizer is None:
            raise ValueError("This encoder has no tokenizer. Give ids to `encode`.")
        for place, text in enumerate(texts):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"Text {place} is not valid Unicode: {text!r}. Type it as UTF-8.")
        return self.tokenizer(texts)

    def lay(self, ids: Sequence[Sequence[int]]) -> TextPack:
        """Lay the ids of texts end to end on the encoder's device.

        Raises: ValueError for a text without tokens, which a tower without an end token makes.
        """
        for place, text in enumerate(ids):
            if not len(text):
                raise ValueError(
                    f"Text {place} has no tokens: it is empty, and this tokenizer ends no text by "
                    "one. Give it a word."
                )
        laid = np.array([number for text in ids for number in text], np.int64)
        return TextPack(to_device(laid, self.device), tuple(len(text) for text in ids))

    def embed(self, texts: Sequence[str], *, token_budget: int = 16384) -> np.ndarray:
        """Return one vector for each text, in the space that images share, not normed.

        That is the space of `encoder.embed(images, projected=True)`, or where the checkpoint has
        no projection, of `encoder.embed(images)`. Takes texts of any number, and makes packs of at
        most `token_budget` tokens. Runs in inference mode.

        Shapes: N texts -> float32 [N, E].
        Raises: TypeError for what is no list of strings; ValueError for too small a budget.
        """
        if token_budget < self.config.positions:
            raise ValueError(
                f"token_budget is {token_budget}, but one text may have {self.config.positions} "
                "tokens. Raise it."
            )
        ids = self.tokenize(texts)
        vectors = np.empty((len(ids), self.width), np.float32)
        with torch.inference_mode():
            for chosen in plan_packs((len(text) for text in ids), token_budget):
                pack = self.lay([ids[text] for text in chosen])
                vectors[chosen] = self.encode(pack).vectors().cpu().numpy()
        return vectors

    def logits(self, images: Vectors, texts: Vectors) -> Float[Tensor, "N M"]:
        """Return how well each image fits each text, as the model was trained: scaled cosines.

        Shapes: images [N, E], texts [M, E], vectors of the shared space, tensors or what both
        `embed` return -> [N, M].
        Raises: ValueError for a text tower that was saved alone, without its scale.
        """
        if self.logit_scale is None:
            raise ValueError(
                "This text tower was saved alone, without the scale of logits. Load the checkpoint "
                "of both towers, or compare vectors by their cosines."
            )
        seen, read = (
            torch.as_tensor(each, dtype=torch.float32, device=self.device)
            for each in (images, texts)
        )
        scale = self.logit_scale
        if self.config.most_scale is not None:
            scale = scale.clamp(0.0, math.log(self.config.most_scale))
        cosines = F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        scaled = cosines * scale.exp()
        return scaled if self.logit_bias is None else scaled + self.logit_bias

    def probabilities(self, images: Vectors, texts: Vectors) -> Float[Tensor, "N M"]:
        """Return how likely each text is for each image: each pair by itself, or one of all texts.

        SigLIP judges each pair by itself, by a sigmoid; the others' probabilities sum to 1 over the
        texts.

        Shapes: as `logits`.
        """
        return self.judge(self.logits(images, texts))

    def judge(self, logits: Tensor) -> Tensor:
        """Return the probabilities that logits stand for. Shapes: [N, M] -> [N, M]."""
        return logits.softmax(-1) if self.logit_bias is None else logits.sigmoid()
