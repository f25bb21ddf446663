"""CLIP weights for the towers: OpenAI state dicts, open_clip names and open_clip models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from xclip_fast.checkpoints.reading import state_dict_of
from xclip_fast.checkpoints.sizes import Claim
from xclip_fast.checkpoints.stored import Checkpoint, from_official
from xclip_fast.config import CLIP_MEAN, CLIP_STD
from xclip_fast.errors import InputError, one_line

_WIDEST_OPENAI = 1024  # wider towers of open_clip have heads of other sizes than 64
_BY_HAND = "give the open_clip model itself, or a checkpoint file"


def from_tensors(tensors: Mapping[str, Tensor], where: str) -> Checkpoint:
    """A CLIP state dict with OpenAI's names; heads are taken as width / 64 and the activation as QuickGELU.

    Raises:
        InputError: the tower is wider than OpenAI's, so that the heads can't be told.
    """
    width = tensors["visual.conv1.weight"].shape[0] if "visual.conv1.weight" in tensors else 0
    if width > _WIDEST_OPENAI:
        raise InputError(f"{where}: the heads of a tower of width {width} cannot be told from tensors: {_BY_HAND}")
    checkpoint = Checkpoint(where, "clip", from_official(tensors), _statistics(CLIP_MEAN, CLIP_STD))
    checkpoint.repairs.append("a state dict does not tell the activation: QuickGELU assumed, as OpenAI's models have")
    return checkpoint


def from_name(name: str) -> Checkpoint:
    """The weights of an open_clip model: "ViT-B-32-quickgelu", or "ViT-B-32/laion2b_s34b_b79k" with a training tag.

    Without a tag OpenAI's weights are taken, or else the first ones open_clip lists.

    Raises:
        InputError: open_clip is not installed, has no such model or tag, or can't get the weights.
    """
    model_name, _, tag = name.partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"{name!r} needs open_clip: pip install open_clip_torch, or give a checkpoint file") from error
    if model_name not in open_clip.list_models():
        raise InputError(f"{name!r} is neither a file nor an open_clip model: see open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if (tag and tag not in tags) or not tags:
        raise InputError(f"open_clip has no weights {tag!r} of {model_name!r}: choose one of {', '.join(tags) or '-'}")
    tag = tag or ("openai" if "openai" in tags else tags[0])
    quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu"))
    try:
        model = open_clip.create_model(model_name, pretrained=tag, force_quick_gelu=quick_gelu)
    except Exception as error:  # the download's errors come through as they are
        raise InputError(f"open_clip cannot get {model_name}/{tag}: {one_line(error)}: {_BY_HAND}") from error
    return from_instance(model, f"{model_name}/{tag}")


def from_instance(model: Any, where: str = "the open_clip model") -> Checkpoint:
    """The weights of an open_clip model with plain vision and text transformers.

    Raises:
        InputError: it computes something else than CLIP; the message says what.
    """
    if reason := next(_differences(model), None):
        raise InputError(f"{where} cannot be the base of X-CLIP: {reason}: choose a plain ViT model of open_clip")
    tensors = {name.removeprefix("text."): value for name, value in state_dict_of(model.state_dict(), where).items()}
    vision, text = model.visual.transformer.resblocks, _text_of(model).transformer.resblocks
    preprocessing = getattr(model.visual, "preprocess_cfg", None) or {"mean": CLIP_MEAN, "std": CLIP_STD}
    return Checkpoint(
        where,
        "open_clip",
        from_official(tensors),
        [
            Claim("open_clip", "vision_heads", vision[0].attn.num_heads),
            Claim("open_clip", "text_heads", text[0].attn.num_heads),
            Claim("open_clip", "activation", _activations(model).pop()),
            *_statistics(preprocessing["mean"], preprocessing["std"]),
        ],
    )


def _statistics(mean: Any, std: Any) -> list[Claim]:
    return [Claim("CLIP", "pixel_mean", tuple(mean)), Claim("CLIP", "pixel_std", tuple(std))]


def _text_of(model: Any) -> Any:
    return getattr(model, "text", model)


def _differences(model: Any) -> Iterator[str]:
    """What a model computes otherwise than CLIP does, most telling first; later checks rely on earlier ones."""
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer

    if type(model) not in (CLIP, CustomTextCLIP):
        yield f"it is a {type(model).__name__}, not a CLIP"
    visual: Any = getattr(model, "visual", None)
    text = _text_of(model)
    if type(visual) is not VisionTransformer:
        yield f"its image tower is a {type(visual).__name__}"
    if text is not model and type(text) is not TextTransformer:
        yield f"its text tower is a {type(text).__name__}"
    blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        yield "its blocks are not CLIP's"
    if any(not isinstance(scale, nn.Identity) for block in blocks for scale in (block.ls_1, block.ls_2)):
        yield "its blocks have LayerScale"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        yield "its image feature is not the class token"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "it has no norm before the transformer"
    if visual.grid_size[0] != visual.grid_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        yield "its frames or patches are not square"
    pooling = getattr(text, "text_pool_type", None) or text.pool_type
    if pooling != "argmax" or getattr(text, "cls_emb", None) is not None:
        yield "its text feature is not the end-of-text token"
    if text.attn_mask is None:
        yield "its text tower is not causal"
    if model.logit_bias is not None:
        yield "its logits have a bias, as SigLIP's"
    if any(isinstance(part, nn.LayerNorm) and part.eps != 1e-5 for part in model.modules()):
        yield "its norms have another epsilon than 1e-5"
    if len(names := _activations(model)) != 1 or not names <= {"gelu", "quick_gelu"}:
        yield f"its activation is {' and '.join(sorted(names))}"


def _activations(model: Any) -> set[str]:
    from open_clip.transformer import QuickGELU

    names = set()
    for block in (*model.visual.transformer.resblocks, *_text_of(model).transformer.resblocks):
        part = block.mlp.gelu
        if type(part) is QuickGELU:
            names.add("quick_gelu")
        else:
            names.add("gelu" if type(part) is nn.GELU and part.approximate == "none" else type(part).__name__)
    return names
