"""A multimodal model with our encoder in the place of its tower answers as it did before."""

import copy
from importlib import import_module
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5MoeVisionModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen4ExpVisionModel,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

import packvit
from packvit.towers.in_place import BatchTower, TowerInPlace
from packvit.towers.replacing import KINDS

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
IMAGE, START, END = 90, 91, 92
GRID = [(1, 4, 6), (1, 2, 8), (1, 6, 4)]


def randomise(model: Any) -> Any:
    """Give every tensor a scale at which it matters."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5
            weight.copy_(torch.randn(weight.shape, generator=draw) * scale + (weight.ndim == 1))
    return model.eval()


def qwen3() -> tuple[Any, dict[str, Tensor]]:
    config = Qwen3VLConfig(
        text_config=TEXT
        | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 3,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return randomise(Qwen3VLForConditionalGeneration(config)), asked_of_qwen()


def qwen2_5() -> tuple[Any, dict[str, Tensor]]:
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 3,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return randomise(Qwen2_5_VLForConditionalGeneration(config)), asked_of_qwen()


def asked_of_qwen() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    words = [5, 6]
    for _, rows, columns in GRID:
        words += [START, *[IMAGE] * (rows * columns // 4), END, 7]
    patches = torch.randn(sum(t * h * w for t, h, w in GRID), 3 * 2 * 16, generator=draw)
    ids = torch.tensor([words])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor(GRID),
    }


def qwen2() -> tuple[Any, dict[str, Tensor]]:
    config = Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return randomise(Qwen2VLForConditionalGeneration(config)), asked_of_qwen()


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


def asked_of_pixels(tokens: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, *[IMAGE] * tokens, 6, *[IMAGE] * tokens, 7]])
    pixels = torch.randn(2, 3, 24, 24, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def paligemma() -> tuple[Any, dict[str, Tensor]]:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            **(SIZES | {"vision_use_head": False, "projection_dim": 32})
        ),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    asked = asked_of_pixels(36)
    return randomise(PaliGemmaForConditionalGeneration(config)), asked | {
        "token_type_ids": torch.zeros_like(asked["input_ids"])
    }


def vipllava() -> tuple[Any, dict[str, Tensor]]:
    kind: Any = VipLlavaConfig
    config = kind(
        vision_config=CLIPVisionConfig(**SIZES),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1, 1],
    )
    return randomise(VipLlavaForConditionalGeneration(config)), asked_of_pixels(36)


def aya() -> tuple[Any, dict[str, Tensor]]:
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**SIZES, vision_use_head=False),
        text_config=Cohere2Config(**TEXT),
        image_token_index=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
    )
    return randomise(AyaVisionForConditionalGeneration(config)), asked_of_pixels(9)


def gemma3() -> tuple[Any, dict[str, Tensor]]:
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SIZES, vision_use_head=False),
        text_config=Gemma3TextConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        mm_tokens_per_image=9,
    )
    asked = asked_of_pixels(9)
    return randomise(Gemma3ForConditionalGeneration(config)), asked | {
        "token_type_ids": (asked["input_ids"] == IMAGE).int()
    }


def tiled(model: Any, config: Any, tokens: int) -> tuple[Any, dict[str, Tensor]]:
    """A model that cuts an image into tiles: two of 24 x 24 pixels, and the whole made small."""
    vision = (
        SiglipVisionConfig(**SIZES) if "Onevision" in config.__name__ else CLIPVisionConfig(**SIZES)
    )
    text = Qwen2Config(**TEXT) if "Onevision" in config.__name__ else LlamaConfig(**TEXT)
    made = config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    )
    draw = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, *[IMAGE] * tokens, 7]])
    return randomise(model(made)), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 3, 24, 24, generator=draw),
        "image_sizes": torch.tensor([[24, 48]]),
    }


def llava(kind: str) -> tuple[Any, dict[str, Tensor]]:
    vision = CLIPVisionConfig(**SIZES) if kind == "clip" else SiglipVisionConfig(**SIZES)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
    )
    return randomise(LlavaForConditionalGeneration(config)), asked_of_pixels(36)


MODELS = {
    "Qwen3-VL": qwen3,
    "Qwen2.5-VL": qwen2_5,
    "Qwen2-VL": qwen2,
    "PaliGemma": paligemma,
    "VipLLaVA": vipllava,
    "Aya Vision": aya,
    "Gemma 3": gemma3,
    "LLaVA-NeXT": lambda: tiled(LlavaNextForConditionalGeneration, LlavaNextConfig, 114),
    "LLaVA-OneVision": lambda: tiled(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, 114
    ),
    "LLaVA, CLIP": lambda: llava("clip"),
    "LLaVA, SigLIP": lambda: llava("siglip"),
}


@pytest.fixture(params=MODELS)
def model_and_asked(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    return MODELS[request.param]()


def logits(model: Any, asked: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**asked).logits


def words(model: Any, asked: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.generate(**asked, max_new_tokens=6, do_sample=False)


def test_logits_and_words_are_as_before_and_back_again(model_and_asked: Any):
    model, asked = model_and_asked
    before, said = logits(model, asked), words(model, asked)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dimmed = logits(model, asked | {"pixel_values": asked["pixel_values"] * 0.5})
    assert (dimmed - before).abs().max() > 0.1  # the images matter
    encoder = packvit.replace_tower(model)
    assert isinstance(encoder, packvit.Encoder)
    torch.testing.assert_close(logits(model, asked), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(words(model, asked), said)
    with pytest.raises(ValueError, match="is one of packvit's already"):
        packvit.replace_tower(model)
    packvit.restore_tower(model)
    assert torch.equal(logits(model, asked), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to restore"):
        packvit.restore_tower(model)


def test_gradients_of_the_whole_model_are_as_before(model_and_asked: Any):
    model, asked = model_and_asked
    other = copy.deepcopy(model)
    packvit.replace_tower(other)

    def gradient(one: Any) -> Tensor:
        one(**asked, labels=asked["input_ids"]).loss.backward()
        grads = [p.grad for n, p in one.named_parameters() if "language_model" in n]
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    expected = gradient(model)
    torch.testing.assert_close(gradient(other), expected, rtol=1e-3, atol=1e-5)
    [place] = [m for m in other.modules() if isinstance(m, TowerInPlace)]
    with_grad = [p.grad for p in place.encoder.encoder.parameters()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in with_grad[:4])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train_on_our_tower_and_come_back_with_it():
    model, asked = qwen3()
    encoder = packvit.replace_tower(model)
    config = peft.LoraConfig(r=2, target_modules=r".*encoder\.encoder\.layers.*\.(qkv|out|up|down)")
    adapted = peft.get_peft_model(model, config)
    adapted(**asked, labels=asked["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(grads) == 4 * encoder.config.layers
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in module.named_parameters()}


def test_each_weight_keeps_its_own_requires_grad_there_and_back(model_and_asked: Any):
    model, _ = model_and_asked
    [tower] = [m for m in model.modules() if type(m).__name__ in KINDS]
    frozen = tuple(name for name, _ in tower.named_parameters() if ".0." in name)
    for name, weight in tower.named_parameters():
        weight.requires_grad_(name not in frozen)
    before = flags(model)
    assert {True, False} <= set(flags(tower).values())
    encoder = packvit.replace_tower(model)
    assert not any(
        weight.requires_grad for weight in encoder.encoder.get_submodule("layers.0").parameters()
    )
    assert all(
        weight.requires_grad for weight in encoder.encoder.get_submodule("layers.1").parameters()
    )
    assert encoder.embeddings.patches.weight.requires_grad
    packvit.restore_tower(model)
    assert flags(model) == before


def test_a_frozen_tower_of_which_a_part_was_trained_comes_back_as_it_was_trained():
    model, _ = qwen3()
    model.model.visual.requires_grad_(False)
    encoder = packvit.replace_tower(model)
    assert not any(flags(encoder).values())
    encoder.encoder.get_submodule("layers.2").requires_grad_(True)
    tower = packvit.restore_tower(model)
    trained = {name for name, trained in flags(tower).items() if trained}
    assert trained == {name for name in flags(tower) if name.startswith("blocks.2.")}


def test_a_weight_of_ours_that_would_be_frozen_in_part_is_refused():
    model, _ = llava("clip")
    model.requires_grad_(False)
    [query] = [m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.q_proj")][:1]
    query.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen in part.*: encoder\.layers\.1\.attention\.qkv"):
        packvit.replace_tower(model)


@pytest.mark.parametrize("kind", [Qwen3_5MoeVisionModel, Qwen4ExpVisionModel])
def test_towers_of_qwen3_vl_s_other_successors_give_the_same_tokens(kind: Any):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2}
    own = {"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
    model = randomise(nn.ModuleDict({"visual": kind(kind.config_class(**sizes, **own))}))
    asked = asked_of_qwen()
    given = {"hidden_states": asked["pixel_values"], "grid_thw": asked["image_grid_thw"]}
    with torch.inference_mode():
        before = model["visual"](**given).pooler_output
        packvit.replace_tower(model)
        after = model["visual"](**given).pooler_output
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_tower_of_ours_is_one_sentence():
    with pytest.raises(ValueError, match="Linear holds 0 vision towers that packvit runs"):
        packvit.replace_tower(nn.Linear(2, 2))
    model, _ = llava("clip")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="reads class tokens"):
        packvit.replace_tower(model)


def test_of_the_layers_those_that_the_model_names_are_kept():
    """Since transformers 5.24 it does, and before it asks for all."""
    model, asked = llava("clip")
    packvit.replace_tower(model)
    [place] = [module for module in model.modules() if isinstance(module, BatchTower)]
    every = place(asked["pixel_values"], output_hidden_states=True).hidden_states
    assert every[0] is None
    for wanted, kept in ((-2, {2}), ([-1, 1], {1, 3}), ((3,), {3})):
        found = place(asked["pixel_values"], output_hidden_states=wanted).hidden_states
        assert {layer for layer, tokens in enumerate(found) if tokens is not None} == kept
        assert all(torch.equal(found[layer], every[layer]) for layer in kept)
    assert place(asked["pixel_values"]).hidden_states is None
    with pytest.raises(ValueError, match="enters the tower's first block"):
        place(asked["pixel_values"], output_hidden_states=[0, -1])


# (module, class): towers of models whose text is too large to write down here.
SUCCESSORS = [
    ("qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
    ("qwen3_5", "Qwen3_5VisionModel"),
    ("qwen3_5_moe", "Qwen3_5MoeVisionModel"),
    ("qwen4_exp", "Qwen4ExpVisionModel"),
]


@pytest.mark.parametrize(("module", "name"), SUCCESSORS)
def test_the_towers_of_qwens_successors_answer_as_before(module: str, name: str):
    kind: Any = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    entries: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "depth": 3}
    entries |= {"num_heads": 2}
    entries |= {"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
    if "deepstack_visual_indexes" in kind.config_class().to_dict():
        entries["deepstack_visual_indexes"] = [0, 1]
    model: Any = nn.ModuleDict({"visual": randomise(kind(kind.config_class(**entries)))})
    asked = asked_of_qwen()
    given = {"hidden_states": asked["pixel_values"], "grid_thw": asked["image_grid_thw"]}
    weight = torch.randn(28, 32, generator=torch.Generator().manual_seed(3))

    def run() -> tuple[Tensor, Tensor]:
        patches = given["hidden_states"].clone().requires_grad_()
        out = model["visual"](patches, given["grid_thw"])
        parts = [out.pooler_output, *(out.get("deepstack_features") or [])]
        torch.stack([(part * weight[: len(part)]).sum() for part in parts]).sum().backward()
        assert patches.grad is not None
        return torch.cat(parts).detach(), patches.grad

    before = run()
    packvit.replace_tower(model)
    for ours, theirs in zip(run(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
