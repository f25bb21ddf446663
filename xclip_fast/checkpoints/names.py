"""Tensor names: the official ones, which are ours, against those of Hugging Face, as one table read both ways.

In the patterns ``{i}`` is a layer number, ``{leaf}`` is weight or bias, and ``{qkv}`` is q, k or v: the official files
hold the three projections stacked in one tensor, Hugging Face holds three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = (
    ("attn.in_proj_{leaf}", "self_attn.{qkv}_proj.{leaf}"),
    ("attn.out_proj.{leaf}", "self_attn.out_proj.{leaf}"),
    ("ln_1.{leaf}", "layer_norm1.{leaf}"),
    ("ln_2.{leaf}", "layer_norm2.{leaf}"),
    ("mlp.c_fc.{leaf}", "mlp.fc1.{leaf}"),
    ("mlp.c_proj.{leaf}", "mlp.fc2.{leaf}"),
)
_MESSAGE = (
    ("message_attn.in_proj_{leaf}", "message_attn.{qkv}_proj.{leaf}"),
    ("message_attn.out_proj.{leaf}", "message_attn.out_proj.{leaf}"),
    ("message_fc.{leaf}", "message_fc.{leaf}"),
    ("message_ln.{leaf}", "message_ln.{leaf}"),
)
_STACKS = (
    ("visual.transformer.resblocks.{i}.", "vision_model.encoder.layers.{i}.", _BLOCK + _MESSAGE),
    ("transformer.resblocks.{i}.", "text_model.encoder.layers.{i}.", _BLOCK),
    ("mit.resblocks.{i}.", "mit.encoder.layers.{i}.", _BLOCK),
)
_SINGLE = (
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.{leaf}", "vision_model.pre_layernorm.{leaf}"),
    ("visual.ln_post.{leaf}", "vision_model.post_layernorm.{leaf}"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.{leaf}", "text_model.final_layer_norm.{leaf}"),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
    ("mit.positional_embedding", "mit.position_embedding"),
    ("prompts_visual_ln.{leaf}", "prompts_visual_layernorm.{leaf}"),
    ("prompts_visual_proj", "prompts_visual_projection"),
    ("prompts_generator.norm.{leaf}", "prompts_generator.layernorm.{leaf}"),
    ("prompts_generator.alpha", "prompts_generator.alpha"),
    ("prompts_generator.decoder.{i}.{prompt}.{leaf}", "prompts_generator.decoder.{i}.{prompt}.{leaf}"),
)
TABLE = _SINGLE + tuple(
    (official + ours, hf + theirs) for official, hf, parts in _STACKS for ours, theirs in parts
)  # (official pattern, Hugging Face pattern)

TRANSPOSED = frozenset({"visual.proj", "text_projection"})  # parameters here, weights of nn.Linear there
QKV = ("q", "k", "v")

# what X-CLIP adds to CLIP
_OWN = re.compile(r"visual\.transformer\.resblocks\.\d+\.message_|mit\.|prompts_")

_FIELDS = {
    "{i}": r"(?P<i>\d{1,9})",
    "{leaf}": r"(?P<leaf>weight|bias)",
    "{qkv}": r"(?P<qkv>[qkv])",
    "{prompt}": r"(?P<prompt>cross_attn\.[qkv]_proj|cross_attn\.proj|norm[13]|mlp\.[03])",
}


def _compile(pattern: str) -> re.Pattern[str]:
    pattern = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
    for field, expression in _FIELDS.items():
        pattern = pattern.replace(field, expression)
    return re.compile(pattern, re.ASCII)


_FROM_OFFICIAL = tuple((_compile(official), hf) for official, hf in TABLE)
_FROM_HF = tuple((_compile(hf), official) for official, hf in TABLE)


def hf_names(official: str) -> tuple[str, ...]:
    """The Hugging Face names of an official tensor: one, or three for a stacked projection.

    Raises:
        KeyError: no such tensor in an X-CLIP model.
    """
    for pattern, template in _FROM_OFFICIAL:
        if found := pattern.fullmatch(official):
            letters = QKV if "{qkv}" in template else ("",)
            return tuple(template.format(**found.groupdict(), qkv=letter) for letter in letters)
    raise KeyError(official)


def official_name(hf: str) -> tuple[str, int] | None:
    """The official name of a Hugging Face tensor and its place in the stack of q, k, v; None for a foreign name."""
    for pattern, template in _FROM_HF:
        if found := pattern.fullmatch(hf):
            fields = found.groupdict()
            return template.format(**fields), QKV.index(fields.get("qkv", "q"))
    return None


def added_to_clip(official: str) -> bool:
    """Whether a tensor belongs to the modules that X-CLIP adds to CLIP, and so starts random."""
    return _OWN.match(official) is not None


def listing(names: Iterable[str], limit: int = 4) -> str:
    """The first few names for an error message, quoted so that a hostile name can't break the line."""
    names = sorted(names)
    shown = ", ".join(repr(name if len(name) <= 80 else name[:77] + "...") for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
