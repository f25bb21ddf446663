"""The cost model against operations that were really counted, on meta tensors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast import VARIANTS, XCLIPConfig
from xclip_fast.flops import count, headline, parameter_parts, parameters
from xclip_fast.reference import XCLIP
from xclip_fast.reference.transformer import attend, split_heads
from xclip_fast.reference.vision import communicate, embed_patches

# exactly as the official modules are counted
GIGA_MACS = {
    ("B/32", 8): 39.012039168,
    ("B/32", 16): 74.990074368,
    ("B/32", 32): 146.953615872,
    ("B/16", 8): 144.909390336,
    ("B/16", 16): 286.630334976,
    ("B/16", 32): 570.07969536,
    ("L/14", 8): 659.053480704,
    ("L/14", 16): 1310.847044352,
    ("L/14", 32): 2614.45363584,
    ("L/14-336", 8): 1541.651368704,
    ("L/14-336", 16): 3075.286862592,
    ("L/14-336", 32): 6142.57731456,
}
PUBLISHED = {
    ("B/32", 8): 39,
    ("B/32", 16): 75,
    ("B/16", 8): 145,
    ("B/16", 16): 287,
    ("B/16", 32): 571,
    ("L/14", 8): 658,
    ("L/14-336", 16): 3086,
}
PARAMETERS = {
    ("B/32", 8): 196_585_729,
    ("B/16", 8): 194_929_153,
    ("L/14", 8): 575_673_601,
    ("L/14-336", 16): 576_007_425,
}
TINY = XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    embed_dim=64,
    text_width=64,
    text_layers=2,
    vocab_size=514,
    frames=4,
)
# sizes that no published model ties to one another
ODD = {
    "tiny": TINY,
    "one of each": dataclasses.replace(
        TINY, image_size=16, vision_layers=1, text_layers=1, prompt_layers=1, frames=1, context_length=1
    ),
    "all different": XCLIPConfig(
        image_size=42,
        patch_size=14,
        vision_width=96,
        vision_layers=3,
        vision_heads=3,
        vision_mlp_width=200,
        embed_dim=80,
        embed_heads=5,
        context_length=13,
        vocab_size=101,
        text_width=72,
        text_layers=2,
        text_heads=2,
        frames=7,
        mit_layers=3,
        prompt_layers=4,
        activation="gelu",
    ),
    "wide text": dataclasses.replace(TINY, text_width=320, context_length=20, embed_dim=192, mit_layers=2),
}
EVERY = {f"{name} x {frames}": VARIANTS[name].with_frames(frames) for name, frames in GIGA_MACS} | ODD
SOME = {name: EVERY[name] for name in ("B/32 x 8", "B/16 x 32", "L/14-336 x 16")} | ODD


def on_meta(config: XCLIPConfig) -> XCLIP:
    with torch.device("meta"):
        return XCLIP(config).requires_grad_(False)


def inputs(config: XCLIPConfig, views: int, classes: int, length: int) -> tuple[Tensor, Tensor]:
    video = torch.empty(views, config.frames, 3, config.image_size, config.image_size, device="meta")
    return video, torch.empty(classes, length, dtype=torch.int64, device="meta")


def counted_parts(model: XCLIP, views: int, classes: int, length: int) -> tuple[int, dict[str, int]]:
    """Operations of the reference, in all and by module."""
    video, tokens = inputs(model.config, views, classes, length)
    with FlopCounterMode(display=False) as counter:
        # the counter names the modules below a module that it sees called
        _ = model(video, tokens) if classes else model.encode_video(video)
    modules = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    patterns = {
        "patch_embed": r"visual\.conv1",
        "cfa": r"visual\.transformer\.resblocks\.\d+\.message_(fc|attn)",
        "ifa": r"visual\.transformer\.resblocks\.\d+\.attn",
        "mlp": r"visual\.transformer\.resblocks\.\d+\.mlp",
        "mit": "mit",
        "prompts": "prompts_generator",
        "text": "transformer",
    }
    parts = {
        part: sum(flops for name, flops in modules.items() if re.fullmatch(rf"XCLIP\.({pattern})", name))
        for part, pattern in patterns.items()
    }
    return counter.get_total_flops(), parts


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_the_official_count_is_what_the_reference_executes(config: XCLIPConfig) -> None:
    total, parts = counted_parts(on_meta(config), 1, 1, config.context_length)
    cost = count(config)
    assert cost.flops == total
    assert cost.flops == 2 * cost.macs == 2 * sum(cost.parts.values())
    # outside the modules are the projections and the logits
    found = {part: macs for part, macs in cost.parts.items() if part in parts}
    found["ifa"] = cost.parts["ifa_projections"] + cost.parts["ifa_attention"]
    found["text"] -= config.text_width * config.embed_dim
    assert {part: 2 * macs for part, macs in found.items()} == parts
    assert not cost.rewrites


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
@pytest.mark.parametrize(("views", "classes"), [(1, 0), (12, 0), (1, 5), (3, 1), (12, 400)])
def test_views_and_classes_count_as_they_execute(config: XCLIPConfig, views: int, classes: int) -> None:
    for length in {1, config.context_length}:
        total, _ = counted_parts(on_meta(config), views, classes, length)
        assert count(config, views=views, classes=classes, text_length=length).flops == total


@pytest.mark.parametrize(("variant", "frames"), GIGA_MACS)
def test_the_table_of_the_official_modules(variant: str, frames: int) -> None:
    assert count(variant, frames).macs == round(GIGA_MACS[variant, frames] * 1e9)


@pytest.mark.parametrize(("variant", "frames"), PUBLISHED)
def test_the_published_numbers_within_one_percent(variant: str, frames: int) -> None:
    assert count(variant, frames).macs / 1e9 == pytest.approx(PUBLISHED[variant, frames], rel=0.01)


@pytest.mark.parametrize(("variant", "frames"), PARAMETERS)
def test_the_parameters_of_the_named_variants(variant: str, frames: int) -> None:
    assert parameters(variant, frames) == count(variant, frames).parameters == PARAMETERS[variant, frames]


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_parameters_are_those_of_the_built_model(config: XCLIPConfig) -> None:
    model = on_meta(config)
    assert parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    patterns = {
        "patch_embed": r"visual\.(conv1|ln_pre|class_embedding|positional_embedding).*",
        "cfa": r"visual\.transformer\..*message_.*",
        "ifa_projections": r"visual\.transformer\.resblocks\.\d+\.(attn|ln_1)\..*",
        "mlp": r"visual\.transformer\.resblocks\.\d+\.(mlp|ln_2)\..*",
        "projection": r"visual\.(ln_post.*|proj)|prompts_visual_.*",
        "mit": r"mit\..*",
        "prompts": r"prompts_generator\..*",
        "logits": "logit_scale",
        "text": r"transformer\..*|token_embedding\..*|positional_embedding|ln_final\..*|text_projection",
    }
    assert parameter_parts(config) == {
        part: sum(p.numel() for name, p in model.named_parameters() if re.fullmatch(pattern, name))
        for part, pattern in patterns.items()
    }


def row_projection(attention: nn.Module, x: Tensor, parts: slice) -> list[Tensor]:
    """Queries (0), keys (1) and values (2) of tokens, those asked for alone."""
    width = x.shape[-1]
    rows = slice(parts.start * width, parts.stop * width)
    packed = linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    return [split_heads(part, attention.heads) for part in packed.chunk(parts.stop - parts.start, dim=-1)]


def fused_video(model: XCLIP, video: Tensor, class_row_alone: bool) -> Tensor:
    """The frame tower with every rewrite: (B, T, S, D), or (B, T, 1, D)."""
    tower, (views, frames) = model.visual, video.shape[:2]
    flat = video.flatten(0, 1)
    x = embed_patches(flat, tower.conv1, tower.class_embedding, tower.positional_embedding, tower.ln_pre)
    x = x.unflatten(0, (views, frames))
    blocks = tower.transformer.resblocks
    for index, block in enumerate(blocks):
        attention = block.attn
        if index == 0:
            head = x.shape[-1] // attention.heads
            extra = [torch.empty(views, frames, attention.heads, 1, head, device="meta")] * 2
        else:
            message = communicate(x[:, :, 0], block.message_fc, block.message_ln, block.message_attn)
            extra = row_projection(attention, block.ln_1(message).unsqueeze(-2), slice(1, 3))
        normed = block.ln_1(x)
        if class_row_alone and index == len(blocks) - 1:
            (query,) = row_projection(attention, normed[:, :, :1], slice(0, 1))
            key_value = row_projection(attention, normed, slice(1, 3))
            x = x[:, :, :1]
        else:
            query, *key_value = row_projection(attention, normed, slice(0, 3))
        key, value = (torch.cat(pair, dim=-2) for pair in zip(key_value, extra, strict=True))
        x = x + attention.out_proj(attend(query, key, value))
        x = x + block.mlp(block.ln_2(x))
    return x


def fused_logits(model: XCLIP, x: Tensor, text: Tensor) -> Tensor:
    """Prompts and logits with every rewrite, from the tower's tokens and the texts (K, E)."""
    patches = model.prompts_visual_ln(x[:, :, 1:]).mean(dim=1) @ model.prompts_visual_proj
    video = model.mit(model.visual.ln_post(x[:, :, 0]) @ model.visual.proj)
    first, *others = model.prompts_generator.decoder
    query = first.cross_attn.q_proj(first.norm1(text))
    attention = first.cross_attn
    key, value = (split_heads(project(patches), attention.heads) for project in (attention.k_proj, attention.v_proj))
    prompts = text + attention.proj(attend(split_heads(query, attention.heads), key, value))
    prompts = prompts + first.mlp(first.norm3(prompts))
    for layer in others:
        prompts = layer(prompts, patches)
    return torch.einsum("be,bke->bk", video, prompts)


@pytest.mark.parametrize("config", SOME.values(), ids=SOME)
@pytest.mark.parametrize(("views", "classes"), [(1, 1), (12, 5), (2, 0)])
def test_the_fused_count_is_what_the_rewritten_model_executes(config: XCLIPConfig, views: int, classes: int) -> None:
    length = min(6, config.context_length)
    model = on_meta(config)
    video, tokens = inputs(config, views, classes, length)
    with FlopCounterMode(display=False) as counter:
        x = fused_video(model, video, class_row_alone=not classes)
        if classes:
            fused_logits(model, x, model.encode_text(tokens))
        else:
            model.mit(model.visual.ln_post(x[:, :, 0]) @ model.visual.proj)
    cost = count(config, views=views, classes=classes, text_length=length, formulation="fused")
    assert cost.flops == counter.get_total_flops()


@pytest.mark.parametrize("classes", [0, 1, 400])
@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_each_rewrite_shows_and_together_they_are_the_difference(config: XCLIPConfig, classes: int) -> None:
    official = count(config, classes=classes, views=3)
    fused = count(config, classes=classes, views=3, formulation="fused")
    assert official.macs - fused.macs == sum(fused.rewrites.values())
    assert len(fused.rewrites) == (5 if classes else 4)
    assert all(saved >= 0 for saved in fused.rewrites.values())
    assert all(macs >= 0 for macs in fused.parts.values())
    assert fused.parts.keys() == official.parts.keys()
    assert fused.parameters == official.parameters


def test_the_shares_of_a_view_of_eight_frames() -> None:
    """As the design of the kernels takes them: where time can be won, and where not."""
    for variant, attention, cfa, patch_embed, cfa_parameters in [
        ("B/32", 0.010, 0.0073, 0.024, 0.18),
        ("B/16", 0.040, 0.0020, 0.0064, 0.18),
        ("L/14", 0.040, 0.0015, 0.0019, 0.22),
    ]:
        cost = count(variant)
        assert cost.parts["ifa_attention"] / cost.macs == pytest.approx(attention, rel=0.06)
        assert cost.parts["cfa"] / cost.macs == pytest.approx(cfa, rel=0.06)
        assert cost.parts["patch_embed"] / cost.macs == pytest.approx(patch_embed, rel=0.06)
        assert parameter_parts(variant)["cfa"] / cost.parameters == pytest.approx(cfa_parameters, rel=0.06)
    cost = count("L/14-336")
    assert cost.parts["ifa_attention"] / cost.macs == pytest.approx(0.085, rel=0.02)


def test_texts_are_spent_once_and_views_multiply_the_rest() -> None:
    one, many = count("B/16", classes=400), count("B/16", classes=400, views=12)
    assert many.parts == {part: macs * (1 if part == "text" else 12) for part, macs in one.parts.items()}
    assert one.parts["text"] == 400 * count("B/16").parts["text"]


def test_frames_and_text_length_have_sensible_defaults() -> None:
    config = VARIANTS["B/16"].with_frames(32)
    assert count(config) == count("B/16", 32) == count("B/16", 32, text_length=77)
    fused = count(config, formulation="fused")
    assert fused == count(config, text_length=10, formulation="fused")
    assert count(config, 8) == count("B/16")


@pytest.mark.parametrize(
    "arguments",
    [
        {"frames": 0},
        {"frames": -8},
        {"classes": -1},
        {"views": 0},
        {"text_length": 0},
        {"text_length": 78},
        {"formulation": "fast"},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        count("B/32", **arguments)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant 'B/8'"):
        count("B/8")


def test_the_headline_figures_hold() -> None:
    rows = {row.what: row for row in headline()}
    assert len(rows) == len(PUBLISHED) + 2
    for (variant, frames), published in PUBLISHED.items():
        row = rows[f"X-CLIP-{variant}, {frames} frames"]
        assert row.published == published
        assert row.official == pytest.approx(published, rel=0.01)
    assert rows["ViViT-H / X-CLIP-L/14, 8 frames"].official == pytest.approx(8316 / 659.053, rel=1e-5)
    assert rows["MTV-H / X-CLIP-L/14, 8 frames"].official == pytest.approx(3706 / 659.053, rel=1e-5)
    assert int(rows["ViViT-H / X-CLIP-L/14, 8 frames"].official) == 12
    assert int(rows["MTV-H / X-CLIP-L/14, 8 frames"].official) == 5
    assert all(row.why and "\n" not in row.why for row in rows.values())


def test_a_headline_explains_what_rounding_does_not() -> None:
    for row in headline():
        if row.why == "published as a whole number":
            assert round(row.official) == row.published
        elif "published as" not in row.why:
            assert round(row.official) != row.published


@pytest.mark.parametrize(("variant", "frames", "claimed"), [("B/16", 32, "571.0"), ("L/14-336", 16, "3085.6")])
def test_five_operations_for_each_softmax_element_give_what_the_headline_says(
    variant: str, frames: int, claimed: str
) -> None:
    model = on_meta(VARIANTS[variant].with_frames(frames))
    elements = 0

    class Elements(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal elements
            if func is torch.ops.aten._softmax.default:
                elements += args[0].numel()
            return func(*args, **(kwargs or {}))

    with Elements():
        model(*inputs(model.config, 1, 1, model.config.context_length))
    assert elements
    total = f"{(count(variant, frames).macs + 5 * elements) / 1e9:.1f}"
    assert total == claimed
    why = next(row.why for row in headline() if row.what == f"X-CLIP-{variant}, {frames} frames")
    assert why.endswith(claimed)
