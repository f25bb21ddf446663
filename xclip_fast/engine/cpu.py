"""The vision tower on the CPU: a few hundred rows at a time through a whole block, so that they stay in the caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention, softmax

from xclip_fast.engine.linears import Linear
from xclip_fast.engine.packing import GEMMS, Norm, Packing, exact, first_message, place_of
from xclip_fast.ops import _attention_extension
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._folded_message import fold_norm
from xclip_fast.reference.positions import spatial_positions

CHUNK_ROWS = 800  # at once: with fewer, GEMMs are slower; with many more, peak memory is above plain PyTorch's
_SCORES = 120_000  # at once: their float32 softmax stays in the L2 cache
_SHORT = 320  # keys up to which two batched GEMMs beat the fused attention of PyTorch, in bfloat16


@dataclass
class Message:
    """Cross-frame attention of one block. ``fc`` gives the message, or with ``shift`` the message and its QKV."""

    fc: Linear
    norm: Norm
    qkv: Linear | None
    shift: Tensor | None
    out: Linear
    heads: int

    def __call__(self, class_tokens: Tensor, frames: int) -> Tensor:
        """Class tokens (B * T, D) to messages of the same shape."""
        message = self.fc(class_tokens)
        if self.qkv is None:
            message, packed = message.split([class_tokens.shape[1], 3 * class_tokens.shape[1]], dim=-1)
            wide = exact_dtype(message.dtype)
            variance = message.to(wide).var(dim=-1, correction=0, keepdim=True)
            packed = packed * (variance + self.norm.eps).rsqrt().to(packed.dtype) + self.shift
        else:
            packed = self.qkv(self.norm(message))
        parts = packed.view(-1, frames, 3, self.heads, packed.shape[1] // (3 * self.heads))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(message.shape)
        return self.out.add(message.contiguous(), mixed)


@dataclass
class Block:
    """One cross-frame block, packed."""

    message: Message | Tensor
    norm_1: Norm
    qkv: Linear
    out: Linear
    norm_2: Norm
    fc: Linear
    projection: Linear
    heads: int
    scale: float | None

    def __call__(self, rows: Tensor, messages: Tensor, *, class_row: bool = False) -> Tensor:
        """Rows (F * S, D) of F frames with their messages (F, D) to the same rows, or the class rows (F, D) alone."""
        frames = len(messages)
        tokens = len(rows) // frames
        # the queries of the messages come along unused: cheaper than a GEMM of their keys and values alone
        packed = self.qkv(torch.cat([self.norm_1(rows), self.norm_1(messages)]))
        mixed = frame_attention(packed, frames, self.heads, 1 if class_row else tokens, self.scale)
        if class_row:
            rows = rows[::tokens].contiguous()
        rows = self.out.add(rows, mixed)
        return self.projection.add(rows, self.fc.activated(self.norm_2(rows)))


class CpuTower:
    """Patch embedding, cross-frame blocks and ``ln_post`` with its projection, from the model's ``visual``.

    Args:
        visual: ``reference.VisionTower`` or what extends it; it is read, never kept.
        config: the model's sizes.
        packing: how its weights become GEMMs.
        blocks: its blocks, where they are packed already.
    """

    missing_bias = None  # its GEMMs add their biases

    def __init__(self, visual: Any, config: Any, packing: Packing, *, blocks: list[Block] | None = None) -> None:
        self.config, self.packing = config, packing
        self.dtype, self.rewrites = packing.dtype, packing.rewrites
        self.positions = exact(visual.positional_embedding)
        self.grids: dict[tuple[int, int], Tensor] = {}
        self.class_embedding = packing.tensor(visual.class_embedding)
        norm = visual.ln_pre
        self.norm_pre = Norm(packing.tensor(norm.weight), packing.tensor(norm.bias), norm.eps)
        row = exact(visual.class_embedding) + self.positions[0]
        row = layer_norm(row, row.shape, exact(norm.weight), exact(norm.bias), norm.eps)
        self.class_token = packing.tensor(row)
        self._pack_pixels(exact(visual.conv1.weight))
        resblocks = visual.transformer.resblocks
        if blocks is None:
            blocks = [pack_block(block, i, config, packing) for i, block in enumerate(resblocks)]
        self.blocks = blocks
        if self.blocks and "first_message" in self.rewrites:
            self.blocks[0].message = packing.tensor(first_message(resblocks[0], row))
        norm = visual.ln_post
        self.norm_post = Norm(packing.tensor(norm.weight), packing.tensor(norm.bias), norm.eps)
        self.projection = packing.linear(exact(visual.proj).t(), None)

    def __call__(self, video: Tensor, *, patches: bool) -> tuple[Tensor, list[Tensor]]:
        """A checked video to class tokens (B * T, D), and the tokens in the parts of ``embed``."""
        frames = video.shape[1]
        chunks = self.embed(video)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            class_row = i == last and not patches and "class_row" in self.rewrites
            chunks = step(block, chunks, frames, class_row=class_row)
        return class_tokens(chunks), chunks

    def project(self, classes: Tensor) -> Tensor:
        """Class tokens (B * T, D) to frame features (B * T, E)."""
        return self.projection(self.norm_post(classes))

    def embed(self, video: Tensor) -> list[Tensor]:
        """The tokens that enter the first block, in parts (videos, frames, S, D) that stay in the caches.

        A part is of whole videos, or of some frames of one. Rows in int8 share a scale, so a part is of one video then.
        """
        height, width = video.shape[2:4] if video.dtype == torch.uint8 else video.shape[3:5]
        at_once = max(1, CHUNK_ROWS // (height * width // self.config.patch_size**2 + 1))
        videos = 1 if self.packing.narrow else max(1, at_once // video.shape[1])
        if at_once >= video.shape[1]:
            parts = list(video.split(videos))
        else:
            parts = [some.unsqueeze(0) for one in video for some in one.split(at_once)]
        return [self._embed(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in parts]

    def _pack_pixels(self, weight: Tensor) -> None:
        mean, std = (
            torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (self.config.pixel_mean, self.config.pixel_std)
        )
        self.mean, self.std = (self.packing.tensor(x.flatten(), exact_dtype(self.dtype)) for x in (mean, std))
        self.patch = self.packing.linear(weight.flatten(1), None)
        folded = weight / (255 * std)
        # bytes less 128 are exact in any dtype and small beside the mean
        bias = (folded * 128).sum(dim=(1, 2, 3)) - (weight * mean / std).sum(dim=(1, 2, 3))
        self.byte_patch = self.packing.linear(folded.movedim(1, 3).flatten(1), bias)

    def _embed(self, frames: Tensor) -> Tensor:
        """Frames to tokens (frames, S, D) after the first norm."""
        side = self.config.patch_size
        if frames.dtype == torch.uint8 and "pixels" not in self.rewrites:
            frames = ((frames.to(self.mean.dtype) / 255 - self.mean) / self.std).movedim(-1, 1)
        if frames.dtype == torch.uint8:
            grid = frames.shape[1] // side, frames.shape[2] // side
            cut = frames.reshape(-1, grid[0], side, grid[1], side * 3).transpose(2, 3)
            pixels = cut.reshape(-1, side * side * 3).to(self.dtype).sub_(128)
            patches = self.byte_patch(pixels)
        else:
            grid = frames.shape[2] // side, frames.shape[3] // side
            cut = frames.reshape(-1, 3, grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
            patches = self.patch(cut.reshape(-1, 3 * side * side).to(self.dtype))
        positions = self._positions(grid)
        patches = patches.view(len(frames), -1, patches.shape[1])
        rows = patches.new_empty(len(frames), patches.shape[1] + 1, patches.shape[2])
        if "class_token" in self.rewrites:
            rows[:, 1:] = self.norm_pre(patches.add_(positions[1:]))
            rows[:, 0] = self.class_token
            return rows
        rows[:, 0], rows[:, 1:] = self.class_embedding, patches
        return self.norm_pre(rows.add_(positions))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid not in self.grids:
            self.grids[grid] = self.packing.tensor(spatial_positions(self.positions, grid))
        return self.grids[grid]


def class_tokens(chunks: list[Tensor]) -> Tensor:
    """The class tokens (F, D) of all frames."""
    return torch.cat([chunk[:, :, 0].flatten(0, 1) for chunk in chunks])


def step(block: Block, chunks: list[Tensor], frames: int, *, class_row: bool = False) -> list[Tensor]:
    """One block on the tokens of all frames, in parts (videos, frames, S, D), or giving class tokens alone: S is 1."""
    counts = [chunk.shape[0] * chunk.shape[1] for chunk in chunks]
    if isinstance(block.message, Tensor):
        messages = block.message.expand(sum(counts), -1)
    else:
        messages = block.message(class_tokens(chunks), frames)
    parts = list(zip(chunks, messages.split(counts), strict=True))
    rows = [block(chunk.flatten(0, 2), message, class_row=class_row) for chunk, message in parts]
    return [x.view(*chunk.shape[:2], -1, x.shape[1]) for x, (chunk, _) in zip(rows, parts, strict=True)]


def pack_block(block: Any, index: int, config: Any, packing: Packing) -> Block:
    """One cross-frame block of a model, packed; its GEMMs have the places of ``place_of``."""
    attention, width = block.attn, config.vision_width
    qkv, out, fc, projection = (place_of(index, name) for name in GEMMS)
    weight, bias = packing.after_norm(block.ln_1, attention.in_proj_weight, attention.in_proj_bias, place=qkv)
    scale = None
    if "scores" in packing.rewrites:
        scale = 1.0
        share = torch.ones(3 * width, dtype=torch.float64)
        share[:width] = (width // attention.heads) ** -0.5
        weight, bias = weight * share[:, None], bias * share
    mlp = block.mlp
    first, last, activation = packing.mlp(mlp.c_fc, mlp.c_proj, block.ln_2, config.activation, place=fc)
    return Block(
        message=pack_message(block, packing),
        norm_1=Norm(*packing.vectors(block.ln_1, place=qkv), block.ln_1.eps),
        qkv=packing.linear(weight, bias, place=qkv),
        out=packing.linear(exact(attention.out_proj.weight), exact(attention.out_proj.bias), place=out),
        norm_2=Norm(*packing.vectors(block.ln_2, place=fc), block.ln_2.eps),
        fc=packing.linear(*first, activation, place=fc),
        projection=packing.linear(*last, place=projection),
        heads=attention.heads,
        scale=scale,
    )


def pack_message(block: Any, packing: Packing) -> Message:
    """The cross-frame attention of one block, packed."""
    attention, norm = block.message_attn, block.message_ln
    fc, fc_bias = exact(block.message_fc.weight), exact(block.message_fc.bias)
    qkv, shift = None, None
    if "message_product" in packing.rewrites:
        parts = norm.weight, norm.bias, attention.in_proj_weight, attention.in_proj_bias
        inner, shift = fold_norm(*map(exact, parts))
        fc, fc_bias = torch.cat([fc, inner @ fc]), torch.cat([fc_bias, inner @ fc_bias])
        shift = packing.tensor(shift)
    else:
        qkv = packing.linear(*packing.after_norm(norm, attention.in_proj_weight, attention.in_proj_bias))
    return Message(
        fc=packing.linear(fc, fc_bias),
        norm=Norm(*packing.vectors(norm), norm.eps),
        qkv=qkv,
        shift=shift,
        out=packing.linear(exact(attention.out_proj.weight), exact(attention.out_proj.bias)),
        heads=attention.heads,
    )


def frame_attention(packed: Tensor, frames: int, heads: int, queries: int, scale: float | None) -> Tensor:
    """Mix the values of each frame's tokens and its message.

    Args:
        packed: (frames * S + frames, 3 * D), contiguous: query, key and value of all tokens, then of the messages,
            whose queries are not used.
        frames: how many.
        heads: how many; D is ``heads * head_dim``.
        queries: of each frame the first 1 or S tokens attend.
        scale: of the scores; without one ``head_dim ** -0.5``.

    Returns:
        (frames * queries, D) in the dtype of ``packed``.
    """
    width = packed.shape[1] // 3
    head_dim = width // heads
    scale = head_dim**-0.5 if scale is None else scale
    tokens, messages = packed[:-frames].view(frames, -1, 3 * width), packed[-frames:, width:]
    if _attention_extension.refusal(tokens, messages, heads) is None:
        mixed, _ = _attention_extension.frame_attention_fwd(tokens, messages, heads, queries, scale, False)
        return mixed.view(frames * queries, width)
    own = tokens.view(frames, -1, 3, heads, head_dim)
    pair = packed.new_empty(2, frames, heads, own.shape[1] + 1, head_dim)
    pair[:, :, :, :-1] = own[:, :, 1:].permute(2, 0, 3, 1, 4)
    pair[:, :, :, -1] = messages.unflatten(1, (2, heads, head_dim)).transpose(0, 1)
    mixed = _attend(own[:, :queries, 0].transpose(1, 2), pair[0], pair[1], scale)
    return mixed.transpose(1, 2).reshape(frames * queries, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(F, heads, L, head_dim) queries, contiguous keys and values."""
    if query.dtype is not torch.bfloat16 or key.shape[2] > _SHORT or scale != 1.0:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    shape = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    mixed = torch.empty_like(query)
    heads = max(1, _SCORES // (query.shape[1] * key.shape[2]))
    for first in range(0, len(query), heads):
        some = slice(first, first + heads)
        # PyTorch's softmax is twice as fast into float32 as into bfloat16
        weights = softmax(torch.bmm(query[some], key[some]), dim=-1, dtype=torch.float32).to(value.dtype)
        torch.bmm(weights, value[some], out=mixed[some])
    return mixed.view(shape)
