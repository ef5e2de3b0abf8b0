"""Ids beside transformers' tokenizers, which read the same folders."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import two_towers
from hub_server import Hub, Repository
from transformers import AutoTokenizer, CLIPTokenizer, GemmaTokenizer, Siglip2Tokenizer
from two_towers import LONGEST

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.config import TextConfig
from packvit.text.tokenizing import Tokenizer, find_tokenizer

HARD = [
    "a photo of a cat",
    "",
    " ",
    "\u00dcn\u00efc\u00f6d\u00e9 \u00c0ccents \u00e9 e\u0301 \ufb01 \u2460 \u00bd",
    "\u0130stanbul \u1e9e \u01c5",
    "\U0001f98a\U0001f389 emoji \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\u65e5\u672c\u8a9e\u306e\u5199\u771f \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "x" * 1000,
    "word " * 300,
    "Don't STOP, we'll go's 123 4.5 ! ! !",
    " tabs\tand\nnewlines  and   spaces ",
    "\u200b\ufeff zero \x00 nul \x7f",
    "<|endoftext|> inside <|startoftext|> <|ENDOFTEXT|>",
    "<eos> and <pad> <unk> <bos>",
    "</s> first",
    "a </s> in the middle </s>",
    "\u2581under\u2581score_and_",
    "</s>",
]


def of_folder(folder: Path, *, padded: bool, positions: int = LONGEST, kind: str = "") -> Tokenizer:
    config = TextConfig(
        width=8,
        layers=1,
        heads=2,
        mlp_width=8,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        vocabulary=1000,
        positions=positions,
        padded=padded,
    )
    checkpoint = Checkpoint("x", None, {}, None, {}, (folder / "model.safetensors",))
    found = find_tokenizer(checkpoint, kind, config)
    assert found is not None
    return found


def misses(ours: Tokenizer, theirs: Any, *, padded: bool) -> list[tuple[str, Any, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SigLIP's warns of a text that ends by its end already
        wanted = theirs(
            HARD,
            truncation=True,
            max_length=LONGEST,
            padding="max_length" if padded else False,
        )["input_ids"]
    both = zip(HARD, ours(HARD), wanted, strict=True)
    return [(text, mine, ids) for text, mine, ids in both if list(mine) != list(ids)]


def test_clip_ids_equal_the_references_on_hard_texts(tmp_path: Path):
    theirs = two_towers.write_clip_tokenizer(tmp_path)
    assert misses(of_folder(tmp_path, padded=False), theirs, padded=False) == []


def test_clip_ids_of_the_older_two_files_equal_the_references(tmp_path: Path):
    two_towers.write_clip_tokenizer(tmp_path / "new")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"}
    for name in ("bos", "eos"):
        word = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}[name]
        settings[f"{name}_token"] = {"__type": "AddedToken", "content": word, **plain}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert misses(of_folder(tmp_path, padded=False), theirs, padded=False) == []


@pytest.mark.parametrize("kind", [Siglip2Tokenizer, GemmaTokenizer])
@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}]
)
def test_siglip2_ids_equal_the_references_on_hard_texts(
    tmp_path: Path, kind: type, options: dict[str, Any]
):
    theirs = two_towers.write_gemma_tokenizer(tmp_path, kind, **options)
    assert misses(of_folder(tmp_path, padded=True), theirs, padded=True) == []


def test_siglip2_lowers_the_case_even_where_tokenizer_json_does_not(tmp_path: Path):
    two_towers.write_gemma_tokenizer(tmp_path, GemmaTokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Siglip2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = Siglip2Tokenizer.from_pretrained(tmp_path)
    ours = of_folder(tmp_path, padded=True)
    assert misses(ours, theirs, padded=True) == []
    assert ours(["TWO CATS"]) == ours(["two cats"])


def test_a_tokenizer_of_no_class_that_we_know_is_its_file_as_it_is(tmp_path: Path):
    two_towers.write_clip_tokenizer(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = of_folder(tmp_path, padded=False)
    assert misses(ours, AutoTokenizer.from_pretrained(tmp_path), padded=False) == []
    assert ours(["CAT"]) != ours(["cat"])


def test_siglip_ids_equal_the_references_on_hard_texts(tmp_path: Path):
    library = pytest.importorskip("sentencepiece", reason="extra text is not installed")
    from transformers import SiglipTokenizer

    library.SentencePieceTrainer.train(
        sentence_iterator=iter([words.lower() for words in two_towers.WORDS] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=LONGEST).save_pretrained(
        tmp_path
    )
    theirs = SiglipTokenizer.from_pretrained(tmp_path)
    ours = of_folder(tmp_path, padded=True)
    assert misses(ours, theirs, padded=True) == []
    assert ours(["Two red bicycles!"]) == ours(["two red bicycles"])


def test_a_text_is_cut_at_the_shorter_of_what_tokenizer_and_tower_take(tmp_path: Path):
    two_towers.write_clip_tokenizer(tmp_path)
    tokenizer = of_folder(tmp_path, padded=False, positions=9)
    assert [len(ids) for ids in tokenizer(["word " * 300, ""])] == [9, 2]
    tokenizer = of_folder(tmp_path, padded=False, positions=900)
    assert [len(ids) for ids in tokenizer(["word " * 300])] == [LONGEST]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1, 2"),
        ("tokenizer_config.json", '{"padding_side": "above"}'),
        ("tokenizer_config.json", '{"truncation_side": 3}'),
        ("tokenizer_config.json", '{"eos_token": 5, "add_eos_token": true}'),
        ("tokenizer_config.json", '{"pad_token": "<none>"}'),
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, name: str, damage: str):
    two_towers.write_gemma_tokenizer(tmp_path)
    (tmp_path / name).write_text(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer of x cannot be read .*tokenizer\.json"):
        of_folder(tmp_path, padded=True, kind="GemmaTokenizer")


def test_without_the_library_one_sentence_says_how_to_install_it(tmp_path: Path):
    two_towers.build("clip").save_pretrained(tmp_path)
    two_towers.write_clip_tokenizer(tmp_path)
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "import packvit\n"
        f"try: packvit.load_text({str(tmp_path)!r})\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == (
        f"The tokenizer of {tmp_path} needs the tokenizers library, which is not installed: "
        "pip install 'packvit[text]'\n"
    )


def test_a_checkpoint_without_a_tokenizer_takes_ids_alone(tmp_path: Path):
    two_towers.build("clip").save_pretrained(tmp_path)
    text = packvit.load_text(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer.*encode"):
        text.embed(["a cat"])


@pytest.mark.soak
def test_the_hubs_tokenizer_comes_from_the_commit_of_the_weights(tmp_path: Path):
    commits = {}
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        folder = tmp_path / commit
        two_towers.build("clip", seed).save_pretrained(folder)
        if seed == 0:
            two_towers.write_clip_tokenizer(folder)
        commits[commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = (
        "import packvit\n"
        "text = packvit.load_text('owner/name', revision='v1', device='cpu')\n"
        "print(text.checkpoint.revision, text.embed(['a cat']).sum())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = kept | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with Hub() as hub:
        hub.repositories["owner/name"] = Repository(commits, {"main": "b" * 40, "v1": "a" * 40})
        said = [
            subprocess.run(
                [sys.executable, "-W", "error", "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env=settings | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline},
            ).stdout
            for offline in "01"
        ]
    expected = packvit.load_text(tmp_path / ("a" * 40), device="cpu").embed(["a cat"]).sum()
    assert said == [f"{'a' * 40} {expected!s}\n"] * 2


def test_tipsv2_ids_equal_the_references_on_hard_texts(tmp_path: Path):
    """By the sentencepiece model alone, and by the tokenizer.json that transformers writes."""
    library = pytest.importorskip("sentencepiece", reason="extra text is not installed")
    from transformers import Tipsv2Tokenizer

    library.SentencePieceTrainer.train(
        sentence_iterator=iter([words.lower() for words in two_towers.WORDS] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.99,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    theirs = Tipsv2Tokenizer.from_pretrained(tmp_path, model_max_length=LONGEST)
    ours = of_folder(tmp_path, padded=False, kind="Tipsv2Tokenizer")
    assert misses(ours, theirs, padded=False) == []
    theirs.save_pretrained(tmp_path / "saved")
    again = of_folder(tmp_path / "saved", padded=False, kind="Tipsv2Tokenizer")
    assert misses(again, theirs, padded=False) == []
    assert ours([""]) == [[]]
