"""Tokenizers that come as a SentencePiece model alone: read, and proven against SentencePiece itself.

transformers makes a tokenizer of the model file by rules of each class. Some classes leave out the file's own rules:
its normalisation, the space in front of a text, white space at the end. So what it makes is compared with SentencePiece
over texts of many scripts, and over random texts of the file's own pieces. Where they differ, the file's rules are
written into the tokenizer, and it is compared again.
"""

from __future__ import annotations

import logging
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeprompt.base.source import check_contents, one_line, read_json
from edgeprompt.errors import MissingDependencyError, SourceError

_LOG = logging.getLogger("edgeprompt")

FILES = ("spm.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model")
"""Names of a SentencePiece model, in the order in which they are looked for."""
_OFFSETS = {
    "XLMRobertaTokenizer": 1, "MBartTokenizer": 1, "MBart50Tokenizer": 1, "CamembertTokenizer": 4,
    "PegasusTokenizer": 103,
}  # fmt: skip
"""Class -> how far its ids lie behind those of the file; 0 where it is not named."""
_CLEANED = ("AlbertTokenizer", "XLNetTokenizer")
"""Classes that clean a text before SentencePiece reads it, and part a number from the comma behind it."""
_BEGINNING = ("LlamaTokenizer", "GemmaTokenizer")
"""Classes that put the beginning of a sequence in front unless tokenizer_config.json says that they do not."""
_LLAMA = ("llama", "mistral", "phi3")
"""Model types whose tokenizer is Llama's where tokenizer_config.json names none."""
_SPACE = "\u2581"
_NORMAL, _USER_DEFINED = 1, 4
"""Types of a piece, as SentencePiece numbers them."""
_TEXTS = (
    "", "a", "The film starts slowly, but the last half hour is worth the ticket.", "It's a dog's life, isn't it?",
    "In 1929, 3,000 of 12,345.67 people (15 %) paid $2.50 each.", "THE Quick BROWN fox", "word  two   three",
    "a\nb", "a\n\nb", "tab\there", "x\r\ny", "end.", "e-mail: me@example.org, https://example.org/a_b?c=1&d=2",
    "{\"key\": [1, 2.5, null]}", "def f(x):\n    return x ** 2", "Émile café naïve — …",
    "Straße İstanbul Łódź", "Ａｂｃ １２３", "ﬁne ² ①", "e\u0301a\u0308",
    "今天很好", "東京に行きます。", "안녕하세요 세계", "مرحبا بك", "हिन्दी में", "สวัสดี",
    "Привет, мир!", "Γεια σου", "ok 🙂🙃!", "𝔘nicode", "“quotes” ‘x’ ``y''", "a\u00a0b",
    "a\u200bb", "a .", "...", "- -- ---", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\x07 bell",
)  # fmt: skip
_SPACED = (" ", " a", "a ", "  a  b  ", "\n", " \n a\n")
"""Texts whose white space at the ends tells tokenizers apart."""
_MARKS = (
    "e\u0301\u0302", "a\u0302\u0301", "a\u0323\u0302", "o\u0328\u0304", "x\u0301\u0302", "\u00e9\u0302",
    "E\u0301", "\u03b1\u0313\u0300\u0345", "\u304b\u3099", "\u1112\u1161\u11ab",
)  # fmt: skip
"""Letters and marks of their own, as some systems write é: SentencePiece joins what Unicode has a letter for."""
_BEHIND_OTHERS = ("a\u0301\u0323", "a\u0327\u0301", "A\uff21\u0301", "a\u00a0\u0301a")
"""A mark in another order than Unicode's, or behind a sign that is normalised: `tokenizers` reads some otherwise."""
_RANDOM_TEXTS = 200
_PIECES = 12
"""Of a random text."""


def find_sentencepiece(folder: Path) -> Path | None:
    """The SentencePiece model that is a folder's only tokenizer, None where it has a `tokenizer.json` or none."""
    if (folder / "tokenizer.json").exists():
        return None
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def read_sentencepiece(given: str, folder: Path, file: Path) -> Any:
    """A fast transformers tokenizer with SentencePiece's own ids.

    Args:
        given: What the user calls the base.
        folder: The base's folder.
        file: The SentencePiece model in it.

    Raises:
        MissingDependencyError: sentencepiece or protobuf is not installed.
        SourceError: the file is damaged or of another kind, or the ids differ; the message names a text.
    """
    check_contents(file)
    proto, processor = _open(given, file)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    tokenizer = _load(given, folder, file, settings)
    backend = tokenizer.backend_tokenizer
    kind = type(tokenizer).__name__
    ids = _id_map(given, file, proto, backend, kind)
    wanted = _reference(processor, kind, tokenizer)
    texts = [text for text in (*_TEXTS, *_MARKS, *_random_texts(proto)) if not _has_added_token(text, backend)]
    first_only = kind == "LlamaTokenizer" and settings.get("legacy") is False

    def differs(texts: Sequence[str]) -> str | None:
        return next((text for text in texts if not _same(text, backend, wanted, ids, processor)), None)

    if kind in _BEGINNING and settings.get("add_bos_token", True):
        tokenizer.add_bos_token = True  # the slow tokenizers' default; transformers 5 takes a missing one as False
    found = differs((*texts, *_SPACED))
    for composed in (True, False):
        if found is not None:
            _apply_rules(proto, backend, kind, tokenizer, first_only=first_only, composed=composed)
            found = differs((*texts, *_SPACED))
    if found is not None:
        raise SourceError(
            f"the tokenizer of {given!r} is a SentencePiece model ({file.name}), and what transformers makes of it "
            f"({kind}) gives the text {found!r} other ids than SentencePiece; put the model's tokenizer.json beside it"
        )
    if (found := differs(_BEHIND_OTHERS)) is not None:
        _LOG.warning(
            "note: the tokenizer of %r, made of %s, gives texts like %s other ids than SentencePiece: combining marks "
            "in another order than Unicode's, or behind a sign that is normalised away",
            given, file.name, ascii(found),
        )  # fmt: skip
    return tokenizer


def _open(given: str, file: Path) -> tuple[Any, Any]:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise missing(given, file) from error
    data = file.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf's DecodeError, or SentencePiece's RuntimeError
        raise SourceError(
            f"{str(file)!r} is no SentencePiece model (it is damaged, or of another kind, as tiktoken's); put the "
            "model's tokenizer.json beside it"
        ) from error
    if not proto.pieces:
        raise SourceError(f"{str(file)!r} is a SentencePiece model without pieces; download it again")
    return proto, processor


def missing(given: str, file: Path) -> MissingDependencyError:
    """The error for a library that is not installed."""
    return MissingDependencyError(
        f"the tokenizer of {given!r} is a SentencePiece model ({file.name}) without a tokenizer.json; to make "
        "one of it: pip install sentencepiece protobuf"
    )


def _load(given: str, folder: Path, file: Path, settings: dict[str, Any]) -> Any:
    """What transformers makes of the file: by the class that the config names, else by the model type."""
    import transformers

    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if not named:
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        named = "LlamaTokenizer" if config.get("model_type") in _LLAMA else ""
    if named == "MT5Tokenizer":  # a name of old: T5's rules
        named = "T5Tokenizer"
    chosen: Any = getattr(transformers, named, None) if named else None
    if not (isinstance(chosen, type) and issubclass(chosen, transformers.PreTrainedTokenizerFast)):
        chosen = transformers.AutoTokenizer
    try:
        if chosen is transformers.AutoTokenizer:
            found = chosen.from_pretrained(folder, trust_remote_code=False)
        else:
            names = getattr(chosen, "vocab_files_names", {})
            found = chosen.from_pretrained(folder, **({} if file.name in names.values() else {"vocab_file": str(file)}))
    except Exception as error:  # a foreign file: transformers raises nearly anything
        raise SourceError(
            f"transformers makes no tokenizer of the SentencePiece model {str(file)!r} of {given!r} "
            f"({one_line(error)[:120]}); put the model's tokenizer.json beside it"
        ) from error
    if getattr(found, "backend_tokenizer", None) is None:
        raise SourceError(
            f"the tokenizer of {given!r} is a SentencePiece model ({file.name}), and transformers makes no fast "
            f"tokenizer of {type(found).__name__}; put the model's tokenizer.json beside it"
        )
    return found


def _id_map(given: str, file: Path, proto: Any, backend: Any, kind: str) -> list[int]:
    """SentencePiece's id -> the tokenizer's; those of ordinary pieces lie one known distance apart."""
    unknown = backend.token_to_id(proto.trainer_spec.unk_piece or "<unk>")
    offset, found = _OFFSETS.get(kind, 0), []
    for index, piece in enumerate(proto.pieces):
        ours = backend.token_to_id(piece.piece)
        if piece.type == _NORMAL and ours != index + offset:
            raise SourceError(
                f"the tokenizer of {given!r} is a SentencePiece model ({file.name}), and what transformers makes of it "
                f"({kind}) gives the piece {piece.piece!r} the id {ours}, not {index + offset}; put the model's "
                "tokenizer.json beside it"
            )
        found.append(unknown if ours is None or index == proto.trainer_spec.unk_id else ours)
    return found


def _reference(processor: Any, kind: str, tokenizer: Any) -> Callable[[str], list[int]]:
    """A text to SentencePiece's ids, as the class's slow tokenizer had them."""
    if kind in _CLEANED:
        keep, lower = tokenizer.keep_accents, tokenizer.do_lower_case
        return lambda text: _parted(processor, _cleaned(text, keep_accents=keep, lower=lower))
    if getattr(tokenizer, "do_lower_case", False):
        return lambda text: list(processor.encode(text.lower()))
    return lambda text: list(processor.encode(text))


def _cleaned(text: str, *, keep_accents: bool, lower: bool) -> str:
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    if not keep_accents:
        text = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return text.lower() if lower else text


def _parted(processor: Any, text: str) -> list[int]:
    """Pieces of a text; one that is a number and a comma becomes the number's pieces and the comma."""
    found: list[str] = []
    for piece in processor.encode(text, out_type=str):
        if not _number_and_comma(piece):
            found.append(piece)
            continue
        parts = processor.encode(piece[:-1].replace(_SPACE, ""), out_type=str)
        if not piece.startswith(_SPACE) and parts[0].startswith(_SPACE):
            parts = [*([parts[0][1:]] if len(parts[0]) > 1 else []), *parts[1:]]
        found += [*parts, ","]
    return [processor.piece_to_id(piece) for piece in found]


def _number_and_comma(piece: str) -> bool:
    return len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()


def _same(text: str, backend: Any, wanted: Callable[[str], list[int]], ids: Sequence[int], processor: Any) -> bool:
    pieces = wanted(text)
    expected = [ids[piece] for piece in pieces]
    if list(backend.encode(text, add_special_tokens=False).ids) != expected:
        return False
    if processor.unk_id() in pieces:
        return True
    return bool(backend.decode(expected, skip_special_tokens=False) == processor.decode(pieces))


def _random_texts(proto: Any) -> Iterator[str]:
    """Texts of the file's own pieces, and its own symbols between letters."""
    chosen = random.Random(0)
    pieces = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == _NORMAL]
    pieces = [piece for piece in pieces if not unicodedata.combining(piece[0])]  # see _BEHIND_OTHERS
    for _ in range(_RANDOM_TEXTS if pieces else 0):
        text = "".join(chosen.choices(pieces, k=_PIECES)).strip()
        yield from dict.fromkeys((text, unicodedata.normalize("NFD", text)))
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    for symbol in chosen.sample(symbols, min(len(symbols), _PIECES)):
        yield f"a{symbol}b"


def _has_added_token(text: str, backend: Any) -> bool:
    """Whether a tokenizer reads a token of its own in a text, which SentencePiece reads as letters."""
    return any(token.special and token.content in text for token in backend.get_added_tokens_decoder().values())


def _apply_rules(proto: Any, backend: Any, kind: str, tokenizer: Any, *, first_only: bool, composed: bool) -> None:
    """Write the file's own rules into a tokenizer: normalisation, white space, the space in front, its symbols.

    Args:
        proto: The SentencePiece model.
        backend: The tokenizer; it is changed.
        kind: Its class.
        tokenizer: transformers' tokenizer around it.
        first_only: Whether the space comes in front of the text alone, not behind special tokens too.
        composed: Whether letters and their marks are joined (NFC) before the file's table is applied. `tokenizers`
            looks up a letter with all its marks, takes the shortest entry and drops the rest: e\\u0301\\u0302 would be
            é alone.
    """
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

    rules = proto.normalizer_spec
    steps: list[Any] = []
    if kind in _CLEANED:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not tokenizer.keep_accents:
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        if tokenizer.do_lower_case:
            steps.append(normalizers.Lowercase())
        _part_numbers(proto, backend)
    elif getattr(tokenizer, "do_lower_case", False):
        steps.append(normalizers.Lowercase())
    if rules.precompiled_charsmap:
        if composed:
            steps.append(normalizers.NFC())
        table = normalizers.Precompiled(rules.precompiled_charsmap)
        # It takes "\r\n" for one sign too, and drops the line feed.
        lines = normalizers.Replace("\r\n", table.normalize_str("\r") + table.normalize_str("\n"))
        steps += [lines, table]
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.pre_tokenizer = None
    if rules.add_dummy_prefix and first_only:
        # Metaspace adds nothing in front of what it would add: so a blank, which the text has none of by now.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
            ]
        )
    elif rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    backend.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type == _USER_DEFINED]
    )


def _part_numbers(proto: Any, backend: Any) -> None:
    """Make pieces of a number and a comma so unlikely that they are never chosen."""
    import json

    from tokenizers import models

    state = json.loads(backend.to_str())["model"]
    vocab = [(piece, score - 100 * _number_and_comma(piece)) for piece, score in state["vocab"]]
    backend.model = models.Unigram(vocab, state["unk_id"], state.get("byte_fallback", False))
