"""What follows the vision tower: MIT, the mean of the patches, the video-specific prompts, the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xclip_fast.classes import class_chunks
from xclip_fast.engine.linears import Linear
from xclip_fast.engine.packing import Norm, PackedBlock, Packing, exact
from xclip_fast.engine.texts import EncodedTexts
from xclip_fast.ops import clip_logits, layer_norm, mean_norm_over_frames, prompt_attention, temporal_block
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.reference.positions import temporal_positions


@dataclass
class _MissingBiasNorm(Norm):
    """The fused layer norm; ``constant`` (D,) is the sum of biases not yet added to the rows, or None."""

    constant: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, constant=self.constant, eps=self.eps)[0]  # type: ignore[arg-type]


@dataclass
class _PromptLayer:
    norm_1: Norm
    query: Linear
    out: Linear
    norm_3: Norm
    fc: Linear
    projection: Linear


class _LastBlock(PackedBlock):
    """The last block of MIT and the mean over frames, which is taken before the last GEMM."""

    def __call__(self, x: Tensor, features: Tensor) -> Tensor:
        """What enters the block and the frame features, both (B, T, E), to video features (B, E)."""
        rows = x.flatten(0, 1)
        packed = self.qkv(self.norm_1(rows)).view(*x.shape[:2], 3, self.heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows.shape)
        # ``add`` may modify its stream in place
        rows = self.out.add(rows.clone(), mixed)
        hidden = self.fc.activated(self.norm_2(rows))
        mean = (features + rows.view(x.shape)).mean(dim=1)
        return self.projection.add(mean, hidden.view(*x.shape[:2], -1).mean(dim=1))


class Heads:
    """MIT, prompts and logits of a model. The model is read, never kept."""

    def __init__(self, model: Any, packing: Packing) -> None:
        self.packing, self.rewrites = packing, packing.rewrites
        self.name = uuid4().hex  # of the class sets: another engine's have its dtypes and shapes, and other numbers
        self.mit_positions = exact(model.mit.positional_embedding)
        self.mit_lengths: dict[int, Tensor] = {}
        self.mit_blocks = [_temporal_arguments(block, packing) for block in model.mit.resblocks]
        last = model.mit.resblocks[-1]
        self.last_block = _LastBlock.pack(last, "quick_gelu", packing) if "mit_mean" in packing.rewrites else None
        norm = model.prompts_visual_ln
        self.patch_norm = Norm(packing.tensor(norm.weight), packing.tensor(norm.bias), norm.eps)
        self.patch_projection = packing.linear(exact(model.prompts_visual_proj).t(), None)
        if packing.device.type == "cpu":
            # half precision in the prompts is most of what logits err, and on the CPU it saves little
            packing = replace(packing, dtype=exact_dtype(packing.dtype), stored=None)
        missing_bias: Tensor | None = None
        if "stream" in packing.rewrites:
            missing_bias = torch.zeros(model.config.embed_dim, dtype=torch.float64)
            # the fused norms read their vectors anyway
            packing = replace(packing, rewrites=packing.rewrites - {"norms"})
        self.prompt_dtype = packing.dtype
        prompts = model.prompts_generator
        attentions = [layer.cross_attn for layer in prompts.decoder]
        self.heads = attentions[0].heads
        # one GEMM makes the keys and values of all layers
        weights = [exact(part.weight) for attention in attentions for part in (attention.k_proj, attention.v_proj)]
        self.key_value = packing.linear(*_after_norm(prompts.norm, torch.cat(weights), packing))
        self.norm = _norm(prompts.norm, packing, None)
        self.layers = []
        for layer in prompts.decoder:
            packed, missing_bias = _prompt_layer(layer, packing, missing_bias)
            self.layers.append(packed)
        self.missing_bias = None if missing_bias is None else packing.tensor(missing_bias)
        self.alpha = packing.tensor(prompts.alpha, exact_dtype(packing.dtype))
        self.logit_scale = packing.tensor(model.logit_scale, exact_dtype(packing.dtype))

    def integrate(self, features: Tensor) -> Tensor:
        """Frame features (B, T, E) to video features (B, E)."""
        frames = features.shape[1]
        positions: Tensor | None = self.packing.once(
            self.mit_lengths, frames, lambda: self.packing.tensor(temporal_positions(self.mit_positions, frames)[0])
        )
        x = features
        for arguments in self.mit_blocks[:-1]:
            x, positions = temporal_block(x, **arguments, positions=positions), None
        if self.last_block is None:
            return temporal_block(x, **self.mit_blocks[-1], positions=positions, pooled_with=features)
        return self.last_block(x if positions is None else x + positions, features)

    def project_patches(self, tokens: list[Tensor], frames: int, missing_bias: Tensor | None = None) -> Tensor:
        """Tokens of all frames to mean patch features (B, N, E).

        Args:
            tokens: parts of (videos, frames, S, D) in their order.
            frames: of a video.
            missing_bias: (D,), the sum of biases not yet added to the tokens.
        """
        videos: list[Tensor] = []
        mean: Any = 0.0
        seen = 0
        for part in tokens:
            patches = self._mean(part[:, :, 1:], missing_bias)
            if part.shape[1] == frames:
                videos.append(patches)
                continue
            mean, seen = mean + patches.to(exact_dtype(patches.dtype)) * (part.shape[1] / frames), seen + part.shape[1]
            if seen == frames:
                videos.append(mean.to(patches.dtype))
                mean, seen = 0.0, 0
        means = _joined(videos, dim=0)
        return self._project(means) if "patch_mean" in self.rewrites else means

    def _mean(self, patches: Tensor, missing_bias: Tensor | None) -> Tensor:
        norm = self.patch_norm
        if "patch_mean" in self.rewrites:
            return mean_norm_over_frames(patches, norm.weight, norm.bias, constant=missing_bias, eps=norm.eps)  # type: ignore[arg-type]
        return self._project(norm(patches if missing_bias is None else patches + missing_bias)).mean(dim=1)

    def _project(self, x: Tensor) -> Tensor:
        return self.patch_projection(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def prepare(self, features: Tensor) -> EncodedTexts:
        """Text features (K, E) with what the first prompt layer asks for them: it depends on them alone."""
        # a copy, so that both stay of one set, and as the cosines take it: it is done once
        features = features.to(self.packing.device, exact_dtype(self.packing.dtype), copy=True)
        query = self._first_query(features) if "prompt_query" in self.rewrites else features[:, :0]
        self.packing.settle()
        return EncodedTexts(features, query, self.name)

    def logits(self, video: Callable[[], Tensor], patches: Tensor, texts: EncodedTexts) -> Tensor:
        """float32 logits (B, K); at no time are all videos held with all classes.

        Args:
            video: gives the video features (B, E), asked for once the first prompts are on their way.
            patches: the mean patch features (B, N, E).
            texts: the class set.
        """
        rows = patches.to(self.prompt_dtype).flatten(0, 1)
        key_value = self.key_value(self.norm(rows)).view(*patches.shape[:2], len(self.layers), 2, patches.shape[2])
        columns, features = [], None
        for some in self._parts(texts, len(patches)):
            prompts = self._prompts(some, key_value)
            features = video() if features is None else features
            bias = None if self.missing_bias is None else self.missing_bias.expand_as(prompts)
            columns.append(clip_logits(features, some.features, prompts, self.alpha, self.logit_scale, residual=bias))
        return _joined(columns, dim=1)

    def _parts(self, texts: EncodedTexts, videos: int) -> Iterator[EncodedTexts]:
        classes, width = texts.features.shape
        for chunk in class_chunks(classes, videos, width, self.packing.device):
            yield texts._replace(features=texts.features[chunk], query=texts.query[chunk])

    def _prompts(self, texts: EncodedTexts, key_value: Tensor) -> Tensor:
        """What the prompts add to texts, before ``alpha`` and ``missing_bias``: (B, K, E)."""
        videos, (classes, width) = len(key_value), texts.features.shape
        query = texts.query if "prompt_query" in self.rewrites else self._first_query(texts.features)
        # a copy for each video, in one pass: ``add`` modifies it in place
        rows = texts.features.expand(videos, -1, -1)
        rows = rows.to(self.prompt_dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)
        for i, layer in enumerate(self.layers):
            if i:
                query = layer.query(layer.norm_1(rows))
            key, value = key_value[:, :, i].unbind(2)
            mixed = prompt_attention(query.view(videos if i else 1, classes, width), key, value, self.heads)
            rows = layer.out.add(rows, mixed.reshape(rows.shape))
            rows = layer.projection.add(rows, layer.fc.activated(layer.norm_3(rows)))
        return rows.view(videos, classes, width)

    def _first_query(self, features: Tensor) -> Tensor:
        return self.layers[0].query(self.layers[0].norm_1(features.to(self.prompt_dtype)))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts in one tensor; a single one as it is, for even one would be copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _after_norm(norm: Any, weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
    if "norms" not in packing.rewrites:
        return exact(weight), None
    return packing.after_norm(norm, weight, torch.zeros(len(weight)))


def _norm(norm: Any, packing: Packing, missing_bias: Tensor | None) -> Norm:
    """A norm of rows to which ``missing_bias``, (D,) in float64 or None, is not yet added."""
    if "stream" not in packing.rewrites:
        return Norm(*packing.vectors(norm), norm.eps)
    constant = None if missing_bias is None else packing.tensor(missing_bias, exact_dtype(packing.dtype))
    return _MissingBiasNorm(*packing.vectors(norm), norm.eps, constant)


def _prompt_layer(layer: Any, packing: Packing, missing_bias: Tensor | None) -> tuple[_PromptLayer, Tensor | None]:
    """A layer, and the sum of biases not yet added after it, from that before it; norms add them."""
    attention = layer.cross_attn
    fc, (last, projection_bias), activation = packing.mlp(layer.mlp[0], layer.mlp[-1], layer.norm3, "quick_gelu")
    out_bias, before = exact(attention.proj.bias), missing_bias
    biases: tuple[Tensor | None, Tensor | None] = out_bias, projection_bias
    if missing_bias is not None:
        missing_bias, biases = missing_bias + out_bias, (None, None)
    packed = _PromptLayer(
        norm_1=_norm(layer.norm1, packing, before),
        query=packing.linear(*_after_norm(layer.norm1, attention.q_proj.weight, packing)),
        out=packing.linear(exact(attention.proj.weight), biases[0]),
        norm_3=_norm(layer.norm3, packing, missing_bias),
        fc=packing.linear(*fc, activation),
        projection=packing.linear(last, biases[1]),
    )
    return packed, None if missing_bias is None else missing_bias + projection_bias


def _temporal_arguments(block: Any, packing: Packing) -> dict[str, Any]:
    tensors = {
        "norm1_weight": block.ln_1.weight,
        "norm1_bias": block.ln_1.bias,
        "in_proj_weight": block.attn.in_proj_weight,
        "in_proj_bias": block.attn.in_proj_bias,
        "out_weight": block.attn.out_proj.weight,
        "out_bias": block.attn.out_proj.bias,
        "norm2_weight": block.ln_2.weight,
        "norm2_bias": block.ln_2.bias,
        "fc_weight": block.mlp.c_fc.weight,
        "fc_bias": block.mlp.c_fc.bias,
        "proj_weight": block.mlp.c_proj.weight,
        "proj_bias": block.mlp.c_proj.bias,
    }
    arguments: dict[str, Any] = {name: packing.tensor(x) for name, x in tensors.items()}
    return arguments | {"heads": block.attn.heads, "eps": block.ln_1.eps}
