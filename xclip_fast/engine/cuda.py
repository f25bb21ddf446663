"""The vision tower on the fused ops: a residual stream without biases, CFA on a CUDA stream of its own.

The ops run anywhere, so tests on the CPU hold this tower to the reference; only ``SideStream`` needs a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xclip_fast.engine.linears import Float8Linear, Linear
from xclip_fast.engine.packing import Packing, exact, first_message, place_of
from xclip_fast.ops import (
    _patch_extension,
    frame_attention,
    layer_norm,
    message_attention,
    message_key_value,
    patch_embed,
)
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._folded_message import Folded, fold, folded_message
from xclip_fast.ops._patch_contract import affine
from xclip_fast.ops._quantize_rows import activate, quantize_rows
from xclip_fast.reference.positions import spatial_positions


class _ResidualStream(NamedTuple):
    """Tokens (B, T, S, D), contiguous; ``pending``: output of the previous MLP, rows (B T S, D), not yet added."""

    tokens: Tensor
    pending: Tensor | None = None

    def class_tokens(self) -> Tensor:
        """(B, T, D), with what is pending added."""
        classes = self.tokens[:, :, 0]
        return classes if self.pending is None else classes + self.pending.view(self.tokens.shape)[:, :, 0]

    def whole(self) -> Tensor:
        """The tokens with what is pending added, in place."""
        return self.tokens if self.pending is None else self.tokens.add_(self.pending.view(self.tokens.shape))


@dataclass
class _Block:
    """One cross-frame block; ``missing_bias_1``, ``_2``: sum of biases not yet added to the residual stream at a norm.

    ``message`` are the arguments of ``message_attention``, or those of ``folded_message`` where no ``message_kv`` is.
    """

    message: dict[str, Any] | None
    message_kv: tuple[Tensor, Tensor] | None
    constant_kv: Tensor | None
    norm_1: tuple[Tensor, Tensor]
    missing_bias_1: Tensor | None
    qkv: Linear
    out: Linear
    norm_2: tuple[Tensor, Tensor]
    missing_bias_2: Tensor | None
    fc: Linear
    projection: Linear
    heads: int
    eps: float

    def key_value(self, class_tokens: Tensor) -> Tensor:
        """The messages' keys and values (F, 2 D) for class tokens (B, T, D)."""
        if self.message is None:
            return self.constant_kv.expand(class_tokens.shape[:2].numel(), -1).contiguous()  # type: ignore[union-attr]
        if self.message_kv is None:
            return folded_message(class_tokens, **self.message).flatten(0, 1)
        messages = message_attention(class_tokens, **self.message)
        return message_key_value(messages, *self.norm_1, *self.message_kv, eps=self.eps).flatten(0, 1)

    def __call__(self, stream: _ResidualStream, side: SideStream, class_row: bool) -> _ResidualStream:
        """The residual stream after the block, of all tokens or (B, T, 1, D); that given may be modified in place."""
        batch, frames, tokens, width = stream.tokens.shape
        # the side stream reads the tokens as they were: its tensors live as long as this call
        with side.beside(lambda: self.key_value(stream.class_tokens())) as joined:
            rows = stream.tokens.flatten(0, 2)
            packed, rows = self._after_norm(self.qkv, rows, stream.pending, self.norm_1, self.missing_bias_1)
            packed = packed.view(-1, tokens, 3 * width)
            message_kv = joined()
        if class_row:
            mixed = self._mix_class(packed, message_kv)
            rows = rows[::tokens].contiguous()
        else:
            mixed = frame_attention(packed, message_kv, self.heads)
        rows, branch = _added(self.out, rows, mixed.reshape(rows.shape))
        rows, branch = self._mlp(rows, branch)
        return _ResidualStream(rows.view(batch, frames, -1, width), branch)

    def _after_norm(
        self,
        linear: Linear,
        rows: Tensor,
        branch: Tensor | None,
        norm: tuple[Tensor, Tensor],
        missing_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The linear layer of the normed rows, and the rows with the branch added."""
        weight, bias = norm
        if isinstance(linear, Float8Linear):
            # the normed rows are never stored in another precision
            quantized, scale, rows = quantize_rows(
                rows, weight=weight, bias=bias, residual=branch, constant=missing_bias, eps=self.eps
            )
            return linear.multiply(quantized, scale), rows
        normed, rows = layer_norm(rows, weight, bias, residual=branch, constant=missing_bias, eps=self.eps)
        return linear(normed), rows

    def _mlp(self, rows: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.fc, Float8Linear):
            hidden, rows = self._after_norm(self.fc, rows, branch, self.norm_2, self.missing_bias_2)
            if isinstance(self.projection, Float8Linear):
                quantized, scale, _ = quantize_rows(hidden, activation=self.fc.activation)
                return rows, self.projection.multiply(quantized, scale)
            hidden = activate(hidden, self.fc.activation)
        else:
            normed, rows = layer_norm(rows, *self.norm_2, residual=branch, constant=self.missing_bias_2, eps=self.eps)
            hidden = self.fc.activated(normed)
        return _added(self.projection, rows, hidden)

    def _mix_class(self, packed: Tensor, message_kv: Tensor) -> Tensor:
        query, key, value = packed.chunk(3, dim=-1)
        message_key, message_value = message_kv.unsqueeze(1).chunk(2, dim=-1)
        parts = query[:, :1], torch.cat([key, message_key], dim=1), torch.cat([value, message_value], dim=1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _added(linear: Linear, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows with the layer's result added in its epilogue; for float8, the rows and the result not yet added."""
    if isinstance(linear, Float8Linear):
        return rows, linear(x)
    return linear.add(rows, x), None


class SideStream:
    """A CUDA stream beside the current one; on the CPU the work runs at once. Each thread has a stream of its own.

    So what one thread captures is not mixed with what another runs, up to PyTorch's 32 streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.local = device, threading.local()

    @contextmanager
    def beside(self, work: Callable[[], Tensor]) -> Iterator[Callable[[], Tensor]]:
        """Start work that reads what the current stream has made so far; yields a function that joins it.

        An exception joins it too, so that a capture fails by the exception and not by an unjoined stream.
        """
        if self.device.type != "cuda":
            result = work()
            yield lambda: result
            return
        if not hasattr(self.local, "stream"):
            self.local.stream = torch.cuda.Stream(self.device, priority=-1)
        main = torch.cuda.current_stream(self.device)
        self.local.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.local.stream):
                result = work()
            yield lambda: self._join(main, result)
        except BaseException:
            main.wait_stream(self.local.stream)
            raise

    def _join(self, main: torch.cuda.Stream, result: Tensor) -> Tensor:
        main.wait_stream(self.local.stream)
        # in a graph nothing but the graph's own order can reuse the memory
        if not torch.cuda.is_current_stream_capturing():
            result.record_stream(main)
        return result


class CudaTower:
    """Patch embedding, cross-frame blocks and ``ln_post`` with its projection, from the model's ``visual``.

    Args:
        visual: ``reference.VisionTower`` or what extends it; it is read, never kept.
        config: the model's sizes.
        packing: how its weights become GEMMs.
    """

    def __init__(self, visual: Any, config: Any, packing: Packing) -> None:
        # the fused norms read their vectors anyway
        packing = replace(packing, rewrites=packing.rewrites - {"norms"})
        self.config, self.packing, self.rewrites = config, packing, packing.rewrites
        self.positions = exact(visual.positional_embedding)
        self.grids: dict[tuple[int, int], Tensor] = {}
        self.packed_patches: dict[tuple[int, int], _patch_extension.Packed] = {}
        self.patch = packing.tensor(visual.conv1.weight)
        self.class_embedding = packing.tensor(visual.class_embedding)
        self.norm_pre = packing.tensor(visual.ln_pre.weight), packing.tensor(visual.ln_pre.bias)
        self.eps_pre, self.eps_post = visual.ln_pre.eps, visual.ln_post.eps
        missing_bias = torch.zeros(config.vision_width, dtype=torch.float64) if "stream" in self.rewrites else None
        self.blocks = []
        for i, block in enumerate(visual.transformer.resblocks):
            packed, missing_bias = _pack(block, i, config, packing, missing_bias)
            self.blocks.append(packed)
        if "first_message" in self.rewrites:
            first = visual.transformer.resblocks[0]
            row = exact(visual.class_embedding) + self.positions[0]
            row = _normed(row, visual.ln_pre)
            width = config.vision_width
            weight, bias = exact(first.attn.in_proj_weight[width:]), exact(first.attn.in_proj_bias[width:])
            pair = weight @ _normed(first_message(first, row), first.ln_1) + bias
            self.blocks[0].message, self.blocks[0].constant_kv = None, packing.tensor(pair)
        self.missing_bias = None if missing_bias is None else packing.tensor(missing_bias)
        self.norm_post = packing.tensor(visual.ln_post.weight), packing.tensor(visual.ln_post.bias)
        self.projection = packing.linear(exact(visual.proj).t(), None)
        self.side = SideStream(packing.device)

    def __call__(self, video: Tensor, *, patches: bool) -> tuple[Tensor, list[Tensor]]:
        """A checked video to class tokens (B, T, D), and the tokens of its frames in one part (B, T, S, D).

        ``missing_bias`` is not yet added to any of them.
        """
        stream = _ResidualStream(self._embed(video))
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            stream = block(stream, self.side, i == last and not patches and "class_row" in self.rewrites)
        tokens = stream.whole()
        return tokens[:, :, 0], [tokens]

    def project(self, classes: Tensor) -> Tensor:
        """Class tokens (B, T, D) as the tower gives them to frame features (B * T, E)."""
        normed, _ = layer_norm(classes, *self.norm_post, constant=self.missing_bias, eps=self.eps_post)
        return self.projection(normed.flatten(0, 1))

    def _embed(self, video: Tensor) -> Tensor:
        height, width = video.shape[2:4] if video.dtype == torch.uint8 else video.shape[3:5]
        grid = height // self.config.patch_size, width // self.config.patch_size
        positions = self.packing.once(
            self.grids, grid, lambda: self.packing.tensor(spatial_positions(self.positions, grid))
        )
        frames, packed, mean, std = video.flatten(0, 1), None, None, None
        if video.dtype == torch.uint8:
            mean, std = self.config.pixel_mean, self.config.pixel_std
            if _patch_extension.takes_packed(frames, self.patch):
                weights = self.patch, self.class_embedding, positions
                packed = self.packing.once(
                    self.packed_patches, grid, lambda: _patch_extension.pack_for_cuda(*weights, affine(mean, std))
                )
        tokens = patch_embed(
            frames,
            self.patch,
            self.class_embedding,
            positions,
            norm_weight=self.norm_pre[0],
            norm_bias=self.norm_pre[1],
            eps=self.eps_pre,
            mean=mean,
            std=std,
            _packed=packed,
        )
        return tokens.unflatten(0, video.shape[:2]).contiguous()


def _pack(
    block: Any, index: int, config: Any, packing: Packing, missing_bias: Tensor | None
) -> tuple[_Block, Tensor | None]:
    """A block, and the sum of biases not yet added to the residual stream after it."""
    attention, width = block.attn, config.vision_width
    fc, projection, activation = packing.mlp(block.mlp.c_fc, block.mlp.c_proj, block.ln_2, config.activation)
    (last, projection_bias), out_bias = projection, exact(attention.out_proj.bias)
    fc_bias, missing_bias_1, missing_bias_2 = exact(block.message_fc.bias), None, None
    biases: tuple[Tensor | None, Tensor | None] = out_bias, projection_bias
    if missing_bias is not None:
        # the message is of the class token with the missing bias added
        fc_bias = fc_bias + exact(block.message_fc.weight) @ missing_bias
        missing_bias_1, missing_bias_2 = packing.tensor(missing_bias), packing.tensor(missing_bias + out_bias)
        missing_bias = missing_bias + out_bias + projection_bias
        biases = None, None
    weight, bias = exact(attention.in_proj_weight), exact(attention.in_proj_bias)
    pair = weight[width:], bias[width:]
    message, message_kv = _pack_message(block, fc_bias, pair, packing)
    packed = _Block(
        message=message,
        message_kv=message_kv,
        constant_kv=None,
        norm_1=(packing.tensor(block.ln_1.weight), packing.tensor(block.ln_1.bias)),
        missing_bias_1=missing_bias_1,
        qkv=packing.linear(weight, bias, place=place_of(index, "qkv")),
        out=packing.linear(exact(attention.out_proj.weight), biases[0], place=place_of(index, "out")),
        norm_2=(packing.tensor(block.ln_2.weight), packing.tensor(block.ln_2.bias)),
        missing_bias_2=missing_bias_2,
        fc=packing.linear(*fc, activation, place=place_of(index, "fc")),
        projection=packing.linear(last, biases[1], place=place_of(index, "projection")),
        heads=attention.heads,
        eps=block.ln_1.eps,
    )
    return packed, missing_bias


def _pack_message(
    block: Any, fc_bias: Tensor, pair: tuple[Tensor, Tensor], packing: Packing
) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
    """``_Block``'s message and message_kv, from the float64 rows (2D, D) and (2D,) of a message's key and value."""
    attention, norm = block.message_attn, block.message_ln
    if "message_product" in packing.rewrites:
        steps = (
            (exact(block.message_fc.weight), fc_bias),
            (exact(norm.weight), exact(norm.bias)),
            (exact(attention.in_proj_weight), exact(attention.in_proj_bias)),
            (exact(attention.out_proj.weight), exact(attention.out_proj.bias)),
            (exact(block.ln_1.weight), exact(block.ln_1.bias)),
            pair,
        )
        # six GEMMs of D by D in float64 take a GPU no time
        folded = fold(*((weight.to(packing.device), bias.to(packing.device)) for weight, bias in steps))
        # what no GEMM adds stays in float32
        tensors = {
            name: packing.tensor(x, None if x.ndim == 2 or name == "bias" else exact_dtype(packing.dtype))
            for name, x in folded._asdict().items()
        }
        epsilons = {"eps": norm.eps, "pair_eps": block.ln_1.eps}
        return {"weights": Folded(**tensors), "heads": attention.heads} | epsilons, None
    weights = {
        "fc_weight": block.message_fc.weight,
        "fc_bias": fc_bias,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "in_proj_weight": attention.in_proj_weight,
        "in_proj_bias": attention.in_proj_bias,
        "out_weight": attention.out_proj.weight,
        "out_bias": attention.out_proj.bias,
    }
    message = {name: packing.tensor(x) for name, x in weights.items()}
    return message | {"heads": attention.heads, "eps": norm.eps}, (packing.tensor(pair[0]), packing.tensor(pair[1]))


def _normed(row: Tensor, norm: Any) -> Tensor:
    """The layer norm of one float64 row."""
    return torch.nn.functional.layer_norm(row, row.shape, exact(norm.weight), exact(norm.bias), norm.eps)
