"""What ``optimize`` puts before the classes of Hugging Face's modules and of those with the official names.

The ``forward`` of each mixin is the fused form of the one it overrides. It takes the same arguments, and falls back to
that one for what it does not support.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xclip_fast.layers.transformer import add_norm
from xclip_fast.ops import (
    feed_forward,
    frame_attention,
    layer_norm,
    message_attention,
    message_key_value,
    prompt_attention,
)
from xclip_fast.ops._backends import choose, host_bound, is_transformed
from xclip_fast.ops._frames import attention_refusal
from xclip_fast.plain import LINEAR, NORM, QUICK_GELU, Plain, is_plain


@dataclass(frozen=True)
class Original:
    """What a patched class stands before.

    Attributes:
        cls: the class the module had.
        forward: that class's ``forward``.
        parts: what the fused form takes the parts of the module for.
    """

    cls: type[nn.Module]
    forward: Any
    parts: dict[str, Plain] = field(compare=False)


class Patched:
    """A module with a fused ``forward`` before that of its class, by which it is pickled."""

    _xclip_fast: Original

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        """What the fused form takes the parts of a module of a class for."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "_xclip_fast" not in vars(cls):
            return reduced
        mixin, base = cls.__bases__
        return _new, (mixin, base), *reduced[2:]


def patched(mixin: type[Patched], base: type[nn.Module]) -> type[nn.Module]:
    """The class of patched modules of a class, under the same name, for those who go by it."""
    return _patched(mixin, base, base.forward)  # type: ignore[arg-type]


@cache
def _patched(mixin: type[Patched], base: type[nn.Module], forward: Any) -> type[nn.Module]:
    original = Original(base, forward, mixin._parts(base))
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), {**names, "_xclip_fast": original})


def unpatched(cls: type) -> type:
    """The class that a patched one stands before, also where another library made a class of the patched one."""
    if "_xclip_fast" in vars(cls):
        return cls.__bases__[1]
    bases = tuple(unpatched(base) if issubclass(base, Patched) else base for base in cls.__bases__)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, names)


def _new(mixin: type[Patched], base: type[nn.Module]) -> nn.Module:
    cls = patched(mixin, base)
    return cls.__new__(cls)


def _is_in_force(module: Any) -> bool:
    """Whether the fused form computes what the module's class does: that one was not replaced, the module not restored.

    For others may keep the bound ``forward`` of a patched module, and call it afterwards.
    """
    return isinstance(module, Patched) and module._xclip_fast.cls.forward is module._xclip_fast.forward


def _original(module: Any) -> Any:
    cls = module._xclip_fast.cls if isinstance(module, Patched) else type(module)
    return cls.forward.__get__(module)


def _drops(module: nn.Module) -> bool:
    """Whether a module drops something at random, by any of the names it is given."""
    return module.training and bool(getattr(module, "drop_prob", 0.0) or getattr(module, "p", 0.0))


def _parts_of(owner: Any) -> dict[str, Plain]:
    parts: dict[str, Plain] = owner._xclip_fast.parts
    return parts


def _are_plain(owner: Any, *names: str) -> bool:
    parts = _parts_of(owner)
    return is_plain(owner, **{name: parts[name] for name in names})


def _joined(attention: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of queries, keys and values as one, copied at each call, so that training sees them."""
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _messages(block: Any, class_tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Messages (B, T, D) of class tokens by packed weights (3 D, D) and biases."""
    return message_attention(
        class_tokens,
        block.message_fc.weight,
        block.message_fc.bias,
        block.message_ln.weight,
        block.message_ln.bias,
        weight,
        bias,
        block.message_attn.out_proj.weight,
        block.message_attn.out_proj.bias,
        block.message_attn.num_heads,
        eps=block.message_ln.eps,
    )


def _rows(normed: Tensor, messages: Tensor, norm: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What ``frame_attention`` takes of normed tokens (F, S, D) and messages (F, D), by packed weights and biases."""
    width = weight.shape[1]
    message_kv = message_key_value(messages, norm.weight, norm.bias, weight[width:], bias[width:], eps=norm.eps)
    return linear(normed, weight, bias), message_kv


def _rows_side_by_side(normed: Tensor, messages: Tensor, norm: Any, attention: Any) -> tuple[Tensor, Tensor]:
    """The same by three GEMMs: without a kernel, a copy of the weights costs the most."""
    normed_messages, _ = layer_norm(messages, norm.weight, norm.bias, eps=norm.eps)
    # for one message a frame, GEMMs of its own take almost as long
    rows = torch.cat([normed.flatten(0, 1), normed_messages])
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    if rows.dtype in (torch.bfloat16, torch.float16):
        # one wide GEMM is faster by more than the copy costs
        found = linear(rows, *_joined(attention))
    elif _is_recorded(rows):
        found = torch.cat([layer(rows) for layer in layers], dim=-1)
    else:
        widths = [layer.out_features for layer in layers]
        found = rows.new_empty(len(rows), sum(widths))
        for layer, columns in zip(layers, found.split(widths, dim=-1), strict=True):
            torch.addmm(layer.bias, rows, layer.weight.t(), out=columns)
    tokens, last = found.tensor_split([len(rows) - len(messages)])
    return tokens.view(*normed.shape[:-1], -1), last[:, normed.shape[-1] :]


def _is_recorded(rows: Tensor) -> bool:
    """Whether autograd, a compiler or a transform records the computation, and so no result may be written in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return True
    return torch.is_autocast_enabled(rows.device.type)


def _check_clips(frames: int, length: int) -> None:
    if frames % length:
        raise ValueError(
            f"the model was built for clips of {length} frames, found {frames} frames in the batch: "
            "give whole clips of that length, or build the model for another"
        )


class XCLIPVisionEncoderLayer(Patched):
    """Hugging Face's block of the vision tower."""

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        attention = Plain(
            *_beside(base, "XCLIPAttention"), q_proj=LINEAR, k_proj=LINEAR, v_proj=LINEAR, out_proj=LINEAR
        )
        drop_path = Plain(nn.Identity, *_beside(base, "XCLIPDropPath"))
        messages = {"message_fc": LINEAR, "message_ln": NORM, "message_attn": attention, "drop_path": drop_path}
        return {**messages, "layer_norm1": NORM, "self_attn": attention, "layer_norm2": NORM}

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        dropout = self.training and getattr(self.self_attn, "dropout", 0.0)
        unserved = attention_mask is not None or dropout or _drops(self.drop_path) or host_bound(hidden_states)
        if not _is_in_force(self) or unserved:
            return _original(self)(hidden_states, attention_mask, **kwargs)
        _check_clips(len(hidden_states), self.num_frames)
        norm, attention, message_attn = self.layer_norm1, self.self_attn, self.message_attn
        class_tokens = hidden_states[:, 0]
        clips = len(class_tokens) // self.num_frames, self.num_frames, -1
        packs = _packs(hidden_states, message_attn)
        if packs and _are_plain(self, *_MESSAGE, "drop_path") and _is_usual(message_attn):
            messages = _messages(self, class_tokens.view(clips), *_joined(message_attn)).flatten(0, 1)
        else:
            message = self.message_fc(class_tokens).view(clips)
            message = message + self.drop_path(message_attn(self.message_ln(message), **kwargs)[0])
            messages = message.flatten(0, 1)
        plain = _are_plain(self, "layer_norm1", "self_attn") and _is_usual(attention)
        if kwargs.get("output_attentions") or not plain:
            extended = torch.cat([hidden_states, messages.unsqueeze(1)], dim=1)
            branch, _ = attention(hidden_states=norm(extended), attention_mask=attention_mask, **kwargs)
            branch, stream = branch[:, :-1], hidden_states
        else:
            normed, stream = layer_norm(hidden_states, norm.weight, norm.bias, eps=norm.eps)
            if packs:
                rows = _rows(normed, messages, norm, *_joined(attention))
            else:
                rows = _rows_side_by_side(normed, messages, norm, attention)
            branch = attention.out_proj(frame_attention(*rows, attention.num_heads))
        normed, stream = add_norm(self, "layer_norm2", stream, branch)
        return stream + self.mlp(normed)


def _is_usual(attention: Any) -> bool:
    """Whether a function of transformers' own attends, and none is recorded that has second derivatives: eager."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    file = sys.modules[type(attention).__module__]
    function = getattr(file, "ALL_ATTENTION_FUNCTIONS", {}).get(name)
    if function is not None:
        return function.__module__.startswith("transformers.")
    return name in (None, "eager") and not torch.is_grad_enabled()


def _packs(tokens: Tensor, attention: Any) -> bool:
    """Whether kernels run, for which weights are joined."""
    heads = getattr(attention, "num_heads", 1)
    refusal = attention_refusal(tokens.shape[-1], heads)
    return choose("message_attention", None, tokens, refusal=refusal) == "triton"


class XCLIPMLP(Patched):
    """Hugging Face's MLP."""

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        return {"fc1": LINEAR, "activation_fn": QUICK_GELU, "fc2": LINEAR}

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _is_in_force(self) or host_bound(hidden_states) or not is_plain(self, **_parts_of(self)):
            return _original(self)(hidden_states)
        return feed_forward(hidden_states, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class XCLIPCrossAttention(Patched):
    """Hugging Face's attention of texts to patches."""

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        return {"proj_drop": _DROPOUT}

    def forward(self: Any, queries: Tensor, keys: Tensor, values: Tensor, **kwargs: Any) -> Tensor:
        dropping = (self.training and self.attn_drop) or _drops(self.proj_drop)
        unserved = dropping or host_bound(queries)
        if not _is_in_force(self) or unserved or not is_plain(self, **_parts_of(self)) or not _is_usual(self):
            return _original(self)(queries, keys, values, **kwargs)
        return _cross_attention(self, queries, keys, values)


def _cross_attention(module: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    query, key, value = module.q_proj(queries), module.k_proj(keys), module.v_proj(values)
    mixed: Tensor = module.proj(prompt_attention(query, key, value, module.num_heads))
    return mixed


class CrossFramelAttentionBlock(Patched):
    """The official block, spelled as upstream spells it; tokens are (S, B T, D)."""

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        norm = Plain(nn.LayerNorm, parameters="weight bias", twin=_WideLayerNorm.forward)
        out_proj = Plain(nn.Linear, NonDynamicallyQuantizableLinear, parameters="weight bias")
        attention = Plain(nn.MultiheadAttention, parameters="in_proj_weight in_proj_bias", out_proj=out_proj)
        mlp = Plain(nn.Sequential, c_fc=LINEAR, gelu=QUICK_GELU, c_proj=LINEAR)
        messages = {"message_fc": LINEAR, "message_ln": norm, "message_attn": attention}
        drop_path = Plain(nn.Identity, *_beside(base, "DropPath"))
        return {**messages, "ln_1": norm, "attn": attention, "ln_2": norm, "mlp": mlp, "drop_path": drop_path}

    def forward(self: Any, x: Tensor) -> Tensor:
        unserved = getattr(self, "attn_mask", None) is not None or _drops(self.drop_path) or host_bound(x)
        if not _is_in_force(self) or unserved or not _are_plain(self, "drop_path"):
            return _original(self)(x)
        _check_clips(x.shape[1], self.T)
        clips, tokens = (-1, self.T), x.transpose(0, 1)
        if _are_plain(self, *_MESSAGE) and _is_simple(self.message_attn):
            weights = self.message_attn.in_proj_weight, self.message_attn.in_proj_bias
            messages = _messages(self, tokens[:, 0].unflatten(0, clips), *weights).flatten(0, 1)
        else:
            message = self.message_fc(x[0].unflatten(0, clips)).transpose(0, 1)
            normed = self.message_ln(message)
            message = message + self.message_attn(normed, normed, normed, need_weights=False)[0]
            messages = message.transpose(0, 1).flatten(0, 1)
        if _are_plain(self, "ln_1", "attn") and _is_simple(self.attn):
            normed, stream = layer_norm(tokens, self.ln_1.weight, self.ln_1.bias, eps=self.ln_1.eps)
            rows = _rows(normed, messages, self.ln_1, self.attn.in_proj_weight, self.attn.in_proj_bias)
            branch = self.attn.out_proj(frame_attention(*rows, self.attn.num_heads))
        else:
            normed = self.ln_1(torch.cat([x, messages.unsqueeze(0)]))
            branch = self.attn(normed, normed, normed, need_weights=False)[0][:-1].transpose(0, 1)
            stream = tokens
        if not _are_plain(self, "ln_2", "mlp"):
            x = (stream + branch).transpose(0, 1)
            return x + self.mlp(self.ln_2(x))
        normed, stream = add_norm(self, "ln_2", stream, branch, _parts_of(self)["ln_2"])
        fc, proj = self.mlp.c_fc, self.mlp.c_proj
        stream = stream + feed_forward(normed, fc.weight, fc.bias, proj.weight, proj.bias)
        # in the official order again; the next block undoes it without a copy
        return stream.transpose(0, 1)


def _is_simple(attention: nn.MultiheadAttention) -> bool:
    """Whether an attention has none of the options that change what it computes from its weights."""
    return not (attention.batch_first or attention.add_zero_attn or (attention.training and attention.dropout))


class MulitHeadAttention(Patched):
    """The official attention of texts to patches, spelled as upstream spells it."""

    @classmethod
    def _parts(cls, base: type[nn.Module]) -> dict[str, Plain]:
        return {"attn_drop": _DROPOUT, "proj_drop": _DROPOUT}

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unserved = _drops(self.attn_drop) or _drops(self.proj_drop) or host_bound(q)
        if not _is_in_force(self) or unserved or not is_plain(self, **_parts_of(self)):
            return _original(self)(q, k, v)
        return _cross_attention(self, q, k, v)


class _WideLayerNorm(nn.LayerNorm):
    """CLIP's norm, in float32 whatever the dtype of the rows, as the fused one sums too."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        normed = super().forward(x.type(torch.float32))
        return normed.type(dtype)


def _beside(base: type[nn.Module], name: str) -> list[Any]:
    """The class that a name stands for in the file that defines another, if any."""
    found = getattr(sys.modules[base.__module__], name, None)
    return [] if found is None else [found]


_MESSAGE = ("message_fc", "message_ln", "message_attn")
_DROPOUT = Plain(nn.Dropout)
MIXINS: tuple[type[Patched], ...] = (
    XCLIPVisionEncoderLayer,
    XCLIPMLP,
    XCLIPCrossAttention,
    CrossFramelAttentionBlock,
    MulitHeadAttention,
)
