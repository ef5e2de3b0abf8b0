"""Words, beside transformers: a checkpoint with random weights, and the same images and words."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import two_towers
from click.testing import CliRunner, Result
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import packvit
from demo.photographs import photographs
from packvit.cli import main
from packvit.corpus import UsageError
from packvit.retrieval.zeroshot import TEMPLATES, read_labels, zeroshot

SIDE = 70
WORDS = ["a photo of a cat", "two red bicycles", "a dog", "a river"]


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve halves of photographs in folders of two labels, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    for place, path in enumerate(photographs()[:6]):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((200, 200))
        for half, box in enumerate(
            [(0, 0, 100, image.height), (100, 0, image.width, image.height)]
        ):
            named = folder / ("a_dog" if (place + half) % 3 else "cat") / f"{place}{half}.png"
            named.parent.mkdir(exist_ok=True)
            image.crop(box).save(named)
    (folder / "cat" / "broken.jpg").write_bytes(b"nothing")
    return folder


class Towers:
    """A written checkpoint, its features, and what transformers says of both."""

    def __init__(self, kind: str, folder: Path, photos: Path) -> None:
        self.model = two_towers.build(kind)
        self.checkpoint = folder / "checkpoint"
        self.model.save_pretrained(self.checkpoint)
        if kind == "clip":
            self.tokenizer = two_towers.write_clip_tokenizer(self.checkpoint)
            size: dict[str, Any] = {"size": {"shortest_edge": SIDE}}
            size["crop_size"] = {"height": SIDE, "width": SIDE}
            self.processor: Any = transformers.CLIPImageProcessorPil(**size)
        else:
            self.tokenizer = two_towers.write_gemma_tokenizer(self.checkpoint)
            self.processor = transformers.SiglipImageProcessorPil(
                size={"height": SIDE, "width": SIDE}
            )
        self.processor.save_pretrained(self.checkpoint)
        self.photos, self.features = photos, folder / "features"
        packvit.embed(photos, out=self.features, model=self.checkpoint, device="cpu")
        self.names = list(packvit.read(self.features).good().ids)

    def cosines(self, words: list[str]) -> np.ndarray:
        """Return transformers' cosines of all images and words."""
        images = [Image.open(self.photos / name) for name in self.names]
        with torch.no_grad():
            pixels = self.processor(images, return_tensors="pt")
            seen = self.model.get_image_features(**pixels).pooler_output
            length = {"padding": "max_length", "max_length": two_towers.LONGEST}
            padding: dict[str, Any] = {"padding": True} if self.named == "CLIPModel" else length
            ids = self.tokenizer(words, truncation=True, return_tensors="pt", **padding)
            if self.named == "SiglipModel":  # which attends to what fills a text
                ids = {"input_ids": ids["input_ids"]}
            read = self.model.get_text_features(**ids).pooler_output
        return torch.cosine_similarity(seen[:, None], read[None], dim=-1).numpy()

    @property
    def named(self) -> str:
        return type(self.model).__name__


@pytest.fixture(scope="module", params=["clip", "siglip"])
def towers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, photos: Path
) -> Towers:
    return Towers(request.param, tmp_path_factory.mktemp(request.param), photos)


def test_words_rank_photographs_as_transformers_does(towers: Towers):
    expected = towers.cosines(WORDS)
    for column, hits in enumerate(packvit.search(towers.features, WORDS, top=20, device="cpu")):
        order = np.argsort(-expected[:, column])
        assert [hit.id for hit in hits] == [towers.names[place] for place in order]
        scores = [hit.score for hit in hits]
        np.testing.assert_allclose(scores, expected[order, column], atol=1e-5)


def test_words_and_a_photograph_are_added_in_the_space_of_words(towers: Towers):
    photo = towers.photos / towers.names[4]
    [hits] = packvit.search(towers.features, ["2:a dog", f"+ {photo}", "- a river"], device="cpu")
    column = "projected" if towers.named == "CLIPModel" else "pooled"
    table = packvit.read(towers.features).good().table
    images = np.array(table[column].to_pylist(), np.float64)
    text = packvit.load_text(towers.checkpoint, device="cpu").embed(["a dog", "a river"])
    images, text = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, text))
    wanted = 2 * text[0] + images[4] - text[1]
    expected = images @ wanted / np.linalg.norm(wanted)
    order = [place for place in np.argsort(-expected) if place != 4][:10]
    assert [hit.id for hit in hits] == [towers.names[place] for place in order]
    np.testing.assert_allclose([h.score for h in hits], expected[order], atol=1e-5)


def test_labels_are_scored_as_transformers_scores_them(tmp_path: Path, towers: Towers):
    labels = ["cat", "a dog", "bicycle"]
    before = sorted(towers.features.rglob("*"))
    out = tmp_path / "labels.parquet"
    found = zeroshot(towers.features, labels, out=out, templates=["{}"], device="cpu")
    cosines = towers.cosines(labels)
    table = pq.read_table(out)
    every = packvit.read(towers.features)
    assert table["id"].to_pylist() == list(every.ids)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert rows["cat/broken.jpg"] == dict.fromkeys(rows["cat/broken.jpg"]) | {
        "id": "cat/broken.jpg"
    }
    assert json.loads(table.schema.metadata[b"labels"]) == labels
    scale = towers.model.logit_scale.exp().item()
    logits = torch.from_numpy(cosines * scale)
    if towers.named == "CLIPModel":
        likely = logits.softmax(-1).numpy()
    else:
        likely = (logits + towers.model.logit_bias.item()).sigmoid().numpy()
    for place, name in enumerate(towers.names):
        best = int(cosines[place].argmax())
        assert rows[name]["label"] == labels[best]
        assert rows[name]["cosine"] == pytest.approx(cosines[place, best], abs=1e-5)
        np.testing.assert_allclose(rows[name]["scores"], likely[place], atol=1e-4)
        assert rows[name]["score"] == rows[name]["scores"][best]
    assert (found.rows, found.errors, sum(found.counts.values())) == (13, 1, 12)
    assert sorted(towers.features.rglob("*")) == before


def test_a_label_is_the_mean_of_its_templates(tmp_path: Path, towers: Towers):
    tower = packvit.load_text(towers.checkpoint, device="cpu")
    zeroshot(towers.features, ["cat", "dog"], out=tmp_path / "out.parquet", device="cpu")
    texts = [tower.embed([t.replace("{}", label) for t in TEMPLATES]) for label in ("cat", "dog")]
    units = [text / np.linalg.norm(text, axis=1, keepdims=True) for text in texts]
    means = np.array([unit.mean(0) / np.linalg.norm(unit.mean(0)) for unit in units])
    column = "projected" if towers.named == "CLIPModel" else "pooled"
    images = np.array(packvit.read(towers.features).good().table[column].to_pylist())
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    expected = (images @ means.T).max(axis=1)
    found = [each for each in pq.read_table(tmp_path / "out.parquet")["cosine"].to_pylist() if each]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_command_writes_a_table_and_says_how_many_have_each_label(
    tmp_path: Path, towers: Towers
):
    (tmp_path / "names.txt").write_text("cat\n\na dog\n")
    argv = ("zeroshot", towers.features, "--device", "cpu", "--out", tmp_path / "labels.csv")
    result = invoke(*argv, "--labels", tmp_path / "names.txt")
    assert result.exit_code == 0
    counts = {line.split("  ")[-1]: int(line.split()[0]) for line in result.stdout.splitlines()}
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert len(lines) == 14
    labels = [line.split(",")[1].strip('"') for line in lines[1:]]
    assert counts == {label: labels.count(label) for label in ("cat", "a dog")}
    assert result.stderr.endswith("13 rows, 1 of them without a label\n")
    assert json.loads(invoke(*argv, "--labels", "cat,a dog", "--json").stdout)["labels"] == counts


def test_zero_shot_accuracy_is_the_share_of_best_labels_that_are_right(towers: Towers):
    result = invoke(
        *("evaluate", "zeroshot", towers.features, "--template", "{}"),
        *("--device", "cpu", "--json"),
    )
    found = json.loads(result.stdout)
    labels = ["a_dog", "cat"]
    cosines = towers.cosines(["a dog", "cat"])
    truth = [labels.index(name.split("/")[0]) for name in towers.names]
    assert found["top1"] == (cosines.argmax(1) == truth).mean()
    assert (found["top5"], found["rows"], found["left_out"], found["classes"]) == (1, 12, 1, 2)


def test_words_that_cannot_be_looked_for_are_answered_in_a_sentence(tmp_path: Path, towers: Towers):
    out = ("--out", tmp_path / "out.csv")
    for argv, answer in (
        (("zeroshot", towers.features, "--labels", " , ", *out), "--labels is empty. Give some"),
        (("zeroshot", towers.features, "--labels", "a,b,a", *out), '--labels names "a" twice'),
        (("zeroshot", towers.features, "--labels", "gone.txt", *out), "but there is no such file"),
        (("zeroshot", towers.features, "--labels", "a", "--out", "x.txt"), "must end in .parquet"),
        (
            ("zeroshot", towers.features, "--labels", "a", "--template", "b", *out),
            "has no {} for the label",
        ),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr, argv
    other = shutil.copytree(towers.checkpoint, tmp_path / "other")
    two_towers.build("clip" if towers.named == "CLIPModel" else "siglip", 1).save_pretrained(other)
    with pytest.raises(UsageError, match="so they cannot be compared"):
        packvit.search(towers.features, "a cat", model=str(other), device="cpu")
    assert not (tmp_path / "out.csv").exists()


def test_words_in_no_language_of_the_tokenizer_are_refused(tmp_path: Path, photos: Path):
    model = two_towers.build("clip")
    model.save_pretrained(tmp_path / "checkpoint")
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat": 2, "dog": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    packvit.embed(photos, out=tmp_path / "features", model=tmp_path / "checkpoint", device="cpu")
    assert packvit.search(tmp_path / "features", "cat", device="cpu")
    result = invoke("search", tmp_path / "features", "\u732b", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert 'The model\'s tokenizer reads nothing in "\u732b"' in result.stderr


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (b"\xef\xbb\xbfa cat\r\n\r\n  a dog \r\n", ["a cat", "a dog"]),
        (b"caf\xc3\xa9, au lait\n\n\n", ["caf\u00e9, au lait"]),
        (b"a cat\ra dog", ["a cat", "a dog"]),
    ],
)
def test_a_file_of_labels_may_come_from_any_editor(
    tmp_path: Path, content: bytes, labels: list[str]
):
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_labels(str(tmp_path / "labels.txt")) == labels


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a\n\na\n", 'names "a" twice'), (b"\r\n", "is empty"), (b"\xff\xfea\x00", "cannot be read")],
)
def test_a_file_that_holds_no_labels_is_refused(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_labels(str(tmp_path / "labels.txt"))
