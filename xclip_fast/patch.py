"""Put the fused ops under a model of somebody else: Hugging Face's X-CLIP, or one with the official attribute names.

Single modules of the given instance get a subclass of their class: parameters, state dict, hooks and whatever else
belongs to them stay, and ``restore`` gives the class back.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from xclip_fast.patched import MIXINS, Patched, patched, unpatched
from xclip_fast.plain import QUICK_GELU, refusals

_log = logging.getLogger("xclip_fast")


@dataclass(frozen=True)
class OptimizeReport:
    """What ``optimize`` replaced.

    Attributes:
        replaced, already: the name of each module in the model, and its kind.
        kept: modules that run by themselves as long as they are what they are, by name, and why: adapters, hooks,
            quantised weights, a ``forward`` of another library. What is around them is fused.

    Example:
        >>> from xclip_fast.patch import OptimizeReport
        >>> print(OptimizeReport({"layer.0": "CrossFramelAttentionBlock"}, {}))
        replaced 1 x CrossFramelAttentionBlock
    """

    replaced: dict[str, str]
    already: dict[str, str]
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(self.replaced.values())
        found = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "nothing new"
        lines = [f"replaced {found}" + (f"; {len(self.already)} were replaced before" if self.already else "")]
        for reason, count in sorted(Counter(self.kept.values()).items()):
            names = [name for name, why in self.kept.items() if why == reason]
            lines.append(f"{count} x runs by itself, {reason}: {names[0]}{', ...' if count > 1 else ''}")
        return "\n".join(lines)


def optimize(model: nn.Module) -> OptimizeReport:
    """Run the hot path of a model on the fused ops, in place, for inference and training.

    Whatever is on a module, now or later, counts: adapters, hooks, pruned, quantised or sharded weights, a ``forward``
    of another library. Such a module runs by itself, and the log says so once.

    Args:
        model: ``XCLIPModel`` or ``XCLIPVisionModel`` of transformers 5, a model with the official modules, or a part of
            either. A second call changes nothing more.

    Returns:
        What was replaced, and which modules run by themselves.

    Raises:
        ValueError: nothing in the model can be replaced.

    Example:
        >>> from transformers import XCLIPVisionConfig, XCLIPVisionModel
        >>> from xclip_fast import optimize, restore
        >>> model = XCLIPVisionModel(XCLIPVisionConfig(image_size=32, hidden_size=64, num_hidden_layers=1,
        ...                                            num_attention_heads=1, intermediate_size=64))
        >>> print(optimize(model))
        replaced 1 x XCLIPMLP, 1 x XCLIPVisionEncoderLayer
        >>> restore(model)
        2
    """
    replaced, already, kept = {}, {}, {}
    for name, module in list(model.named_modules()):
        mixin = _mixin(module)
        if mixin is None:
            continue
        kind = mixin.__name__
        if isinstance(module, Patched):
            already[name] = kind
        elif (reason := _refusal(module, kind)) is not None:
            kept[name] = reason
            continue
        else:
            module.__class__ = patched(mixin, type(module))
            replaced[name] = kind
        parts = refusals(module, module._xclip_fast.parts)
        kept |= {f"{name}.{part}".lstrip("."): reason for part, reason in parts.items()}
    if not (replaced or already or kept):
        raise ValueError(
            f"nothing to optimize in {type(model).__name__}: give an X-CLIP of transformers 5.x, or a model with the "
            f"official modules ({', '.join(sorted(mixin.__name__ for mixin in MIXINS))})"
        )
    report = OptimizeReport(replaced, already, kept)
    _log.info("%s", report)
    return report


def restore(model: nn.Module) -> int:
    """Undo ``optimize``: the modules run their classes' own code again. Returns how many were restored.

    Example:
        >>> from xclip_fast import restore
        >>> from torch import nn
        >>> restore(nn.Linear(2, 2))
        0
    """
    restored = 0
    for module in model.modules():
        if isinstance(module, Patched):
            module.__class__ = unpatched(type(module))
            restored += 1
    return restored


def _mixin(module: nn.Module) -> type[Patched] | None:
    """What fits a module, by the name of its class, or of one its class extends, and the parts that are used."""
    names = {cls.__name__ for cls in type(module).__mro__}
    for mixin in MIXINS:
        if mixin.__name__ in names and all(hasattr(module, part) for part in _PARTS[mixin.__name__]):
            return mixin
    return None


def _refusal(module: nn.Module, kind: str) -> str | None:
    """Why a module of a kind cannot be replaced, or nothing."""
    cls = type(module)
    base = next(base for base in cls.__mro__ if base.__name__ == kind)
    if "forward" in vars(module):
        return "it has a forward of its own"
    if cls.forward is not base.forward or base.forward.__module__ != base.__module__:  # type: ignore[attr-defined]
        return f"its class {cls.__module__}.{cls.__qualname__} has another forward"
    if kind == "XCLIPMLP" and not QUICK_GELU.takes(type(module.activation_fn)):
        return f"its activation is {type(module.activation_fn).__name__}"
    return None


_MESSAGE = ("message_fc", "message_ln", "message_attn", "mlp", "drop_path")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "proj", "attn_drop", "proj_drop", "num_heads")
_PARTS: dict[str, tuple[str, ...]] = {
    "XCLIPVisionEncoderLayer": ("self_attn", "layer_norm1", "layer_norm2", "num_frames", *_MESSAGE),
    "XCLIPMLP": ("fc1", "fc2", "activation_fn"),
    "XCLIPCrossAttention": _PROJECTIONS,
    "CrossFramelAttentionBlock": ("attn", "ln_1", "ln_2", "T", *_MESSAGE),
    "MulitHeadAttention": _PROJECTIONS,
}
