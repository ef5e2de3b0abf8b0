"""Small random checkpoints of two towers, as transformers writes them, and their tokenizers."""

import json
from pathlib import Path
from typing import Any

import reference
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
)

END, LONGEST = 1, 16
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 800,
    "max_position_embeddings": LONGEST,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": END,
}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip": (CLIPModel, CLIPConfig, {}),
    "clip, largest id": (CLIPModel, CLIPConfig, {"eos_token_id": 2}),
    "siglip": (SiglipModel, SiglipConfig, {"hidden_size": 48, "projection_size": 64}),
    "siglip2": (Siglip2Model, Siglip2Config, {}),
    "aimv2": (Aimv2Model, Aimv2Config, {"qkv_bias": True, "mlp_bias": True}),
}
WORDS = (
    "a photo of a cat and a dog, don't stop",
    "two red bicycles beside a river",
    "\u00dcn\u00efc\u00f6d\u00e9 accents \u65e5\u672c\u8a9e 123 \U0001f98a",
)


def build(kind: str, seed: int = 0, **text: Any) -> Any:
    """A small random model of transformers with two towers."""
    model, config, own = KINDS[kind]
    images = dict(reference.TINY)
    if model is Siglip2Model:
        del images["image_size"]
        images["num_patches"] = 25
    if text:
        images |= {name: size for name, size in text.items() if name in images}
    # transformers' AIMv2 forgets to be causal where its attention wants no mask: "eager" wants one.
    attention = {"attn_implementation": "eager"} if model is Aimv2Model else {}
    made = config(text_config=TEXT | own | text, vision_config=images, **attention)
    built: Any = reference.randomise(model(made), seed)
    with torch.no_grad():
        built.logit_scale.fill_(2.5)
    return built


def draw_texts(padded: bool, texts: int = 24) -> list[Tensor]:
    """Ids of texts: each ends by END, which `padded` ones have throughout behind it."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, LONGEST + 1, (texts,), generator=generator).tolist()
    found = []
    for length in lengths:
        ids = torch.randint(3, 700, (length,), generator=generator)
        ids[-1] = END
        rest = ids.new_full((LONGEST - length if padded else 0,), END)
        found.append(torch.cat([ids, rest]))
    return found


def run(model: Any, ids: list[Tensor]) -> dict[str, list[Tensor]]:
    """What a model says about each text by itself: tokens, pooled, and projected."""
    said: dict[str, list[Tensor]] = {"tokens": [], "pooled": [], "projected": []}
    with torch.no_grad():
        for text in ids:
            out = model.text_model(text[None], attention_mask=torch.ones_like(text)[None])
            said["tokens"].append(out.last_hidden_state[0])
            said["pooled"].append(out.pooler_output)
            if hasattr(model, "text_projection"):
                said["projected"].append(model.text_projection(out.pooler_output))
    return said


def write_clip_tokenizer(folder: Path) -> Any:
    """Train CLIP's tokenizer on a few words and write it as transformers does."""
    blank = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trained.train_from_iterator(
        WORDS * 20,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return write_tokenizer(CLIPTokenizer, trained, folder)


def write_gemma_tokenizer(folder: Path, kind: type = Siglip2Tokenizer, **options: Any) -> Any:
    """Train SigLIP2's tokenizer, or one of its kind, on a few words and write it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        [*(words.lower() for words in WORDS), *WORDS],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    return write_tokenizer(kind, trained, folder, **options)


def write_tokenizer(kind: Any, trained: Tokenizer, folder: Path, **options: Any) -> Any:
    """Write a trained tokenizer as a class of transformers does, and return it as that reads it."""
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = kind(vocab=model["vocab"], merges=merges, model_max_length=LONGEST, **options)
    made.save_pretrained(folder)
    return kind.from_pretrained(folder)
