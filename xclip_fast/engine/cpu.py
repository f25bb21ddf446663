"""The vision tower on the CPU: a few hundred rows at a time through a whole block, so that they stay in the caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from xclip_fast.engine.attention import frame_attention
from xclip_fast.engine.packing import PRODUCTS, Packing, exact, place_of
from xclip_fast.engine.products import Product
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._folded_message import fold_norm
from xclip_fast.reference.positions import spatial_positions

CHUNK_ROWS = 800  # at once: with fewer products are slower, with many more their memory is above plain PyTorch's


@dataclass
class Norm:
    """A layer norm; without vectors where they are in the product behind it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass
class Message:
    """Cross-frame attention of one block. ``fc`` gives the message, or with ``shift`` the message and its QKV."""

    fc: Product
    norm: Norm
    qkv: Product | None
    shift: Tensor | None
    out: Product
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
    qkv: Product
    out: Product
    norm_2: Norm
    fc: Product
    projection: Product
    heads: int
    scale: float | None

    def __call__(self, rows: Tensor, messages: Tensor, *, class_row: bool = False) -> Tensor:
        """Rows (F * S, D) of F frames with their messages (F, D) to the same rows, or the class rows (F, D) alone."""
        frames = len(messages)
        tokens = len(rows) // frames
        # the queries of the messages come along unused: cheaper than a product of their keys and values alone
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
        packing: how its weights become products.
        blocks: its blocks, where they are packed already.
    """

    lag = None  # nothing that its tokens lack

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
        self.projection = packing.product(exact(visual.proj).t(), None)

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

        A part is of whole videos, or of some frames of one. Bytes share a scale, so theirs is of one video always.
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
        self.patch = self.packing.product(weight.flatten(1), None)
        folded = weight / (255 * std)
        # bytes less 128 are exact in any dtype and small beside the mean
        bias = (folded * 128).sum(dim=(1, 2, 3)) - (weight * mean / std).sum(dim=(1, 2, 3))
        self.byte_patch = self.packing.product(folded.movedim(1, 3).flatten(1), bias)

    def _embed(self, frames: Tensor) -> Tensor:
        """Frames to tokens (frames, S, D) behind the first norm."""
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
    """One cross-frame block of a model, packed; its products have the places of ``place_of``."""
    attention, width = block.attn, config.vision_width
    qkv, out, fc, projection = (place_of(index, name) for name in PRODUCTS)
    weight, bias = packing.behind(block.ln_1, attention.in_proj_weight, attention.in_proj_bias, place=qkv)
    scale = None
    if "scores" in packing.rewrites:
        scale = 1.0
        share = torch.ones(3 * width, dtype=torch.float64)
        share[:width] = (width // attention.heads) ** -0.5
        weight, bias = weight * share[:, None], bias * share
    mlp = block.mlp
    first, last, activation = packing.perceptron(mlp.c_fc, mlp.c_proj, block.ln_2, config.activation, place=fc)
    return Block(
        message=pack_message(block, packing),
        norm_1=Norm(*packing.vectors(block.ln_1, place=qkv), block.ln_1.eps),
        qkv=packing.product(weight, bias, place=qkv),
        out=packing.product(exact(attention.out_proj.weight), exact(attention.out_proj.bias), place=out),
        norm_2=Norm(*packing.vectors(block.ln_2, place=fc), block.ln_2.eps),
        fc=packing.product(*first, activation, place=fc),
        projection=packing.product(*last, place=projection),
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
        qkv = packing.product(*packing.behind(norm, attention.in_proj_weight, attention.in_proj_bias))
    return Message(
        fc=packing.product(fc, fc_bias),
        norm=Norm(*packing.vectors(norm), norm.eps),
        qkv=qkv,
        shift=shift,
        out=packing.product(exact(attention.out_proj.weight), exact(attention.out_proj.bias)),
        heads=attention.heads,
    )


def first_message(block: Any, class_token: Tensor) -> Tensor:
    """The first block's message (D,) in float64: attention over T equal messages returns their common value."""
    message = exact(block.message_fc.weight) @ class_token + exact(block.message_fc.bias)
    norm, attention, width = block.message_ln, block.message_attn, len(message)
    normed = layer_norm(message, message.shape, exact(norm.weight), exact(norm.bias), norm.eps)
    value = exact(attention.in_proj_weight[2 * width :]) @ normed + exact(attention.in_proj_bias[2 * width :])
    return message + exact(attention.out_proj.weight) @ value + exact(attention.out_proj.bias)
