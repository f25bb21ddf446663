"""The blocks of CLIP's text tower and of MIT on the fused ops, and what all blocks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from xclip_fast import reference
from xclip_fast.ops import backend, feed_forward, layer_norm
from xclip_fast.ops._backends import asked_backend, host_bound, is_transformed
from xclip_fast.ops._norm_linear import norm_feed_forward
from xclip_fast.plain import LINEAR, NORM, QUICK_GELU, Plain, is_plain
from xclip_fast.reference.transformer import causal_mask


class SelfAttention(reference.transformer.SelfAttention):
    """The reference's on PyTorch's fused attention.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import SelfAttention
        >>> SelfAttention(64, heads=2)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (..., L, width) to the same shape; ``mask`` (L, L) is added to the scores."""
        return super().forward(x, mask) if is_transformed() else self.attend(x, attn_mask=mask)

    def attend(self, x: Tensor, **options: Any) -> Tensor:
        """``forward`` with options of ``scaled_dot_product_attention``."""
        packed = linear(x, self.in_proj_weight, self.in_proj_bias)
        # PyTorch's fast attention takes four dimensions, for five it writes down the scores:
        # (..., L, 3 D) to three of (N, heads, L, head_dim)
        length, width = x.shape[-2:]
        parts = packed.view(prod(x.shape[:-2]), length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, **options)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


MLP = Plain(nn.Sequential, c_fc=LINEAR, gelu=QUICK_GELU, c_proj=LINEAR)
ATTENTION = Plain(SelfAttention, parameters="in_proj_weight in_proj_bias", out_proj=LINEAR)


def add_norm(
    owner: nn.Module, name: str, stream: Tensor, pending: Tensor | None, kind: Plain = NORM
) -> tuple[Tensor, Tensor]:
    """``pending`` added to the residual stream and normed in one kernel: the normed rows, and the residual stream."""
    if pending is not None:
        # autocast leaves branches in half precision beside a float32 residual stream
        pending = pending.to(stream.dtype)
    norm: Any = getattr(owner, name)
    if not is_plain(owner, **{name: kind}):
        stream = add_pending(stream, pending)
        return norm(stream), stream
    x, residual = (stream, None) if pending is None else (pending, stream)
    return layer_norm(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)


def modules_do(tokens: Tensor, norm: nn.Module) -> bool:
    """Whether plain modules cost a GPU's host the least, and serve these tokens: PyTorch's norms take one dtype."""
    weight = getattr(norm, "weight", None)
    return host_bound(tokens) and (weight is None or weight.dtype == tokens.dtype)


def add_pending(stream: Tensor, pending: Tensor | None) -> Tensor:
    """The residual stream with ``pending``, output of the previous MLP, added."""
    return stream if pending is None else stream + pending


def run_mlp(owner: Any, x: Tensor, kind: Plain = MLP) -> Tensor:
    """The MLP of a module, fused where it is plain."""
    if not is_plain(owner, mlp=kind):
        return owner.mlp(x)
    fc, _, *_, proj = owner.mlp
    return feed_forward(x, fc.weight, fc.bias, proj.weight, proj.bias)


def add_norm_mlp(owner: Any, stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """``branch`` added to the residual stream, and the MLP of what ``ln_2`` makes of it: the stream, and its result."""
    norm, mlp = owner.ln_2, owner.mlp
    if not is_plain(owner, ln_2=NORM, mlp=MLP):
        normed, stream = add_norm(owner, "ln_2", stream, branch)
        return stream, run_mlp(owner, normed)
    weights = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias
    out, stream = norm_feed_forward(branch.to(stream.dtype), stream, (norm.weight, norm.bias), weights, norm.eps)
    return stream, out


class Block(reference.transformer.Block):
    """The pre-norm block of the text transformer and of MIT on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import Block
        >>> Block(64, heads=1)(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    attention = SelfAttention
    attn: SelfAttention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (..., L, width) to the same shape; ``mask`` (L, L) is added to the scores."""
        return super().forward(x, mask) if modules_do(x, self.ln_1) else add_pending(*self._advance(x, None, mask))

    def _advance(
        self, stream: Tensor, pending: Tensor | None, mask: Tensor | None, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As ``CrossFrameBlock._advance``; ``causal`` where the mask is the causal one."""
        normed, stream = add_norm(self, "ln_1", stream, pending)
        if causal and not is_transformed() and is_plain(self, attn=_ATTENTION_ALONE):
            branch = self.attn.attend(normed, is_causal=True)
        else:
            branch = self.attn(normed, mask)
        return add_norm_mlp(self, stream, branch)


def run_blocks(
    stack: Any, kind: Plain, stream: Tensor, *inputs: Tensor, **options: bool
) -> tuple[Tensor, Tensor | None]:
    """A stack's blocks in order, each MLP added in the first norm of the next: the residual stream and ``pending``.

    inputs: further arguments of a block's ``forward``.
    options: further arguments of its ``_advance``.
    """
    recomputed = stack.checkpointing is not None and stack.training and torch.is_grad_enabled()
    by_modules = recomputed or host_bound(stream)
    pending: Tensor | None = None
    for name, block in stack.resblocks.named_children():
        if not by_modules and is_plain(stack.resblocks, **{name: kind}):
            stream, pending = block._advance(stream, pending, *inputs, **options)
            continue
        run = partial(checkpoint, _as_asked(block), **stack.checkpointing) if recomputed else block
        stream, pending = run(add_pending(stream, pending), *inputs), None
    return stream, pending


def _as_asked(block: nn.Module) -> Callable[..., Tensor]:
    """A block for a thread of autograd, which knows nothing of the backend asked for around it."""
    name = asked_backend()
    if name is None:
        return block

    def run(*inputs: Tensor) -> Tensor:
        with backend(name):
            found: Tensor = block(*inputs)
        return found

    return run


class TextTransformer(reference.transformer.TextTransformer):
    """CLIP's causal text transformer on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import TextTransformer
        >>> TextTransformer(64, layers=2, heads=1, activation="quick_gelu")(torch.randn(3, 10, 64)).shape
        torch.Size([3, 10, 64])
    """

    block = Block
    checkpointing: dict[str, Any] | None = None  # as in CrossFrameTransformer

    def forward(self, x: Tensor) -> Tensor:
        """Token embeddings (K, L, width) to the same shape."""
        return add_pending(*run_blocks(self, _BLOCK, x, causal_mask(x), causal=True))


_BLOCK = Plain(Block)
_ATTENTION_ALONE = Plain(SelfAttention)
