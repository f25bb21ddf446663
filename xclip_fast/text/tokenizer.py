"""CLIP's byte-pair encoding, without a library beside it."""

from __future__ import annotations

import gzip
import heapq
import html
import importlib.util
import io
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.errors import InputError
from xclip_fast.text.labels import check_unicode

CONTEXT_LENGTH = 77
BYTE_VOCAB_SIZE = 514  # 256 bytes, 256 bytes that end a word, start of text, end of text
CLIP_VOCAB_SIZE = 49408  # the same and 48894 merges

_VOCABULARY_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt", "tokenizer.json")
_WANTED = f"CLIP's {_VOCABULARY_FILES[0]}"
_LARGEST_FILE = 64 << 20
_KNOWN_WORDS = 1 << 16
_A_CAT = [49406, 320, 1125, 539, 320, 2368, 49407]  # "a photo of a cat" in CLIP's vocabulary
_log = logging.getLogger("xclip_fast")


class Tokenizer:
    """CLIP's byte-pair encoding.

    Args:
        merges: pairs of symbols, the first to be merged first. None at all leaves a byte-level tokenizer.

    Attributes:
        vocab_size: 514 and one for each merge. The last two ids are the start and the end of text; no text makes them.

    Example:
        >>> from xclip_fast.text import Tokenizer
        >>> Tokenizer([("c", "a"), ("ca", "t</w>")]).vocab_size
        516
    """

    def __init__(self, merges: Sequence[tuple[str, str]] = ()) -> None:
        self.vocab_size = BYTE_VOCAB_SIZE + len(merges)
        self.start = self.vocab_size - 2
        self.end = self.vocab_size - 1
        self._bytes = {byte: place for place, byte in enumerate(_byte_order())}
        ids = {symbol: place for place, symbol in enumerate(_byte_symbols())}
        # an id grows with its place in the list, so that the smallest id is the first to be merged
        self._merges: dict[tuple[int, int], int] = {}
        for place, (first, second) in enumerate(merges, start=512):
            self._merges[ids[first], ids[second]] = place
            ids[first + second] = place
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
        """Token ids of texts.

        Args:
            texts: one text or many, of any length.
            context_length: the most tokens of one text. Longer texts are cut and keep their end of text.

        Returns:
            int64 (K, L), zero behind the end of text. L is the longest text of the batch: attention is causal and the
            feature is read at the end of text, so that columns behind it would change nothing.

        Raises:
            InputError: a text is not valid Unicode.
            ValueError: ``context_length`` is below 2, or a text is not a string.
        """
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2, found {context_length}")
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self._encode(text, context_length - 2), self.end] for text in texts]
        length = max(map(len, rows), default=2)
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)

    def _encode(self, text: str, limit: int) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, found {type(text).__name__}")
        check_unicode(text)
        ids: list[int] = []
        for word in _words(_clean(text)):
            if len(ids) >= limit:
                break
            ids += self._encode_word(word)
        return ids[:limit]

    def _encode_word(self, word: str) -> list[int]:
        ids = self._known.get(word)
        if ids is None:
            ids = self._merge([self._bytes[byte] for byte in word.encode()])
            if len(self._known) >= _KNOWN_WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge neighbours, the earliest merge of the list first, all its places from left to right."""
        ids[-1] += 256
        size = len(ids)
        after = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        alive = [True] * size

        def merged(place: int) -> int | None:
            if place < 0 or not alive[place] or after[place] >= size:
                return None
            return self._merges.get((ids[place], ids[after[place]]))

        queue = [(found, place) for place in range(size - 1) if (found := merged(place)) is not None]
        heapq.heapify(queue)
        while queue:
            # what a merge makes new has a larger id: equal ids are all queued before the first of them comes out
            best, place = heapq.heappop(queue)
            if merged(place) != best:
                continue
            gone = after[place]
            ids[place], alive[gone], after[place] = best, False, after[gone]
            if after[place] < size:
                before[after[place]] = place
            for changed in (before[place], place):
                if (found := merged(changed)) is not None:
                    heapq.heappush(queue, (found, changed))
        return [symbol for symbol, kept in zip(ids, alive, strict=True) if kept]


def get_tokenizer(config_or_vocab_size: XCLIPConfig | int, vocabulary: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        config_or_vocab_size: 49408 is CLIP's vocabulary, 514 the byte-level one, which needs no file.
        vocabulary: CLIP's merges: ``bpe_simple_vocab_16e6.txt.gz``, ``merges.txt``, ``tokenizer.json``, or a folder
            that holds one of them. By default the file that the package open_clip_torch carries.

    Raises:
        InputError: no tokenizer has this size, or its vocabulary is missing or broken, or it takes none.

    Example:
        >>> from xclip_fast.text import get_tokenizer
        >>> get_tokenizer(514)("hi").tolist()
        [[512, 71, 328, 513]]
    """
    size = config_or_vocab_size if isinstance(config_or_vocab_size, int) else config_or_vocab_size.vocab_size
    if size == BYTE_VOCAB_SIZE:
        if vocabulary is not None:
            raise InputError(
                f"vocabulary {vocabulary} was given, and the byte-level tokenizer reads none: leave it out"
            )
        return Tokenizer()
    if size != CLIP_VOCAB_SIZE:
        raise InputError(
            f"no tokenizer has {size} tokens: CLIP's has {CLIP_VOCAB_SIZE}, the byte-level one {BYTE_VOCAB_SIZE}"
        )
    path = _vocabulary_file(vocabulary)
    stamp = path.stat()
    return _clip_tokenizer(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=4)
def _clip_tokenizer(path: Path, mtime: int, size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer(_read_merges(path)[: CLIP_VOCAB_SIZE - BYTE_VOCAB_SIZE])
    except (OSError, EOFError, LookupError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as {_WANTED} ({type(error).__name__}): give that file") from None
    if tokenizer.vocab_size != CLIP_VOCAB_SIZE or tokenizer("a photo of a cat").tolist() != [_A_CAT]:
        raise InputError(f"{path} holds another vocabulary than CLIP's: give {_WANTED}")
    return tokenizer


def _vocabulary_file(vocabulary: str | Path | None) -> Path:
    if vocabulary is None:
        # the file alone: importing open_clip takes seconds and brings torchvision
        package = importlib.util.find_spec("open_clip")
        folder = Path(package.origin).parent if package and package.origin else None
        if folder is None or not (folder / _VOCABULARY_FILES[0]).is_file():
            raise InputError(
                "CLIP's vocabulary was not found: pip install open_clip_torch, or give the path of "
                f"{_WANTED} or of a CLIP checkpoint folder"
            )
        return folder / _VOCABULARY_FILES[0]
    path = Path(vocabulary)
    candidates = [path] if path.is_file() else [path / name for name in _VOCABULARY_FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = f"no {', '.join(_VOCABULARY_FILES)} in it" if path.is_dir() else "no such file"
    raise InputError(f"vocabulary {path}: {found}: give {_WANTED} or a folder that holds it")


def _read_merges(path: Path) -> list[tuple[str, str]]:
    with path.open("rb") as file:
        data = file.read(_LARGEST_FILE)
    if data[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(data)) as unpacked:
            data = unpacked.read(_LARGEST_FILE)
    if path.suffix == ".json":
        pairs = json.loads(data)["model"]["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    else:
        # the first line is a version; the file ends with a new line
        pairs = [line.split() for line in data.decode("utf-8").split("\n")[1:] if line]
    return [(first, second) for first, second in pairs]


@lru_cache(maxsize=1)
def _byte_order() -> tuple[int, ...]:
    """The bytes in the order of their ids: those with a printable character first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return (*printable, *(byte for byte in range(256) if byte not in printable))


def _byte_symbols() -> list[str]:
    """What vocabulary files write for ids 0 to 511."""
    symbols = [chr(byte) for byte in _byte_order()[:188]] + [chr(0x100 + place) for place in range(68)]
    return symbols + [symbol + "</w>" for symbol in symbols]


def _clean(text: str) -> str:
    """Repaired Unicode, no HTML entities, single spaces, lower case: what CLIP was trained on."""
    if not (text.isascii() and text.isprintable()) or "&" in text:
        text = html.unescape(html.unescape(_repair()(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _repair() -> Callable[[str], str]:
    if importlib.util.find_spec("ftfy") is None:
        _log.warning("unusual characters may get other tokens than in CLIP's training: pip install ftfy")
        return partial(unicodedata.normalize, "NFC")
    from ftfy import fix_text

    return fix_text


_CONTRACTION = re.compile("'(?:re|ve|ll|[stmd\u017f])")  # CLIP's pattern ignores case: the long s counts as s
_RUN = re.compile("L+|N|O+")


def _words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single digits, runs of anything else."""
    kinds = "".join(map(_kind, text))
    place = 0
    while place < len(text):
        match = _CONTRACTION.match(text, place) or _RUN.match(kinds, place)
        if match:
            yield text[place : match.end()]
        place = match.end() if match else place + 1


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    # CLIP's pattern ignores case, and so loses the iota subscript
    if character in " \u0345":
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"
