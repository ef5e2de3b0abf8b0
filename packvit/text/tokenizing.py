"""Words to ids, as the checkpoint's own tokenizer in transformers makes them, without transformers.

Which tokenizer that is, tokenizer_config.json says by the name of transformers' class. A class with
rules of its own lays them over what tokenizer.json says; any other is tokenizer.json as it is.

Source: transformers 5.17, models/clip, siglip, siglip2 and gemma, `tokenization_*.py`;
`tokenization_utils_tokenizers.py`, `convert_to_native_format` and `update_post_processor`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packvit.checkpoints.config_json import Json, entry
from packvit.checkpoints.downloads import fetch
from packvit.checkpoints.errors import CheckpointError, NotCachedError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.folders import find_file, read_json
from packvit.config import TextConfig, check_choice
from packvit.text.pieces import META, Filling, LowerPieceTokenizer, PieceTokenizer, Side

SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
WHOLE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
PIECES, TIPS_PIECES = "spiece.model", "tokenizer.model"
TOKENIZER_FILES = (SETTINGS, SPECIAL, WHOLE, VOCABULARY, MERGES, PIECES, TIPS_PIECES)
WANTED = {"SiglipTokenizer": (PIECES,), "Tipsv2Tokenizer": (WHOLE, TIPS_PIECES)}  # by class

CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True, slots=True)
class FileTokenizer:
    """A tokenizer of the `tokenizers` library, which truncates by itself."""

    tokenizer: Any
    filling: Filling

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        found = self.tokenizer.encode_batch(list(texts))
        return [self.filling.fill(encoding.ids) for encoding in found]


Tokenizer = FileTokenizer | PieceTokenizer | LowerPieceTokenizer


def find_tokenizer(checkpoint: Checkpoint, default: str, config: TextConfig) -> Tokenizer | None:
    """Return a checkpoint's tokenizer, or None where it has no file for one.

    `default` is transformers' class, where no file names one.

    Raises: CheckpointError for a damaged file; ImportError with the install line.
    """
    settings = read_settings(checkpoint)
    named = settings.get("tokenizer_class") or checkpoint.config.get("tokenizer_class") or default
    kind = str(named).removesuffix("Fast")
    most = settings.get("model_max_length")
    longest = config.positions
    if isinstance(most, int) and 0 < most < longest:
        longest = most
    wanted = WANTED.get(kind, (WHOLE, VOCABULARY, MERGES))
    files = {name: file for name in wanted if (file := locate(checkpoint, name))}
    pieces = next((files[name] for name in (PIECES, TIPS_PIECES) if name in files), None)
    if WHOLE in files:
        pieces = None
    elif pieces is None and len(files) < 2:
        return None
    library = import_or_explain("sentencepiece" if pieces else "tokenizers", checkpoint.name)
    try:
        if pieces:
            return read_pieces(library, pieces, settings, longest, config.padded)
        return read_whole(library, files, kind, settings, longest, config.padded)
    except Exception as error:  # the libraries raise nothing more exact
        raise CheckpointError(
            f"The tokenizer of {checkpoint.name} cannot be read ({error}). Download or copy "
            f"{', '.join(files)} and {SETTINGS} again."
        ) from error


def read_whole(
    tokenizers: Any,
    files: Mapping[str, Path],
    kind: str,
    settings: Json,
    longest: int,
    padded: bool,
) -> FileTokenizer:
    """Return the tokenizer of tokenizer.json, or of the two files before it, as its class is."""
    tokenizer = (
        tokenizers.Tokenizer.from_file(str(files[WHOLE]))
        if WHOLE in files
        else clip_from_parts(tokenizers, files[VOCABULARY], files[MERGES], settings)
    )
    RULES.get(kind, as_filed)(tokenizers, tokenizer, settings)
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest, direction=settings.get("truncation_side", "right"))
    pad = tokenizer.token_to_id(word(settings, "pad_token", "<pad>")) if padded else None
    if padded and pad is None:
        raise ValueError("it has no token to fill up with")
    return FileTokenizer(
        tokenizer, Filling(longest, pad, side(settings, "left" if kind in LEFT else "right"))
    )


def read_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return tokenizer_config.json, with the names of special tokens of the older file below it."""
    found: dict[str, Any] = {}
    for name in (SPECIAL, SETTINGS):
        file = locate(checkpoint, name)
        found |= (read_json(file.parent, name) or {}) if file else {}
    return found


def locate(checkpoint: Checkpoint, name: str) -> Path | None:
    """Return where a file of the checkpoint lies, or None where it has none of that name."""
    if checkpoint.revision is None:
        return find_file(checkpoint.files[0].parent, name)
    with suppress(NotCachedError):  # offline: what the cache does not have, the model has not
        return fetch(checkpoint.name, name, checkpoint.revision)
    return None


def word(settings: Json, name: str, default: str) -> str:
    """Return a special token as it is written; files give it alone or with its properties."""
    found = settings.get(name) or default
    return entry(found, "content", str) if isinstance(found, Mapping) else str(found)


def import_or_explain(library: str, name: str) -> Any:
    """Return a library of the extra `text`.

    Raises: ImportError with the install line.
    """
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(
            f"The tokenizer of {name} needs the {library} library, which is not installed: "
            "pip install 'packvit[text]'"
        ) from error


def clip_from_parts(tokenizers: Any, vocabulary: Path, merges: Path, settings: Json) -> Any:
    """Return CLIP's tokenizer of the two files that came before tokenizer.json."""
    end = word(settings, "eos_token", "<|endoftext|>")
    model = tokenizers.models.BPE.from_file(
        str(vocabulary),
        str(merges),
        unk_token=word(settings, "unk_token", end),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = tokenizers.Tokenizer(model)
    properties = list((settings.get("added_tokens_decoder") or {}).values())
    named = [word(settings, "bos_token", "<|startoftext|>"), end]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(**each) for each in properties]
        or [tokenizers.AddedToken(name, special=True, normalized=False) for name in named]
    )
    return tokenizer


def as_filed(tokenizers: Any, tokenizer: Any, settings: Json) -> None:
    """Add a token before or after a text where the settings say so: they override the file."""
    asked = [settings.get(f"add_{end}_token") for end in ("bos", "eos")]
    if asked == [None, None] and tokenizer.post_processor is not None:
        return
    names = word(settings, "bos_token", "<bos>"), word(settings, "eos_token", "<eos>")
    first, last = (name if add else "" for name, add in zip(names, asked, strict=True))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last) if name],
    )


def as_clip(tokenizers: Any, tokenizer: Any, settings: Json) -> None:
    """Normalise and split as CLIPTokenizer; a text stands between two tokens."""
    normal, split = tokenizers.normalizers, tokenizers.pre_tokenizers
    space = normal.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.normalizer = normal.Sequence([normal.NFC(), space, normal.Lowercase()])
    words = split.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split.Sequence([words, split.ByteLevel(add_prefix_space=False)])
    ends = (("eos_token", "<|endoftext|>"), ("bos_token", "<|startoftext|>"))
    names = [word(settings, *end) for end in ends]
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        *((name, tokenizer.token_to_id(name)) for name in names), False, False
    )


def as_gemma(tokenizers: Any, tokenizer: Any, settings: Json) -> None:
    """Write spaces as sentencepiece does, as GemmaTokenizer."""
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", META)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    as_filed(tokenizers, tokenizer, settings)


def as_siglip2(tokenizers: Any, tokenizer: Any, settings: Json) -> None:
    """Lower the case, then as GemmaTokenizer."""
    as_gemma(tokenizers, tokenizer, settings)
    normal = tokenizers.normalizers
    tokenizer.normalizer = normal.Sequence([normal.Lowercase(), normal.Replace(" ", META)])


RULES: dict[str, Callable[[Any, Any, Json], None]] = {  # by transformers' class
    "CLIPTokenizer": as_clip,
    "GemmaTokenizer": as_gemma,
    "Siglip2Tokenizer": as_siglip2,
}
LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")  # the side they pad, unless settings say otherwise


def read_pieces(
    library: Any, file: Path, settings: Json, longest: int, padded: bool
) -> PieceTokenizer | LowerPieceTokenizer:
    """Return SigLIP's tokenizer of a sentencepiece model, or TIPSv2's, by the file's name."""
    model = library.SentencePieceProcessor(model_file=str(file))
    if file.name == TIPS_PIECES:
        numbers = range(model.get_piece_size())
        control = [n for n in numbers if model.is_control(n) or model.is_unknown(n)]
        special = {model.id_to_piece(number): number for number in control}
        return LowerPieceTokenizer(model, special, Filling(longest, None))
    end = word(settings, "eos_token", "</s>")
    unknown, pad = word(settings, "unk_token", "<unk>"), word(settings, "pad_token", "</s>")
    special = {token: model.piece_to_id(token) for token in (end, unknown, pad)}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        special[token["content"]] = int(number)
    filling = Filling(longest, special[pad] if padded else None, side(settings, "right"))
    lower = bool(settings.get("do_lower_case", True))
    return PieceTokenizer(model, special, end, unknown, lower, filling)


def side(settings: Json, default: Side) -> Side:
    """Return on which side texts are filled up."""
    found = settings.get("padding_side", default)
    check_choice("padding_side", found, ("left", "right"))
    return found
