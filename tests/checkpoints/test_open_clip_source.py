"""open_clip models as the base of X-CLIP: the same weights, the same activation, or a reason why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_zoo import randomise
from torch import nn

from xclip_fast import InputError
from xclip_fast.checkpoints import load_model
from xclip_fast.config import CLIP_MEAN, CLIP_STD

open_clip = pytest.importorskip("open_clip")

VISION = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 20, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3}


def clip(
    kind: str = "CLIP", vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any
) -> Any:
    build = getattr(open_clip.model, kind)
    return randomise(build(64, VISION | (vision or {}), TEXT | (text or {}), **options))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_towers_are_the_same(kind: str, quick_gelu: bool):
    theirs = clip(kind, quick_gelu=quick_gelu)
    ours = load_model(theirs, frames=5)
    state = ours.state_dict()
    loaded = {name.removeprefix("text."): tensor for name, tensor in theirs.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())
    assert set(ours.load_report.initialised) == set(state) - set(loaded)
    assert ours.load_report.format == "open_clip"
    config = ours.config
    assert config.activation == ("quick_gelu" if quick_gelu else "gelu")
    assert (config.vision_heads, config.text_heads, config.frames, config.image_size) == (2, 2, 5, 64)
    assert (config.pixel_mean, config.pixel_std) == (CLIP_MEAN, CLIP_STD)
    tokens = torch.randint(1, 100, (4, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_single_frame_without_its_message_is_clip(quick_gelu: bool):
    theirs = clip(quick_gelu=quick_gelu)
    ours = load_model(theirs, dtype=torch.float64)
    for block in ours.visual.transformer.resblocks:
        # the message becomes a copy of nothing: a zero token that the norm keeps at its bias
        nn.init.zeros_(block.message_fc.weight)
        nn.init.zeros_(block.message_fc.bias)
        nn.init.zeros_(block.message_attn.out_proj.weight)
        nn.init.zeros_(block.message_attn.out_proj.bias)
    frames = torch.randn(3, 1, 3, 64, 64, dtype=torch.float64)
    theirs = theirs.double()
    with torch.no_grad():
        expected = theirs.encode_image(frames[:, 0])
        features, _ = ours.visual(frames)
    # one token in eighteen differs, so this only says that the towers agree
    assert torch.nn.functional.cosine_similarity(features[:, 0], expected).min() > 0.9


def test_other_head_and_mlp_sizes():
    theirs = clip(vision={"width": 96, "head_width": 32, "mlp_ratio": 4.9231})
    config = load_model(theirs).config
    assert (config.vision_heads, config.vision_width, config.vision_mlp_width) == (3, 96, 472)


def test_statistics_of_the_weights():
    theirs = clip()
    open_clip.model.set_model_preprocess_cfg(theirs, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "size": 64})
    config = load_model(theirs).config
    assert (config.pixel_mean, config.pixel_std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_state_dict_of_open_clip_is_clip():
    theirs = clip(quick_gelu=True, text={"heads": 1})
    loaded, same = load_model(theirs.state_dict()), load_model(theirs)
    assert loaded.load_report.format == "clip"
    assert loaded.config == same.config


REFUSED = {
    "SigLIP bias": (lambda: clip(init_logit_bias=-10.0), "logits have a bias"),
    "attentional pooling": (lambda: clip(vision={"attentional_pool": True, "attn_pooler_heads": 1}), "class token"),
    "average pooling": (lambda: clip(vision={"pool_type": "avg"}), "not the class token"),
    "no ln_pre": (lambda: clip(vision={"no_ln_pre": True}), "no norm before"),
    "layer scale": (lambda: clip(vision={"ls_init_value": 0.1}), "LayerScale"),
    "layer scale of the text": (lambda: clip(text={"ls_init_value": 0.1}), "LayerScale"),
    "norm of queries": (lambda: clip(vision={"qk_norm": True}), "blocks are not CLIP's"),
    "epsilon": (lambda: clip(vision={"norm_kwargs": {"eps": 1e-6}}), "another epsilon"),
    "epsilon of the text": (lambda: clip(text={"norm_kwargs": {"eps": 1e-6}}), "another epsilon"),
    "tanh": (lambda: clip(vision={"act_kwargs": {"approximate": "tanh"}}), "activation is GELU and gelu"),
    "tanh everywhere": (
        lambda: clip(vision={"act_kwargs": {"approximate": "tanh"}}, text={"act_kwargs": {"approximate": "tanh"}}),
        "activation is GELU",
    ),
    "last token": (lambda: clip(text={"pool_type": "last"}), "end-of-text"),
    "first token": (lambda: clip("CustomTextCLIP", text={"pool_type": "first"}), "end-of-text"),
    "class token in the text": (lambda: clip("CustomTextCLIP", text={"embed_cls": True}), "end-of-text"),
    "no causal mask": (lambda: clip(text={"no_causal_mask": True}), "not causal"),
    "projection with a bias": (lambda: clip(text={"proj_bias": True}), "text_projection"),
    "no projection": (lambda: clip(text={"proj_type": "none"}), "text_projection"),
    "oblong": (lambda: clip(vision={"image_size": (64, 256)}), "not square"),
    "resnet": (lambda: clip(vision={"layers": (1, 1, 1, 1), "width": 32, "image_size": 64}), "ModifiedResNet"),
    "vector logit scale": (lambda: clip(nonscalar_logit_scale=True), r"logit_scale is \(1,\)"),
    "wide text mlp": (lambda: clip(text={"mlp_ratio": 2.0}), "wrong shape"),
    "part of it": (lambda: clip().visual, "VisionTransformer, not a CLIP"),
    "coca": (
        lambda: open_clip.coca_model.CoCa(
            64, {**TEXT, "mlp_ratio": 4}, TEXT, {**VISION, "attentional_pool": True, "attn_pooler_heads": 1}
        ),
        "it is a CoCa, not a CLIP",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clip_is_refused(case: str):
    build, says = REFUSED[case]
    with pytest.raises(InputError, match=says) as caught:
        load_model(build())
    assert str(caught.value).isprintable()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """open_clip's downloads, recorded; each brings a tiny model."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> Any:
        calls.append((name, options))
        return clip(quick_gelu=options["force_quick_gelu"])

    monkeypatch.setattr(open_clip, "create_model", create_model)
    return calls


@pytest.mark.parametrize(
    ("name", "tag", "activation"),
    [
        ("ViT-B-32-quickgelu", "openai", "quick_gelu"),
        ("ViT-B-32", "openai", "quick_gelu"),
        ("ViT-B-32/openai", "openai", "quick_gelu"),
        ("ViT-B-32/laion2b_s34b_b79k", "laion2b_s34b_b79k", "gelu"),
        ("ViT-H-14", "laion2b_s32b_b79k", "gelu"),
    ],
)
def test_names(downloads: list[tuple[str, dict[str, Any]]], name: str, tag: str, activation: str):
    model = load_model(name)
    ((asked, options),) = downloads
    assert asked == name.split("/")[0]
    assert options["pretrained"] == tag
    assert model.config.activation == activation


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B-32/nobody", "no weights 'nobody' of 'ViT-B-32': choose one of openai"),
        ("ViT-B-31", "neither a file nor an open_clip model"),
        ("ViT-S-32-alt", "choose one of -"),
        ("", "neither a file nor an open_clip model"),
    ],
)
def test_unknown_names(downloads: list[tuple[str, dict[str, Any]]], name: str, says: str):
    with pytest.raises(InputError, match=says):
        load_model(name)
    assert not downloads


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(InputError, match="cannot get ViT-B-32/openai: no network at all: give the open_clip model"):
        load_model("ViT-B-32")
