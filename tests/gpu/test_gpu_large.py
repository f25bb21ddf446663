"""Tensors of 2^31 elements and more, and batches beyond any grid axis: the same rows again give the same bits again.

A few rows repeated many times fill the tensor, so what a small call gives is the truth for every part of it. On a CPU
the same tests run with a few repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_cases import DEVICE, ON_GPU, check, inputs_of, needs_gpu
from torch import Tensor

from xclip_fast.kernels.clip_logits import clip_logits_bwd, clip_logits_fwd
from xclip_fast.kernels.column_sums import column_sums
from xclip_fast.kernels.frame_attention import frame_attention_fwd
from xclip_fast.kernels.frame_attention_bwd import frame_attention_bwd
from xclip_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from xclip_fast.kernels.linear_quick_gelu import linear_quick_gelu_fwd, quick_gelu_bwd
from xclip_fast.kernels.mean_norm_over_frames import mean_norm_over_frames_bwd, mean_norm_over_frames_fwd
from xclip_fast.kernels.message_attention import message_attention_fwd, message_key_value_fwd
from xclip_fast.kernels.patch_embed import patch_embed_fwd
from xclip_fast.kernels.prompt_attention import prompt_attention_bwd, prompt_attention_fwd
from xclip_fast.kernels.quantize_rows import quantize_rows_fwd
from xclip_fast.kernels.temporal_block import temporal_block_fwd
from xclip_fast.ops.cases import TRAINED

EPS = 1e-5
ELEMENTS = 2**31 + 2**24 if ON_GPU else 2**14
GIB = 2**30


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Every tensor of a test is gone before the next one begins."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def need(gigabytes: float) -> None:
    if ON_GPU and (free := torch.cuda.mem_get_info()[0]) < gigabytes * GIB:
        pytest.skip(f"{gigabytes:g} GiB of the GPU's memory are needed, {free / GIB:.1f} are free")


def made(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, torch.bfloat16)


def times(small: Tensor, largest: int) -> int:
    """How often the small batch fits into a batch whose largest tensor, one of these numbers a row, is full."""
    return -(-ELEMENTS // (largest * len(small)))


def many(small: Tensor, count: int) -> Tensor:
    return small.repeat(count, *[1] * (small.ndim - 1))


def compare(run: Callable[..., tuple[Tensor, ...]], *small: Tensor, largest: int, library: bool = False) -> None:
    """``run`` on batches (n, ...) against itself on many of them; each result has the batch in front.

    The products of a ``library`` may sum in another order where there are more rows: they agree to a rounding.
    """
    wanted = run(*small)
    count = times(small[0], largest)
    found = run(*(many(x, count) for x in small))
    for index, (one, all_of_them) in enumerate(zip(wanted, found, strict=True)):
        rows = len(one)
        assert len(all_of_them) == count * rows
        for part in range(count):
            this = all_of_them[part * rows : (part + 1) * rows]
            distance = (this.float() - one.float()).norm() / one.float().norm()
            same = distance.item() <= 1e-2 if library else torch.equal(this, one)
            assert same, f"result {index}, part {part}"


# rows of a part: large enough that few comparisons do, and a whole number of every tile
PART = 2**16 if ON_GPU else 16


def test_layer_norm() -> None:
    need(24)
    weight, bias = made(768), made(768)
    compare(
        lambda x, residual: layer_norm_fwd(x, weight, bias, residual, None, EPS)[:2],
        made(PART, 768),
        made(PART, 768),
        largest=768,
    )


def test_layer_norm_backward() -> None:
    need(24)
    weight, bias = made(768), made(768)

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        _, stream, mean, rstd = layer_norm_fwd(x, weight, bias, None, None, EPS)
        assert not stream.numel() or stream.shape == x.shape
        return layer_norm_bwd(grad, None, x, weight, None, mean, rstd)[:1]

    compare(run, made(PART, 768), made(PART, 768), largest=768)


def test_quantize_rows() -> None:
    need(24)
    vector = made(768)

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        quantized, scale, stream = quantize_rows_fwd(x, vector, vector, residual, vector, EPS, None)
        return quantized.view(torch.int8), scale, stream

    compare(run, made(PART, 768), made(PART, 768), largest=768)


def test_linear_quick_gelu() -> None:
    need(12)
    weight, bias = made(3072, 768) / 28, made(3072)
    # as many rows as choose the same tiles
    compare(lambda x: linear_quick_gelu_fwd(x, weight, bias, False)[:1], made(PART // 4, 768), largest=3072)


def test_quick_gelu_backward() -> None:
    need(24)
    compare(lambda grad, pre: quick_gelu_bwd(grad, pre, True)[:2], made(PART, 3072), made(PART, 3072), largest=3072)


def test_column_sums() -> None:
    need(6)
    rows = -(-ELEMENTS // 768)
    x = torch.ones(rows, 768, device=DEVICE, dtype=torch.bfloat16)
    # the last row counts, and whole numbers of this size are exact in float32
    x[-1] = 1000
    assert torch.equal(column_sums(x), torch.full((768,), rows + 999.0, device=DEVICE).bfloat16())


def test_frame_attention_forward_and_backward() -> None:
    need(24)

    def run(qkv: Tensor, message_kv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, lse = frame_attention_fwd(qkv, message_kv, 12, True)
        return out, lse, *frame_attention_bwd(grad, qkv, message_kv, out, lse, 12)

    frames = PART // 128 if ON_GPU else 1
    tensors = made(frames, 50, 3 * 768), made(frames, 2 * 768), made(frames, 50, 768)
    compare(run, *tensors, largest=50 * 3 * 768 if ON_GPU else ELEMENTS // 3)


def test_prompt_attention_forward_and_backward() -> None:
    need(24)

    def run(query: Tensor, pair: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        key, value = pair.chunk(2, -1)
        out, lse = prompt_attention_fwd(query, key, value, 8)
        return out, *prompt_attention_bwd(grad, query, key, value, out, lse, 8)

    videos, classes, patches = (128, 400, 49) if ON_GPU else (1, 17, 5)
    tensors = made(videos, classes, 512), made(videos, patches, 1024), made(videos, classes, 512)
    compare(run, *tensors, largest=classes * 512 if ON_GPU else ELEMENTS // 3)


def test_clip_logits_forward_and_backward() -> None:
    need(24)
    text, alpha = made(400 if ON_GPU else 7, 512), made(512)
    scale = torch.tensor(2.0).to(DEVICE, torch.bfloat16)

    def run(video: Tensor, prompts: Tensor) -> tuple[Tensor, ...]:
        logits = clip_logits_fwd(video, text, prompts, alpha, scale, None)
        grad_video, _, grad_prompts = clip_logits_bwd(
            torch.ones_like(logits), video, text, prompts, alpha, scale, None
        )[:3]
        return logits, grad_video, grad_prompts

    videos = 128 if ON_GPU else 2
    compare(run, made(videos, 512), made(videos, len(text), 512), largest=len(text) * 512)


def test_mean_norm_over_frames_forward_and_backward() -> None:
    need(24)
    weight, bias = made(768), made(768)

    def run(tokens: Tensor) -> tuple[Tensor, ...]:
        patches = tokens[:, :, 1:]
        out = mean_norm_over_frames_fwd(patches, weight, bias, None, None, EPS)
        grad = torch.ones_like(out)
        return out, mean_norm_over_frames_bwd(grad, patches, weight, None, None, EPS)[0]

    videos, patches = (128, 50) if ON_GPU else (1, 4)
    compare(run, made(videos, 8, patches, 768), largest=8 * patches * 768 if ON_GPU else ELEMENTS // 3)


def test_class_rows_of_many_tokens() -> None:
    need(12)
    width, heads = 768, 12
    square, vector = made(width, width) / 28, made(width)
    weights = square, vector, vector, vector, many(square, 3), many(vector, 3), square, vector

    def run(tokens: Tensor) -> tuple[Tensor, ...]:
        # more clips than one launch of the fused kernel takes, in the small batch too
        return (message_attention_fwd(tokens[:, :, 0], *weights, None, heads, 8, EPS),)

    clips, rows = (128, 50) if ON_GPU else (17, 2)
    compare(run, made(clips, 8, rows, width), largest=8 * rows * width if ON_GPU else ELEMENTS // 2, library=True)


def test_keys_of_many_messages() -> None:
    need(16)
    weight, bias, norm = made(1536, 768) / 28, made(1536), made(768)
    compare(
        lambda messages: (message_key_value_fwd(messages, norm, norm, weight, bias, EPS),),
        made(PART, 768),
        largest=1536,
        library=True,
    )


def test_more_clips_than_an_axis_of_a_grid() -> None:
    need(12)
    width = 512 if ON_GPU else 64
    square, vector, wide = made(width, width) / 24, made(width), made(4 * width, width) / 24
    attention = vector, vector, many(square, 3), many(vector, 3), square, vector
    perceptron = vector, vector, wide, many(vector, 4), wide.t().contiguous(), vector

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return (temporal_block_fwd(x, *attention, *perceptron, None, None, None, width // 64, 8, EPS),)

    clips = 2**12 if ON_GPU else 17
    compare(run, made(clips, 8, width), largest=8 * width * (8 if ON_GPU else 4), library=True)


def test_bytes_up_to_the_limit() -> None:
    need(12)
    width, patch, side = (768, 32, 224) if ON_GPU else (16, 4, 8)
    weight, vector = made(width, 3, patch, patch) / 55, made(width)
    positions = made(1 + (side // patch) ** 2, width)
    small = torch.randint(0, 256, (128 if ON_GPU else 2, side, side, 3), dtype=torch.uint8).to(DEVICE)
    affine = [[0.02] * 3, [-1.5] * 3]
    # the op refuses frames of 2^31 bytes: as many as it takes
    compare(
        lambda frames: (
            patch_embed_fwd(frames, weight, vector, positions, vector, vector, EPS, affine, torch.bfloat16)[0],
        ),
        small,
        largest=side * side * 3 * 11 // 10,
        library=True,
    )


@needs_gpu
@pytest.mark.parametrize(("variant", "batch"), [("B/32", 64), ("L/14", 8)])
@pytest.mark.parametrize("op", TRAINED)
def test_parity_of_large_batches(op: str, variant: str, batch: int) -> None:
    need(16)
    check(op, inputs_of(op, variant, "bfloat16", batch=batch), "bfloat16", f"x{batch}")
