"""The text tower of the engine, and the class sets it keeps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from xclip_fast.engine.block import PackedBlock
from xclip_fast.engine.cpu import Norm
from xclip_fast.engine.packing import Packing, exact
from xclip_fast.reference.transformer import split_heads
from xclip_fast.text.cache import encode_in_chunks

MAX_KEPT_BYTES = 256 << 20


class EncodedTexts(NamedTuple):
    """A class set as ``Engine.encode_texts`` gives it, for that engine alone.

    features: (K, E), not normalised.
    query: (K, E), what the first prompt layer asks each video; empty where it is not kept.
    """

    features: Tensor
    query: Tensor


class _TextBlock(PackedBlock):
    def __call__(self, rows: Tensor, length: int) -> Tensor:
        packed = self.qkv(self.norm_1(rows)).view(-1, length, 3 * rows.shape[1])
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        rows = self.out.add(rows, mixed.transpose(1, 2).reshape(rows.shape))
        return self.projection.add(rows, self.fc.activated(self.norm_2(rows)))


class TextTower:
    """CLIP's text tower from a model: token ids (K, L) to features (K, E). The model is read, never kept.

    It has what ``encode_in_chunks`` asks of a model.
    """

    def __init__(self, model: Any, packing: Packing) -> None:
        self.rewrites = packing.rewrites
        self.embedding = packing.tensor(model.token_embedding.weight)
        self.positions = packing.tensor(model.positional_embedding)
        activation = model.config.activation
        self.blocks = [_TextBlock.pack(block, activation, packing) for block in model.transformer.resblocks]
        norm = model.ln_final
        self.norm = Norm(packing.tensor(norm.weight), packing.tensor(norm.bias), norm.eps)
        self.projection = packing.product(exact(model.text_projection).t(), None)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Features (K, E) of checked token ids (K, L) on the CPU."""
        device = self.embedding.device
        if len(tokens) == 0:
            return self.projection(self.embedding[:0])
        if "text_length" not in self.rewrites:
            return self.encode_text(tokens.to(device))
        return encode_in_chunks(self, tokens, tokens.argmax(dim=-1), device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features (K, E) of token ids (K, L) on the device."""
        length = tokens.shape[1]
        rows = (embedding(tokens, self.embedding) + self.positions[:length]).flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, length)
        ends = tokens.argmax(dim=-1) + length * torch.arange(len(tokens), device=tokens.device)
        return self.projection(self.norm(rows[ends]))


class KeptTexts:
    """Class sets by their tokens, the least recently used out first; safe to use from several threads.

    The weights of an engine never change, so tokens alone tell what the features are.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._sets: OrderedDict[tuple[Any, ...], EncodedTexts] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tokens: Tensor, encode: Callable[[Tensor], EncodedTexts]) -> EncodedTexts:
        """What ``encode`` gives for token ids (K, L) on the CPU, computed once."""
        tokens = tokens.long().contiguous()
        key = tokens.shape, tokens.numpy().tobytes()
        with self._lock:
            texts = self._sets.pop(key, None)
        texts = encode(tokens) if texts is None else texts
        with self._lock:
            self._sets[key] = texts
            kept = sum(part.nbytes for entry in self._sets.values() for part in entry)
            while kept > self.max_bytes:
                kept -= sum(part.nbytes for part in self._sets.popitem(last=False)[1])
        return texts
