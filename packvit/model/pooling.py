"""What makes one vector of a sequence: the heads that checkpoints come with."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from packvit.config import EncoderConfig, Probe
from packvit.model.attention import Backend
from packvit.model.layers import MLP
from packvit.model.linear import Linear, affine
from packvit.model.norms import Tokens, norm_of
from packvit.model.parameters import drawn
from packvit.model.trunk import TrunkOutput, token_stream
from packvit.packs.segments import Segments

Pooled = Float[Tensor, "S D"]


class QueryPool(nn.Module):
    """One learned query attends to the tokens of each sequence: AIMv2's pooling head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = drawn(config.width)
        self.kv = Linear(config.width, 2 * config.width, bias=bool(config.qkv_bias))
        self.out = Linear(config.width, config.width)

    def forward(self, tokens: Tokens, segments: Segments, backend: Backend) -> Pooled:
        """Return one vector for each sequence."""
        pooled = attend_once(self.query, self.kv(tokens), self.heads, segments, backend)
        return self.out(pooled)


class ProbePool(nn.Module):
    """A projected probe attends to the tokens of each sequence, then an MLP: SigLIP's head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        own = config.probe or Probe(config.heads, config.mlp_width)
        self.heads = own.heads
        self.probe = drawn(config.width)
        self.qkv: nn.Module = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm = norm_of(own.norm or config.norm, config.width, config.norm_eps)
        self.mlp = MLP(replace(config, mlp_width=own.mlp_width))

    def forward(self, tokens: Tokens, segments: Segments, backend: Backend) -> Pooled:
        """Return one vector for each sequence."""
        query, held = self.project(tokens)
        pooled = self.out(attend_once(query, held, self.heads, segments, backend))
        return pooled + self.mlp(self.norm(pooled))

    def project(self, tokens: Tokens) -> tuple[Float[Tensor, " D"], Float[Tensor, "T 2*D"]]:
        """Return the probe's query, and keys and values of the tokens side by side."""
        parts, qkv = [len(self.probe), 2 * len(self.probe)], self.qkv
        if not isinstance(qkv, Linear):  # an adapter, which must be called as a module
            return qkv(self.probe[None]).split(parts, -1)[0][0], qkv(tokens).split(parts, -1)[1]
        weights, biases = qkv.weight.split(parts), qkv.bias.split(parts)
        query = affine(self.probe, weights[0], biases[0], False)
        return query, affine(tokens, weights[1], biases[1], qkv.invariant)


def attend_once(
    query: Float[Tensor, " D"],
    held: Float[Tensor, "T 2*D"],
    heads: int,
    segments: Segments,
    backend: Backend,
) -> Pooled:
    """Let one query attend to each sequence's keys and values, held side by side."""
    sequences = len(segments.lengths)
    key, value = held.unflatten(-1, (2, heads, -1)).unbind(-3)
    queries = Segments.from_lengths((1,) * sequences, device=held.device)
    asked = query.unflatten(0, (heads, -1)).repeat(sequences, 1, 1)
    return backend.run(asked, key, value, queries, segments).flatten(-2)


def pooling_head(config: EncoderConfig) -> QueryPool | ProbePool | None:
    """Return the head that attends to the tokens, or None where none does."""
    if config.pool == "query":
        return QueryPool(config)
    return ProbePool(config) if config.pool == "probe" else None


def projection_layer(config: EncoderConfig) -> Linear | None:
    """Return the layer from pooled vectors to the space shared with text, or None without one."""
    if config.projection is None:
        return None
    return Linear(config.width, config.projection, bias=config.projection_bias)


def pool_sequences(
    output: TrunkOutput, config: EncoderConfig, last_norm: nn.Module, head: nn.Module | None
) -> Pooled | None:
    """Return the checkpoint's one vector a sequence, or None if it has none."""
    if config.pool == "class":
        chosen = config.summary.chosen if config.summary else (0,)
        first = torch.cat([output.prefix[:, token] for token in chosen], 1)
        return last_norm(first) if config.final_norm == "pooled" else first
    if head is None:
        return None
    segments = Segments.from_lengths(output.plan.lengths, device=output.tokens.device)
    return head(token_stream(output), segments, output.plan.backend)
