"""Text features of class sets, kept between calls."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.plain import first_oddity
from xclip_fast.recent import Recent
from xclip_fast.text.folder import MAX_FOLDER_BYTES, TextFolder, digest

_CHUNK_TOKENS = 8192
_ROW_WORDS = 1024


class TextCache:
    """Text features of class sets, the least recently used out first. It is safe to use from several threads.

    A kept feature is returned only for the same model object, tokens, device, dtype, autocast state and *contents* of
    the text weights. The version counters of tensors would not do: a write through ``parameter.data`` leaves them be.
    So each call reads the weights once (not those of token embeddings out of use) and waits for the device: about what
    encoding a handful of labels costs. To pay nothing, call once and hold on to the features. One changed 32-bit
    word is always seen, and any other change escapes with a probability below 2 ** -31.

    Args:
        max_bytes: the most memory the kept features take, on whatever device they are.
        folder: keeps the features for later runs too, by SHA-256 of weights, tokens and settings: see ``TextFolder``.
            Models without an ``XCLIPConfig`` do without it, for their weights alone do not say what they compute.
        max_folder_bytes: the most the files in the folder take.

    Raises:
        InputError: there can be no such folder.

    Example:
        >>> from xclip_fast import XCLIPConfig, create_model
        >>> from xclip_fast.text import TextCache, get_tokenizer
        >>> config = XCLIPConfig(text_width=64, text_layers=1, vocab_size=514, vision_layers=1)
        >>> cache = TextCache(folder="texts")
        >>> cache.encode(create_model(config, seed=0), get_tokenizer(config)(["cooking", "sleeping"])).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        max_bytes: int = 256 << 20,
        folder: str | Path | None = None,
        max_folder_bytes: int = MAX_FOLDER_BYTES,
    ) -> None:
        self.max_bytes = max_bytes
        self.folder = None if folder is None else TextFolder(folder, max_folder_bytes)
        self._entries: Recent[tuple[Any, ...], Tensor] = Recent(max_bytes, lambda features: features.nbytes)
        self._models: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._serial = itertools.count()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copied or pickled model takes an empty cache along
        folder = self.folder
        return TextCache, (self.max_bytes,) if folder is None else (self.max_bytes, folder.path, folder.max_bytes)

    def encode(self, model: Any, tokens: Tensor) -> Tensor:
        """The text features of ``model.encode_text(tokens)``, from the cache where they are already known.

        Args:
            model: anything with ``encode_text`` and the text tower under its official names (token_embedding,
                positional_embedding, transformer, ln_final, text_projection). Its mode is left as it is.
            tokens: integers (K, L) on any device; columns behind the longest end of text cost nothing.

        Returns:
            (K, E) on the device of the model, without gradients; writing into it does not reach the cache.

        Raises:
            ValueError: the tokens have another shape or dtype, or an id is not in the vocabulary.
        """
        device = model.text_projection.device
        tokens = tokens.cpu()
        with torch.no_grad():
            if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64) or 0 in tokens.shape:
                # nothing to keep: the model takes it or says what is wrong
                return model.encode_text(tokens.to(device))
            ends = tokens.argmax(dim=-1)
            tokens = tokens[:, : int(ends.max()) + 1].long().contiguous()
            if not _depends_on_weights_alone(model):
                return encode_in_chunks(model, tokens, ends, device)
            _check_ids(tokens, len(model.token_embedding.weight))
            key = (
                self._number(model),
                device,
                torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
                digest([tokens]),
                _fingerprint(text_weights(model, tokens)),
            )
            features = self._entries.get(key)
            if features is None:
                features = self._encode(model, tokens, ends, device)
                self._entries.put(key, features)
        return features.clone()

    def _encode(self, model: Any, tokens: Tensor, ends: Tensor, device: torch.device) -> Tensor:
        key = None if self.folder is None else _stable_key(model, tokens, device)
        if self.folder is None or key is None:
            return encode_in_chunks(model, tokens, ends, device)
        return self.folder.get(key, lambda: encode_in_chunks(model, tokens, ends, device)).to(device)

    def _number(self, model: Any) -> int:
        with self._lock:
            return self._models.setdefault(model, next(self._serial))


def _depends_on_weights_alone(model: Any) -> bool:
    """Whether nothing that no key could hold is on the text tower: hooks, adapters that come and go, packed weights."""
    packages = "xclip_fast", type(model).__module__.partition(".")[0]

    def is_known(_: str, cls: type) -> bool:
        return cls.__module__.startswith("torch.nn.modules.") or cls.__module__.partition(".")[0] in packages

    parts = model.token_embedding, model.transformer, model.ln_final
    return all(is_known("", type(part)) and first_oddity(part, is_known) is None for part in parts)


def _check_ids(tokens: Tensor, vocab_size: int) -> None:
    low, high = map(int, tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must lie in 0..{vocab_size - 1}, found {low}..{high}: "
            "use the tokenizer this model was trained with"
        )


def encode_in_chunks(model: Any, tokens: Tensor, ends: Tensor, device: torch.device) -> Tensor:
    """Text features (K, E) of checked tokens, whose ends are at ``ends`` (K,), texts of like length together.

    Ten thousand texts need little memory, and no padding is computed.
    """
    features = None
    for chunk in ends.argsort(stable=True).split(max(1, _CHUNK_TOKENS // tokens.shape[1])):
        found = model.encode_text(tokens[chunk, : int(ends[chunk[-1]]) + 1].to(device))
        if features is None:
            features = found.new_empty(len(tokens), *found.shape[1:])
        # results kept in a list would part the free memory that the next chunk could use
        features[chunk.to(device)] = found
    assert features is not None
    return features


def text_weights(model: Any, tokens: Tensor | None = None) -> list[Tensor]:
    """All that the text features of the tokens depend on; by default those of any tokens."""
    embedding, positions = model.token_embedding.weight, model.positional_embedding
    if tokens is not None:
        embedding, positions = embedding[tokens.unique().to(embedding.device)], positions[: tokens.shape[1]]
    weights = [embedding, positions]
    for module in (model.transformer, model.ln_final):
        weights += [*module.parameters(), *module.buffers()]
    return [*weights, model.text_projection]


def _stable_key(model: Any, tokens: Tensor, device: torch.device) -> bytes | None:
    """What names the features of tokens in every process, if the model says how it computes them."""
    config = getattr(model, "config", None)
    if not isinstance(config, XCLIPConfig):
        return None
    autocast = torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type))
    how = [
        type(model).__module__,
        type(model).__qualname__,
        config.text_heads,
        config.activation,
        device.type,
        autocast,
    ]
    return digest(["text features 1", json.dumps(how), *text_weights(model, tokens), tokens])


def _fingerprint(weights: list[Tensor]) -> bytes:
    """A hash of shapes, dtypes and contents. The device reads the weights; 0.2 % of their size comes to the host."""
    vectors = torch.cat([_bytes(weight) for weight in weights if weight.ndim < 2])
    matrices = [_bytes(weight) for weight in weights if weight.ndim >= 2]
    rows = [_rows(data) for data in (vectors, *matrices)]
    # one buffer for all products: new pages for each would take longer than the sums
    products = torch.empty(max(map(len, rows)), _ROW_WORDS, dtype=torch.int64, device=vectors.device)
    sums = torch.cat([torch.mul(row, _multipliers(row.device), out=products[: len(row)]).sum(dim=1) for row in rows])
    kinds = repr([(weight.dtype, weight.shape) for weight in weights])
    return hashlib.sha256(kinds.encode() + sums.cpu().numpy().tobytes()).digest()


def _bytes(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().flatten().view(torch.uint8)


def _rows(data: Tensor) -> Tensor:
    gap = -len(data) % (4 * _ROW_WORDS)
    if gap or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(gap)])
    return data.view(torch.int32).view(-1, _ROW_WORDS)


@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    """Random odd factors: sums of words times these, modulo 2 ** 64, are a universal hash of a row."""
    generator = torch.Generator()
    generator.seed()
    return torch.randint(-(2**63), 2**63 - 1, (_ROW_WORDS,), generator=generator).bitwise_or(1).to(device)
