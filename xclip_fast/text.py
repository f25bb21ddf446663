"""Class texts: label lists, CLIP's byte-pair tokenizer, and a cache of text features."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import html
import importlib.util
import itertools
import json
import logging
import re
import threading
import unicodedata
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.errors import InputError

CONTEXT_LENGTH = 77
BYTE_VOCAB_SIZE = 514  # 256 bytes, 256 bytes that end a word, start of text, end of text
CLIP_VOCAB_SIZE = 49408  # the same and 48894 merges

_VOCABULARY_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt", "tokenizer.json")
_CHUNK_TOKENS = 8192
_log = logging.getLogger("xclip_fast")


def clean_labels(labels: Iterable[str]) -> list[str]:
    """Labels without surrounding white space, in the order given.

    Raises:
        InputError: there is no label, a label is blank or not valid Unicode, or two differ in case or spacing alone,
            which the tokenizer cannot tell apart.
        ValueError: ``labels`` is a string or holds something other than strings.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of strings, found the string {_short(labels)}")
    cleaned: list[str] = []
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not isinstance(label, str):
            raise ValueError(f"labels must be strings, found {type(label).__name__} at place {number}")
        _check_unicode(label)
        text = label.strip()
        if not text:
            raise InputError(f"label {number} is blank: give each class a name")
        first = seen.setdefault(" ".join(text.split()).lower(), number)
        if first != number:
            raise InputError(
                f"labels {first} and {number} are the same, {_short(cleaned[first - 1])} and {_short(text)}: "
                "give each class one name"
            )
        cleaned.append(text)
    if not cleaned:
        raise InputError("no labels were given: name at least one class")
    return cleaned


def apply_template(labels: Iterable[str], template: str) -> list[str]:
    """Each label put in the place of ``{}`` in a template such as ``"a video of {}"``; other braces stay as they are.

    Raises:
        InputError: the template does not hold exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise InputError(f"template {_short(template)} has {template.count('{}')} places '{{}}' for a label: use one")
    before, after = template.split("{}")
    return [before + label + after for label in labels]


class Tokenizer:
    """CLIP's byte-pair encoding.

    Args:
        merges: pairs of symbols, the first to be merged first. None at all leaves a byte-level tokenizer.

    Attributes:
        vocab_size: 514 and one for each merge. The last two ids are the start and the end of text; no text makes them.
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
        tokens = torch.zeros(len(rows), max(map(len, rows), default=2), dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def _encode(self, text: str, limit: int) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, found {type(text).__name__}")
        _check_unicode(text)
        ids: list[int] = []
        for word in _words(_clean(text)):
            if len(ids) >= limit:
                break
            ids += self._encode_word(word)
        return ids[:limit]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._known:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[word] = self._merge([self._bytes[byte] for byte in word.encode()])
        return self._known[word]

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
            best = queue[0][0]
            changed = []
            while queue and queue[0][0] == best:
                place = heapq.heappop(queue)[1]
                if merged(place) != best:
                    continue
                gone = after[place]
                ids[place], alive[gone], after[place] = best, False, after[gone]
                if after[place] < size:
                    before[after[place]] = place
                changed.append(place)
            for place in {*changed, *(before[place] for place in changed)}:
                if (found := merged(place)) is not None:
                    heapq.heappush(queue, (found, place))
        return [symbol for symbol, kept in zip(ids, alive, strict=True) if kept]


def get_tokenizer(config_or_vocab_size: XCLIPConfig | int, vocabulary: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        config_or_vocab_size: 49408 is CLIP's vocabulary, 514 the byte-level one, which needs no file.
        vocabulary: CLIP's merges: ``bpe_simple_vocab_16e6.txt.gz``, ``merges.txt``, ``tokenizer.json``, or a folder
            that holds one of them. By default the file that the package open_clip_torch carries.

    Raises:
        InputError: no tokenizer has this size, or its vocabulary is missing or broken.
    """
    size = config_or_vocab_size if isinstance(config_or_vocab_size, int) else config_or_vocab_size.vocab_size
    if size == BYTE_VOCAB_SIZE:
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
    merges = CLIP_VOCAB_SIZE - BYTE_VOCAB_SIZE
    try:
        tokenizer = Tokenizer(_read_merges(path)[:merges])
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a CLIP vocabulary ({error}): give bpe_simple_vocab_16e6.txt.gz") from None
    if tokenizer.vocab_size != CLIP_VOCAB_SIZE:
        found = tokenizer.vocab_size - BYTE_VOCAB_SIZE
        raise InputError(f"{path} holds {found} merges where CLIP has {merges}: give bpe_simple_vocab_16e6.txt.gz")
    return tokenizer


def _vocabulary_file(vocabulary: str | Path | None) -> Path:
    if vocabulary is None:
        # the file alone: importing open_clip takes seconds and brings torchvision
        package = importlib.util.find_spec("open_clip")
        folder = Path(package.origin).parent if package and package.origin else None
        if folder is None or not (folder / _VOCABULARY_FILES[0]).is_file():
            raise InputError(
                "CLIP's vocabulary was not found: pip install open_clip_torch, or give the path of "
                f"{_VOCABULARY_FILES[0]} or of a CLIP checkpoint folder"
            )
        return folder / _VOCABULARY_FILES[0]
    path = Path(vocabulary)
    candidates = [path] if path.is_file() else [path / name for name in _VOCABULARY_FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = f"no {', '.join(_VOCABULARY_FILES)} in it" if path.is_dir() else "no such file"
    raise InputError(f"vocabulary {path}: {found}: give CLIP's {_VOCABULARY_FILES[0]}")


def _read_merges(path: Path) -> list[tuple[str, str]]:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
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
        text = html.unescape(html.unescape(_repair(text)))
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    if importlib.util.find_spec("ftfy") is None:
        if not text.isascii():
            _warn_without_ftfy()
        return unicodedata.normalize("NFC", text)
    import ftfy

    return ftfy.fix_text(text)


@lru_cache(maxsize=1)
def _warn_without_ftfy() -> None:
    _log.warning("texts beyond ASCII may get other tokens than in CLIP's training: pip install ftfy")


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
    if character == " ":
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"text {_short(text)} is not valid Unicode: write it in UTF-8") from None


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


class TextCache:
    """Text features of class sets, least recently used out first.

    Args:
        max_bytes: the most memory the kept features take, on whatever device they are.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._models: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._serial = itertools.count()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copied or pickled model takes an empty cache along
        return TextCache, (self.max_bytes,)

    def encode(self, model: Any, tokens: Tensor) -> Tensor:
        """Text features (K, E) without gradients: those of ``model.encode_text(tokens)``, kept for the next call."""
        device = model.text_projection.device
        tokens = tokens.detach().cpu()
        ends = tokens.argmax(dim=-1)
        tokens = tokens[:, : int(ends.max()) + 1 if len(ends) else None].contiguous()
        with torch.inference_mode(False), torch.no_grad():
            key = (
                self._number(model),
                str(device),
                torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
                tuple(tokens.shape),
                tokens.numpy().tobytes(),
                _fingerprint(model, tokens),
            )
            with self._lock:
                features = self._entries.pop(key, None)
            if features is None:
                features = _encode_in_chunks(model, tokens, ends, device)
            self._keep(key, features)
        return features.clone()

    def _number(self, model: Any) -> int:
        with self._lock:
            if model not in self._models:
                self._models[model] = next(self._serial)
            return self._models[model]

    def _keep(self, key: tuple[Any, ...], features: Tensor) -> None:
        with self._lock:
            self._entries[key] = features
            kept = sum(entry.nbytes for entry in self._entries.values())
            while kept > self.max_bytes:
                kept -= self._entries.popitem(last=False)[1].nbytes


def _encode_in_chunks(model: Any, tokens: Tensor, ends: Tensor, device: torch.device) -> Tensor:
    """Texts of like length together, so that ten thousand of them need little time and memory."""
    order = ends.argsort(stable=True)
    rows = max(1, _CHUNK_TOKENS // max(1, tokens.shape[1]))
    parts = [
        model.encode_text(tokens[chunk, : int(ends[chunk].max()) + 1 if len(chunk) else None].to(device))
        for chunk in order.split(rows)
    ]
    return torch.cat(parts)[order.argsort().to(device)]


def _fingerprint(model: Any, tokens: Tensor) -> bytes:
    """A hash of all that the features depend on: the text tower and the embeddings of the tokens in use."""
    used = tokens.unique().to(model.token_embedding.weight.device)
    tensors = [model.token_embedding.weight[used], model.positional_embedding[: tokens.shape[1]], model.text_projection]
    for module in (model.transformer, model.ln_final):
        tensors += [*module.parameters(), *module.buffers()]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()
