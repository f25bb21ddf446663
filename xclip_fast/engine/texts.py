"""The text tower of the engine, and the class sets it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from xclip_fast.engine.packing import Norm, PackedBlock, Packing, exact
from xclip_fast.recent import Recent
from xclip_fast.reference.transformer import split_heads
from xclip_fast.text.cache import encode_in_chunks, text_weights
from xclip_fast.text.folder import TextFolder, digest

MAX_KEPT_BYTES = 256 << 20


class EncodedTexts(NamedTuple):
    """A class set as ``Engine.encode_texts`` gives it. No other engine takes it, be it of the same model and precision.

    Attributes:
        features: (K, E), not normalised.
        query: (K, E), what the first prompt layer asks each video; empty where it is not kept.
        engine: the name of the engine that made it, which no other has in any process; a copy of the set keeps it.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.demo.models import load_trained
        >>> engine = xclip_fast.Engine(load_trained("xclip"))
        >>> texts = engine.encode_texts(["left", "right", "up"])
        >>> texts.features.shape
        torch.Size([3, 64])
    """

    features: Tensor
    query: Tensor
    engine: str


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
        self.embedding = packing.tensor(model.token_embedding.weight, packing.stored)
        self.positions = packing.tensor(model.positional_embedding)
        activation = model.config.activation
        self.blocks = [_TextBlock.pack(block, activation, packing) for block in model.transformer.resblocks]
        norm = model.ln_final
        self.norm = Norm(packing.tensor(norm.weight), packing.tensor(norm.bias), norm.eps)
        self.projection = packing.linear(exact(model.text_projection).t(), None)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Features (K, E) of checked token ids (K, L) on the CPU."""
        device = self.embedding.device
        if len(tokens) == 0:
            return self.projection(self.positions[:0])
        if "text_length" not in self.rewrites:
            return self.encode_text(tokens.to(device))
        return encode_in_chunks(self, tokens, tokens.argmax(dim=-1), device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features (K, E) of token ids (K, L) on the device."""
        length = tokens.shape[1]
        rows = (embedding(tokens, self.embedding).to(self.positions.dtype) + self.positions[:length]).flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, length)
        ends = tokens.argmax(dim=-1) + length * torch.arange(len(tokens), device=tokens.device)
        return self.projection(self.norm(rows[ends]))


class KeptTexts:
    """Class sets by their tokens: those used last in memory, and the features of all in a folder where one is given.

    It is safe to use from several threads.

    Args:
        encode: features (K, E) of token ids (K, L) on the CPU, the same for the same ids.
        prepare: makes a class set of features, wherever they are.
        folder: where features are kept for later runs.
        encoder: stands in the folder for all that ``encode`` depends on, see ``encoder_digest``.
        max_bytes: the most memory the class sets take.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], EncodedTexts],
        folder: TextFolder | None = None,
        encoder: bytes = b"",
        max_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self.encode, self.prepare, self.folder, self.encoder = encode, prepare, folder, encoder
        self._sets: Recent[bytes, EncodedTexts] = Recent(
            max_bytes, lambda texts: texts.features.nbytes + texts.query.nbytes
        )

    def get(self, tokens: Tensor) -> EncodedTexts:
        """The class set of token ids (K, L) on the CPU."""
        tokens = tokens.long().contiguous()
        key = digest([self.encoder, tokens])
        texts = self._sets.get(key)
        if texts is None:
            texts = self.prepare(self._features(key, tokens))
            self._sets.put(key, texts)
        return texts

    def _features(self, key: bytes, tokens: Tensor) -> Tensor:
        if self.folder is None:
            return self.encode(tokens)
        return self.folder.get(key, lambda: self.encode(tokens))


def encoder_digest(model: Any, packing: Packing) -> bytes:
    """SHA-256 of all that the features of a packed text tower depend on but the tokens."""
    config = model.config
    dtypes = str(packing.dtype) if packing.stored is None else f"{packing.dtype} of {packing.stored}"
    how = [config.text_heads, config.activation, packing.device.type, dtypes, sorted(packing.rewrites)]
    return digest(["engine text features 1", json.dumps(how), *text_weights(model)])
