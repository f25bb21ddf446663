"""Every exact rewrite of the forward pass, proven equal to the reference in float64.

One function per rewrite: what an inference engine may compute instead of the reference. Its test runs twice, the
second time with every tensor it touches changed, and shows that each of them matters by far more than the limit: a
rewrite that loses one cannot pass. The last test runs all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from configs import SMALL
from numerics import EXACT, assert_within, randomise_parameters, relative_error
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, normalize, silu

from xclip_fast.reference import XCLIP, CrossFrameBlock, MultiframeIntegration, VideoPrompts, VisionTower
from xclip_fast.reference.transformer import SelfAttention, attend, split_heads
from xclip_fast.reference.vision import attend_within_frame, communicate

B, T, S, D, K = 2, 4, SMALL.patches + 1, SMALL.vision_width, 5
VISIBLE = 1e-4  # a change far above any rounding


@pytest.fixture
def model() -> XCLIP:
    return randomise_parameters(XCLIP(SMALL)).double().requires_grad_(False).eval()


@pytest.fixture
def block(model: XCLIP) -> CrossFrameBlock:
    return model.visual.transformer.resblocks[1]


@pytest.fixture
def tokens() -> Tensor:
    # a mean and a scale of their own: faults of a norm hide at mean 0 and deviation 1
    return 2 * torch.randn(B, T, S, D, dtype=torch.float64) + 0.5


@pytest.fixture
def video() -> Tensor:
    return torch.randint(256, (B, T, 32, 32, 3), dtype=torch.uint8)


@pytest.fixture
def texts() -> Tensor:
    """Token ids of five texts, the longest of 9 tokens; the largest id ends a text and zeros follow."""
    ids = torch.zeros(K, SMALL.context_length, dtype=torch.int64)
    for row, length in enumerate((3, 9, 5, 1, 4)):
        ids[row, :length] = torch.randint(1, 62, (length,))
        ids[row, length - 1] = 63
    return ids


def check(
    what: str, reference: Callable[[], Tensor], rewrite: Callable[[], Tensor], involved: Iterable[Tensor]
) -> None:
    """The two agree, each involved tensor moves the result visibly, and they agree again once all have moved."""
    before = reference()
    assert_within(rewrite(), before, EXACT, what=what)
    for tensor in involved:
        tensor += 0.3 * tensor.abs().mean() * torch.randn_like(tensor)
        after = reference()
        assert relative_error(after, before) > VISIBLE, f"{what}: a lost {tuple(tensor.shape)} tensor would not show"
        before = after
    assert_within(rewrite(), before, EXACT, what=what)


def folded_pixels(model: XCLIP) -> tuple[Tensor, Tensor]:
    """Weight and bias of the patch convolution that takes uint8 values: normalisation is in them."""
    mean = torch.tensor(model.config.pixel_mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(model.config.pixel_std, dtype=torch.float64)[:, None, None]
    weight = model.visual.conv1.weight
    return weight / (255 * std), -(weight * mean / std).sum(dim=(1, 2, 3))


def test_parity_pixel_normalisation_folds_into_patch_weights(model: XCLIP, video: Tensor) -> None:
    pixels = video.flatten(0, 1).movedim(-1, 1).double()
    check(
        "normalisation in the patch weights",
        lambda: model.visual.conv1(model.normalise(video).flatten(0, 1)),
        lambda: conv2d(pixels, *folded_pixels(model), stride=SMALL.patch_size),
        [model.visual.conv1.weight],
    )


def test_parity_pixels_centred_at_128(model: XCLIP, video: Tensor) -> None:
    # uint8 - 128 is exact in half precision; the shift moves into the bias
    def rewrite() -> Tensor:
        weight, bias = folded_pixels(model)
        centred = video.flatten(0, 1).movedim(-1, 1).double() - 128
        return conv2d(centred, weight, bias + 128 * weight.sum(dim=(1, 2, 3)), stride=SMALL.patch_size)

    check(
        "pixels centred at 128",
        lambda: model.visual.conv1(model.normalise(video).flatten(0, 1)),
        rewrite,
        [model.visual.conv1.weight],
    )


def key_value(attention: SelfAttention, x: Tensor) -> list[Tensor]:
    """Keys and values of tokens (..., L, D), heads apart, without the queries."""
    packed = linear(x, attention.in_proj_weight[x.shape[-1] :], attention.in_proj_bias[x.shape[-1] :])
    return [split_heads(part, attention.heads) for part in packed.chunk(2, dim=-1)]


def frame_attention(packed: Tensor, message_key: Tensor, message_value: Tensor, heads: int) -> Tensor:
    """IFA without the message's query: packed QKV (B, T, S, 3 D) and the message's key and value in their own tensors
    (..., heads, 1, head_dim) to the heads' outputs (B, T, S, D)."""
    query, key, value = (split_heads(part, heads) for part in packed.chunk(3, dim=-1))
    message_key, message_value = (x.expand(*key.shape[:-2], 1, -1) for x in (message_key, message_value))
    return attend(query, torch.cat([key, message_key], dim=-2), torch.cat([value, message_value], dim=-2))


def test_parity_message_needs_no_query(block: CrossFrameBlock, tokens: Tensor) -> None:
    message = torch.randn(B, T, D, dtype=torch.float64)

    def rewrite() -> Tensor:
        packed = linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
        message_key, message_value = key_value(block.attn, block.ln_1(message).unsqueeze(-2))
        heads = frame_attention(packed, message_key, message_value, block.attn.heads)
        return tokens + block.attn.out_proj(heads)

    check(
        "message: key and value alone",
        lambda: attend_within_frame(tokens, message, block.ln_1, block.attn),
        rewrite,
        [message, *block.ln_1.parameters(), *block.attn.parameters()],
    )


def class_row(tower: VisionTower) -> Tensor:
    """The class token (D,) that enters the first block: the same for every frame of every video."""
    return tower.ln_pre(tower.class_embedding + tower.positional_embedding[0])


def first_message(tower: VisionTower) -> Tensor:
    """The message (D,) of the first block. Attention over T equal messages returns their common value."""
    block = tower.transformer.resblocks[0]
    message = block.message_fc(class_row(tower))
    width = len(message)
    attention = block.message_attn
    value = linear(
        block.message_ln(message), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    )
    return message + attention.out_proj(value)


def test_parity_first_message_is_a_constant(model: XCLIP, video: Tensor) -> None:
    tower, block = model.visual, model.visual.transformer.resblocks[0]

    def reference() -> Tensor:
        frames = model.normalise(video).flatten(0, 1)
        embedded = super(VisionTower, tower).forward(frames).unflatten(0, (B, T))
        message = communicate(embedded[:, :, 0], block.message_fc, block.message_ln, block.message_attn)
        return torch.cat(key_value(block.attn, block.ln_1(message).unsqueeze(-2)), dim=-1)

    def rewrite() -> Tensor:
        constant = torch.cat(key_value(block.attn, block.ln_1(first_message(tower)).unsqueeze(0)), dim=-1)
        return constant.expand(B, T, -1, -1, -1)

    check(
        "first block: constant message",
        reference,
        rewrite,
        [
            tower.class_embedding,
            tower.positional_embedding,
            *tower.ln_pre.parameters(),
            *block.message_fc.parameters(),
            *block.message_ln.parameters(),
            *block.message_attn.parameters(),
            *block.ln_1.parameters(),
            block.attn.in_proj_weight,
            block.attn.in_proj_bias,
        ],
    )


def test_second_message_is_no_constant(model: XCLIP, video: Tensor) -> None:
    class_tokens = []
    model.visual.transformer.resblocks[1].register_forward_pre_hook(lambda _, inputs: class_tokens.append(inputs[0]))
    model.encode_video(video)
    first = class_tokens[0][:1, :1, 0].expand(B, T, -1)
    assert relative_error(class_tokens[0][:, :, 0], first) > VISIBLE


def folded_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection that takes x where it took norm(x): the result is ``rstd(x) * (x W') + b'``.

    The norm's weight scales the columns, its mean is taken out of each row, its bias goes into the bias.
    """
    scaled = weight * norm.weight
    return scaled - scaled.mean(dim=1, keepdim=True), linear(norm.bias, weight, bias)


def rstd(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The reciprocal standard deviation of each row, as the norm takes it."""
    return (x.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()


def project_normed(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(norm(x), weight, bias)`` by folded weights."""
    folded_weight, folded_bias = folded_norm(norm, weight, bias)
    return rstd(x, norm) * linear(x, folded_weight) + folded_bias


@pytest.mark.parametrize("which", ["ln_1 into QKV", "ln_2 into c_fc"])
def test_parity_norm_folds_into_projection(block: CrossFrameBlock, tokens: Tensor, which: str) -> None:
    norm, weight, bias = {
        "ln_1 into QKV": (block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias),
        "ln_2 into c_fc": (block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias),
    }[which]
    check(
        f"norm in the weights: {which}",
        lambda: linear(norm(tokens), weight, bias),
        lambda: project_normed(tokens, norm, weight, bias),
        [norm.weight, norm.bias, weight, bias],
    )


def test_norm_fold_fails_without_centring(block: CrossFrameBlock, tokens: Tensor) -> None:
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    _, folded_bias = folded_norm(block.ln_1, weight, bias)
    uncentred = rstd(tokens, block.ln_1) * linear(tokens, weight * block.ln_1.weight) + folded_bias
    assert relative_error(uncentred, linear(block.ln_1(tokens), weight, bias)) > VISIBLE


def message_and_packed(block: CrossFrameBlock, class_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The message before CFA (B, T, D) and its packed QKV (B, T, 3 D), both from one product with 4 D columns.

    The message's norm cannot be folded as a whole: its scale needs the message itself, row by row.
    """
    attention = block.message_attn
    folded_weight, folded_bias = folded_norm(block.message_ln, attention.in_proj_weight, attention.in_proj_bias)
    both = torch.eye(len(block.message_fc.bias), dtype=folded_weight.dtype)
    both = torch.cat([both, folded_weight])
    product = linear(class_tokens, both @ block.message_fc.weight, both @ block.message_fc.bias)
    message, packed = product.split([class_tokens.shape[-1], folded_weight.shape[0]], dim=-1)
    return message, rstd(message, block.message_ln) * packed + folded_bias


def messages(block: CrossFrameBlock, class_tokens: Tensor) -> Tensor:
    """CFA with the folded product: class tokens (B, T, D) to messages (B, T, D)."""
    message, packed = message_and_packed(block, class_tokens)
    query, key, value = (split_heads(part, block.message_attn.heads) for part in packed.chunk(3, dim=-1))
    return message + block.message_attn.out_proj(attend(query, key, value))


def test_parity_message_product_folds_into_qkv(block: CrossFrameBlock, tokens: Tensor) -> None:
    class_tokens = tokens[:, :, 0]
    check(
        "message_fc and QKV in one product",
        lambda: communicate(class_tokens, block.message_fc, block.message_ln, block.message_attn),
        lambda: messages(block, class_tokens),
        [*block.message_fc.parameters(), *block.message_ln.parameters(), *block.message_attn.parameters()],
    )


def test_message_fold_fails_without_row_scale(block: CrossFrameBlock, tokens: Tensor) -> None:
    class_tokens = tokens[:, :, 0]
    attention = block.message_attn
    folded_weight, folded_bias = folded_norm(block.message_ln, attention.in_proj_weight, attention.in_proj_bias)
    message = block.message_fc(class_tokens)
    truth = linear(block.message_ln(message), attention.in_proj_weight, attention.in_proj_bias)
    one_scale = rstd(message, block.message_ln).mean()
    assert relative_error(one_scale * linear(message, folded_weight) + folded_bias, truth) > VISIBLE


def mlp_by_silu(fc: nn.Linear, projection_weight: Tensor, x: Tensor) -> Tensor:
    """The perceptron without its last bias: 1.702 of QuickGELU is in the weights, so the activation is SiLU."""
    return linear(silu(linear(x, 1.702 * fc.weight, 1.702 * fc.bias)), projection_weight / 1.702)


def test_parity_quick_gelu_folds_into_silu(block: CrossFrameBlock, tokens: Tensor) -> None:
    c_fc, c_proj = block.mlp.c_fc, block.mlp.c_proj
    check(
        "QuickGELU as SiLU",
        lambda: block.mlp(tokens),
        lambda: mlp_by_silu(c_fc, c_proj.weight, tokens) + c_proj.bias,
        block.mlp.parameters(),
    )


def test_quick_gelu_fold_fails_without_its_inverse(block: CrossFrameBlock, tokens: Tensor) -> None:
    c_fc, c_proj = block.mlp.c_fc, block.mlp.c_proj
    half_folded = mlp_by_silu(c_fc, 1.702 * c_proj.weight, tokens) + c_proj.bias
    assert relative_error(half_folded, block.mlp(tokens)) > VISIBLE


def bias_free_stream(blocks: nn.ModuleList, stream: Tensor) -> Tensor:
    """The blocks on ``y = x - C``, where C gathers the biases of out_proj and c_proj, known before the run."""
    offset = torch.zeros(stream.shape[-1], dtype=stream.dtype)
    for block in blocks:
        x = stream + offset
        message = communicate(x[:, :, 0], block.message_fc, block.message_ln, block.message_attn)
        packed = linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        message_key, message_value = key_value(block.attn, block.ln_1(message).unsqueeze(-2))
        heads = frame_attention(packed, message_key, message_value, block.attn.heads)
        stream = stream + linear(heads, block.attn.out_proj.weight)
        offset = offset + block.attn.out_proj.bias
        hidden = block.mlp.gelu(block.mlp.c_fc(block.ln_2(stream + offset)))
        stream = stream + linear(hidden, block.mlp.c_proj.weight)
        offset = offset + block.mlp.c_proj.bias
    return stream + offset


def test_parity_residual_stream_without_biases(model: XCLIP, tokens: Tensor) -> None:
    blocks = model.visual.transformer.resblocks
    check(
        "residual stream without biases",
        lambda: model.visual.transformer(tokens),
        lambda: bias_free_stream(blocks, tokens),
        [bias for block in blocks for bias in (block.attn.out_proj.bias, block.mlp.c_proj.bias)],
    )


def class_row_of_block(block: CrossFrameBlock, tokens: Tensor) -> Tensor:
    """The class row (B, T, D) of a block's output: keys and values of all rows, the rest for one row."""
    message = communicate(tokens[:, :, 0], block.message_fc, block.message_ln, block.message_attn)
    key, value = key_value(block.attn, block.ln_1(torch.cat([tokens, message.unsqueeze(-2)], dim=-2)))
    row, width = tokens[:, :, :1], tokens.shape[-1]
    query = linear(block.ln_1(row), block.attn.in_proj_weight[:width], block.attn.in_proj_bias[:width])
    row = row + block.attn.out_proj(attend(split_heads(query, block.attn.heads), key, value))
    return (row + block.mlp(block.ln_2(row)))[:, :, 0]


def test_parity_last_block_computes_class_row_alone(block: CrossFrameBlock, tokens: Tensor) -> None:
    check(
        "last block: class row alone",
        lambda: block(tokens)[:, :, 0],
        lambda: class_row_of_block(block, tokens),
        [tokens, *block.parameters()],
    )


def mean_patches(model: XCLIP, patches: Tensor) -> Tensor:
    """Patch tokens (B, T, N, D) to mean patch features (B, N, E): the mean over frames before the projection."""
    return model.prompts_visual_ln(patches).mean(dim=1) @ model.prompts_visual_proj


def test_parity_mean_over_frames_before_projection(model: XCLIP, tokens: Tensor) -> None:
    patches = tokens[:, :, 1:]
    check(
        "mean over frames before the projection",
        lambda: (model.prompts_visual_ln(patches) @ model.prompts_visual_proj).mean(dim=1),
        lambda: mean_patches(model, patches),
        [*model.prompts_visual_ln.parameters(), model.prompts_visual_proj],
    )


def test_mean_before_the_norm_is_another_thing(model: XCLIP, tokens: Tensor) -> None:
    patches = tokens[:, :, 1:]
    early = model.prompts_visual_ln(patches.mean(dim=1)) @ model.prompts_visual_proj
    assert relative_error(early, mean_patches(model, patches)) > VISIBLE


def integrate(mit: MultiframeIntegration, features: Tensor) -> Tensor:
    """MIT with the mean over frames taken before the last product: (B, T, E) to (B, E)."""
    x = features + mit.positional_embedding
    for block in mit.resblocks[:-1]:
        x = block(x)
    last = mit.resblocks[-1]
    x = x + last.attn(last.ln_1(x))
    hidden = last.mlp.gelu(last.mlp.c_fc(last.ln_2(x)))
    return (features + x).mean(dim=1) + last.mlp.c_proj(hidden.mean(dim=1))


def test_parity_mit_mean_before_last_product(model: XCLIP) -> None:
    features = 2 * torch.randn(B, T, SMALL.embed_dim, dtype=torch.float64) + 0.5
    check(
        "MIT: mean before the last product",
        lambda: model.mit(features),
        lambda: integrate(model.mit, features),
        [features, *model.mit.parameters()],
    )


def cut(tokens: Tensor) -> Tensor:
    """Token ids up to the longest end of text: causal attention keeps later columns out of what is read."""
    return tokens[:, : tokens.argmax(dim=-1).max() + 1]


def test_parity_text_cut_at_longest_end(model: XCLIP, texts: Tensor) -> None:
    assert cut(texts).shape[1] == 9
    check(
        "text cut at the longest end of text",
        lambda: model.encode_text(texts),
        lambda: model.encode_text(cut(texts)),
        [
            model.token_embedding.weight,
            model.positional_embedding,
            *model.transformer.parameters(),
            *model.ln_final.parameters(),
            model.text_projection,
        ],
    )


def test_text_cut_one_token_earlier_differs(model: XCLIP, texts: Tensor) -> None:
    too_short = model.encode_text(cut(texts)[:, :-1])
    errors = [relative_error(row, truth) for row, truth in zip(too_short, model.encode_text(texts), strict=True)]
    assert errors[1] > VISIBLE
    assert max(errors[:1] + errors[2:]) < EXACT


def first_query(prompts: VideoPrompts, text: Tensor) -> Tensor:
    """The first layer's query (K, E): it depends on the texts alone, so it is made once per class set."""
    layer = prompts.decoder[0]
    return layer.cross_attn.q_proj(layer.norm1(text))


def adapt(prompts: VideoPrompts, text: Tensor, query: Tensor, patches: Tensor) -> Tensor:
    """Texts (K, E) and mean patch features (B, N, E) to adapted texts (B, K, E), with the first query given."""
    patches = prompts.norm(patches)
    first, *others = prompts.decoder
    attention = first.cross_attn
    key, value = (split_heads(project(patches), attention.heads) for project in (attention.k_proj, attention.v_proj))
    x = text + attention.proj(attend(split_heads(query, attention.heads), key, value))
    x = x + first.mlp(first.norm3(x))
    for layer in others:
        x = layer(x, patches)
    return text + prompts.alpha * x


def test_parity_first_prompt_query_depends_on_text_alone(model: XCLIP) -> None:
    prompts = model.prompts_generator
    text = 2 * torch.randn(K, SMALL.embed_dim, dtype=torch.float64) + 0.5
    patches = torch.randn(B, SMALL.patches, SMALL.embed_dim, dtype=torch.float64)
    check(
        "prompts: first query per class set",
        lambda: prompts(text.expand(B, -1, -1), patches),
        lambda: adapt(prompts, text, first_query(prompts, text), patches),
        [text, patches, *prompts.parameters()],
    )


def one_pass_logits(model: XCLIP, video: Tensor, texts: Tensor) -> Tensor:
    """Logits (B, K) from features (B, E) and adapted texts (B, K, E) without a normalised copy of the texts."""
    dot = torch.einsum("be,bke->bk", normalize(video, dim=-1), texts)
    return model.logit_scale.exp() * dot * texts.square().sum(dim=-1).rsqrt()


def test_parity_all_rewrites_at_once(model: XCLIP, video: Tensor, texts: Tensor) -> None:
    tower = model.visual

    def rewrite() -> Tensor:
        pixels = video.flatten(0, 1).movedim(-1, 1).double()
        patches = conv2d(pixels, *folded_pixels(model), stride=SMALL.patch_size).flatten(2).transpose(1, 2)
        patches = tower.ln_pre(patches + tower.positional_embedding[1:])
        stream = torch.cat([class_row(tower).expand(B * T, 1, -1), patches], dim=1).unflatten(0, (B, T))
        offset = torch.zeros(D, dtype=torch.float64)
        for i, block in enumerate(tower.transformer.resblocks):
            x = stream + offset
            # the first message has no axes of videos and frames: it broadcasts
            message = messages(block, x[:, :, 0]) if i else first_message(tower)
            message_key, message_value = key_value(block.attn, block.ln_1(message).unsqueeze(-2))
            packed = project_normed(x, block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias)
            heads = frame_attention(packed, message_key, message_value, block.attn.heads)
            stream = stream + linear(heads, block.attn.out_proj.weight)
            offset = offset + block.attn.out_proj.bias
            normed = block.ln_2(stream + offset)
            stream = stream + mlp_by_silu(block.mlp.c_fc, block.mlp.c_proj.weight, normed)
            offset = offset + block.mlp.c_proj.bias
        x = stream + offset
        features = integrate(model.mit, tower.ln_post(x[:, :, 0]) @ tower.proj)
        text = model.encode_text(cut(texts))
        prompts = model.prompts_generator
        adapted = adapt(prompts, text, first_query(prompts, text), mean_patches(model, x[:, :, 1:]))
        return one_pass_logits(model, features, adapted)

    assert_within(rewrite(), model(video, texts), EXACT, what="all rewrites at once")
