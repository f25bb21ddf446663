"""Put the fused ops under a model of somebody else: Hugging Face's X-CLIP, or one with the official attribute names.

Only the ``forward`` of single modules of the given instance is replaced: classes, parameters and state dict stay as
they are, and ``restore`` takes the replacements away again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xclip_fast.ops import (
    feed_forward,
    frame_attention,
    layer_norm,
    message_attention,
    message_key_value,
    prompt_attention,
)
from xclip_fast.ops._backends import choose
from xclip_fast.ops._frames import attention_refusal

_ORIGINAL = "_xclip_fast_original"


@dataclass(frozen=True)
class OptimizeReport:
    """What ``optimize`` replaced: the name of each module in the model, and its kind."""

    replaced: dict[str, str]
    already: dict[str, str]

    def __str__(self) -> str:
        kinds = Counter(self.replaced.values())
        found = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "nothing new"
        return f"replaced {found}" + (f"; {len(self.already)} were replaced before" if self.already else "")


def optimize(model: nn.Module) -> OptimizeReport:
    """Run the hot path of a model on the fused ops, in place, for inference and training.

    Args:
        model: ``XCLIPModel`` or ``XCLIPVisionModel`` of transformers 5, a model with the official modules, or a part of
            either. A second call changes nothing more.

    Returns:
        What was replaced.

    Raises:
        ValueError: nothing in the model can be replaced.
    """
    replaced, already = {}, {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        if _ORIGINAL in module.__dict__:
            already[name] = kind
            continue
        # the instance attribute hides the method of the class
        object.__setattr__(module, _ORIGINAL, True)
        object.__setattr__(module, "forward", MethodType(_FORWARDS[kind], module))
        replaced[name] = kind
    if not replaced and not already:
        raise ValueError(
            f"nothing to optimize in {type(model).__name__}: give an X-CLIP of transformers 5.x, or a model with the "
            f"official modules ({', '.join(sorted(_FORWARDS))})"
        )
    return OptimizeReport(replaced, already)


def restore(model: nn.Module) -> int:
    """Undo ``optimize``: the modules run their classes' own code again. Returns how many were restored."""
    restored = 0
    for module in model.modules():
        if module.__dict__.pop(_ORIGINAL, None):
            del module.__dict__["forward"]
            restored += 1
    return restored


def _kind(module: nn.Module) -> str | None:
    """Which replacement fits a module, by the name of its class and the parts the replacement uses."""
    kind = type(module).__name__
    if kind not in _FORWARDS or not all(hasattr(module, part) for part in _PARTS[kind]):
        return None
    if kind == "XCLIPMLP" and type(module.activation_fn).__name__ != "QuickGELUActivation":
        return None
    return kind


def _norm(x: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x if residual is None else x.to(residual.dtype)
    return layer_norm(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)


@dataclass(frozen=True)
class _Projections:
    """What a block multiplies with before it attends, however its weights are kept.

    Attributes:
        messages: class tokens (B, T, D) to messages of that shape.
        rows: normed tokens (F, S, D) and messages (F, D) to what ``frame_attention`` takes: queries, keys and values
            side by side (F, S, 3 D), and keys and values (F, 2 D) of the messages.
    """

    messages: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _packed(
    block: Any, norm: nn.LayerNorm, message_weights: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]
) -> _Projections:
    """By weights (3 D, D) and biases of queries, keys and values together, as the kernels read them."""
    weight, bias = weights
    width = weight.shape[1]

    def messages(class_tokens: Tensor) -> Tensor:
        return message_attention(
            class_tokens,
            block.message_fc.weight,
            block.message_fc.bias,
            block.message_ln.weight,
            block.message_ln.bias,
            *message_weights,
            block.message_attn.out_proj.weight,
            block.message_attn.out_proj.bias,
            block.message_attn.num_heads,
            eps=block.message_ln.eps,
        )

    def rows(normed: Tensor, messages: Tensor) -> tuple[Tensor, Tensor]:
        message_kv = message_key_value(messages, norm.weight, norm.bias, weight[width:], bias[width:], eps=norm.eps)
        return linear(normed, weight, bias), message_kv

    return _Projections(messages, rows)


def _joined(layers: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear layers as one; a copy of all their numbers a call, so that training sees them."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _projections(attention: Any) -> tuple[nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _separate(block: Any, norm: nn.LayerNorm, message_attn: Any, attn: Any) -> _Projections:
    """By a module for each of queries, keys and values: without a kernel, a copy of the weights would cost the most."""

    def messages(class_tokens: Tensor) -> Tensor:
        # in rows: of a view with more dimensions PyTorch makes a slower product
        message: Tensor = block.message_fc(class_tokens.flatten(0, -2)).view(class_tokens.shape)
        return message + message_attn(block.message_ln(message))[0]

    def rows(normed: Tensor, messages: Tensor) -> tuple[Tensor, Tensor]:
        # one product for both: with a message a frame, one of its own takes almost as long
        both = torch.cat([normed.flatten(0, 1), _norm(messages, norm)[0]])
        found = _side_by_side(both, _projections(attn))
        tokens, last = found.tensor_split([len(both) - len(messages)])
        return tokens.view(*normed.shape[:-1], -1), last[:, normed.shape[-1] :]

    return _Projections(messages, rows)


def _side_by_side(rows: Tensor, layers: tuple[nn.Linear, ...]) -> Tensor:
    """What linear layers make of rows (R, D), in the columns of one tensor."""
    plain = all(_is_plain(layer) for layer in layers)
    if plain and rows.dtype in (torch.bfloat16, torch.float16):
        # one wide product is faster by more than the copy costs
        return linear(rows, *_joined(layers))
    recorded = torch.is_grad_enabled() or torch.is_autocast_enabled(rows.device.type) or torch.compiler.is_compiling()
    if not plain or recorded:
        return torch.cat([layer(rows) for layer in layers], dim=-1)
    widths = [layer.out_features for layer in layers]
    out = rows.new_empty(len(rows), sum(widths))
    for layer, columns in zip(layers, out.split(widths, dim=-1), strict=True):
        torch.addmm(layer.bias, rows, layer.weight.t(), out=columns)
    return out


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does no more than multiply with its own weight and add its bias."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    replaced = "forward" in vars(layer)
    return (
        type(layer) is nn.Linear and type(layer.weight) is type(layer.bias) is nn.Parameter and not (hooked or replaced)
    )


def _cross_frame_block(
    tokens: Tensor,
    frames: int,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    project: _Projections,
    attn: Any,
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    """The block over (B * T, S, D), whatever its parts are called."""
    if tokens.shape[0] % frames:
        raise ValueError(
            f"the model was built for clips of {frames} frames, found {tokens.shape[0]} frames in the batch: "
            "give whole clips of that length, or build the model for another"
        )
    normed, stream = _norm(tokens, norms[0])
    messages = project.messages(tokens[:, 0].unflatten(0, (-1, frames))).flatten(0, 1)
    mixed = frame_attention(*project.rows(normed, messages), attn.num_heads)
    normed, stream = _norm(attn.out_proj(mixed), norms[1], stream)
    return stream + mlp(normed)


def _huggingface_block(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    dropping = self.training and (self.self_attn.dropout or getattr(self.drop_path, "drop_prob", 0.0))
    if attention_mask is not None or kwargs.get("output_attentions") or dropping:
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
    norm, attn, message_attn = self.layer_norm1, self.self_attn, self.message_attn
    refusal = attention_refusal(hidden_states.shape[-1], message_attn.num_heads)
    read = *_projections(message_attn), *_projections(attn), self.message_fc, message_attn.out_proj
    plain = all(_is_plain(layer) for layer in read)
    if plain and choose("message_attention", None, hidden_states, refusal=refusal) == "triton":
        project = _packed(self, norm, _joined(_projections(message_attn)), _joined(_projections(attn)))
    else:
        project = _separate(self, norm, message_attn, attn)
    return _cross_frame_block(hidden_states, self.num_frames, (norm, self.layer_norm2), project, attn, self.mlp)


def _huggingface_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    return feed_forward(hidden_states, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def _huggingface_cross_attention(self: Any, queries: Tensor, keys: Tensor, values: Tensor, **kwargs: Any) -> Tensor:
    if self.training and (self.attn_drop or self.proj_drop.p):
        return type(self).forward(self, queries, keys, values, **kwargs)
    return self.proj(prompt_attention(self.q_proj(queries), self.k_proj(keys), self.v_proj(values), self.num_heads))


def _official_block(self: Any, x: Tensor) -> Tensor:
    if self.training and getattr(self.drop_path, "drop_prob", 0.0):
        return type(self).forward(self, x)
    weights = self.attn.in_proj_weight, self.attn.in_proj_bias
    message_weights = self.message_attn.in_proj_weight, self.message_attn.in_proj_bias
    tokens = _cross_frame_block(
        x.transpose(0, 1),
        self.T,
        (self.ln_1, self.ln_2),
        _packed(self, self.ln_1, message_weights, weights),
        self.attn,
        lambda normed: feed_forward(
            normed, self.mlp.c_fc.weight, self.mlp.c_fc.bias, self.mlp.c_proj.weight, self.mlp.c_proj.bias
        ),
    )
    # back to the official order (S, B * T, D); the next block undoes it without a copy
    return tokens.transpose(0, 1)


def _official_cross_attention(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if self.training and (self.attn_drop.p or self.proj_drop.p):
        return type(self).forward(self, q, k, v)
    return self.proj(prompt_attention(self.q_proj(q), self.k_proj(k), self.v_proj(v), self.num_heads))


_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "XCLIPVisionEncoderLayer": _huggingface_block,
    "XCLIPMLP": _huggingface_mlp,
    "XCLIPCrossAttention": _huggingface_cross_attention,
    # spelled as upstream spells them
    "CrossFramelAttentionBlock": _official_block,
    "MulitHeadAttention": _official_cross_attention,
}
_MESSAGE = ("message_fc", "message_ln", "message_attn", "mlp", "drop_path")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "proj", "attn_drop", "proj_drop", "num_heads")
_PARTS: dict[str, tuple[str, ...]] = {
    "XCLIPVisionEncoderLayer": ("self_attn", "layer_norm1", "layer_norm2", "num_frames", *_MESSAGE),
    "XCLIPMLP": ("fc1", "fc2", "activation_fn"),
    "XCLIPCrossAttention": _PROJECTIONS,
    "CrossFramelAttentionBlock": ("attn", "ln_1", "ln_2", "T", *_MESSAGE),
    "MulitHeadAttention": _PROJECTIONS,
}
