"""Faults of the Triton kernels and of the extension in C++."""

# ruff: noqa: E501 texts of the sources are not broken

from __future__ import annotations

from benchmarks.mutants.fault import Fault, Maker, in_room


def _kernel(stem: str, *tests: str) -> Maker:
    return in_room(f"kernels/{stem}.py", *(tests or (f"tests/ops/test_{stem}.py",)))


EPS = "tests/ops/test_eps.py"


_norm, _rows, _logits = _kernel("layer_norm"), _kernel("quantize_rows"), _kernel("clip_logits")
_attention, _backward = _kernel("frame_attention"), _kernel("frame_attention_bwd", "tests/ops/test_frame_attention.py")
_message, _gelu = _kernel("message_attention"), _kernel("linear_quick_gelu")
_mean, _patches, _prompts = (
    _kernel("mean_norm_over_frames"),
    _kernel("patch_embed", "tests/ops/test_patch_embed_kernel.py", "tests/ops/test_patch_embed.py"),
    _kernel("prompt_attention"),
)
_skinny = _kernel("skinny_linear", "tests/ops/test_message_attention.py", "tests/ops/test_temporal_block.py")
_folded, _frame = _kernel("folded_message"), _kernel("_frame_rows", "tests/ops/test_frame_attention.py")
_head = _kernel("frame_attention_head")

KERNELS: list[Fault] = [
    _norm("layer_norm's kernel ignores eps", "axis=1) / WIDTH + eps)", "axis=1) / WIDTH + 1e-5)", EPS),
    _norm(
        "layer_norm's variance has the padding in it",
        "centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
    ),
    _norm(
        "layer_norm's kernel adds no residual's gradient",
        "grad_x += tl.load(grad_stream, mask=inside, other=0.0).to(tl.float32)",
        "grad_x += 0.0",
    ),
    _norm(
        "layer_norm's stream has the constant",
        "        tl.store(stream_ptr + out, x.to(stream_ptr.dtype.element_ty), mask=inside)\n    if HAS_CONSTANT:\n        x += tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]",
        "        if HAS_CONSTANT:\n            x += tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]\n        tl.store(stream_ptr + out, x.to(stream_ptr.dtype.element_ty), mask=inside)",
    ),
    _norm(
        "layer_norm's last partial sums are left out",
        "return grad_x, partial.sum(0)",
        "return grad_x, partial[: max(1, programs - 1)].sum(0)",
    ),
    _rows(
        "quantize_rows' scale is of the row without its sign",
        "largest = tl.max(tl.abs(x), axis=1)",
        "largest = tl.max(x, axis=1)",
    ),
    _rows(
        "quantize_rows' kernel divides by zero",
        "tl.where(largest > SMALLEST, tl.div_rn(largest, E4M3_MAX), 1.0)",
        "tl.div_rn(largest, E4M3_MAX)",
    ),
    _rows("quantize_rows' GELU has no error function", "tl.erf(x * SQRT_HALF)", "tl.erf(x)"),
    _logits("clip_logits' kernel divides by a length of zero", "tl.where(length < TINY, TINY, length)", "length"),
    _logits(
        "clip_logits' kernel sums the gradient over one video", "grad_text += grad_texts", "grad_text = grad_texts"
    ),
    _logits("clip_logits' programs share a residual", "residual_ptr + batch * residual_batch_stride", "residual_ptr"),
    _attention(
        "frame_attention forgets what it has summed",
        "total = total * decay + tl.sum(weights, axis=1)",
        "total = total + tl.sum(weights, axis=1)",
    ),
    _attention(
        "frame_attention sees the padding",
        'scores = tl.where(valid[None, :], scores, -float("inf"))',
        "scores = scores",
    ),
    _attention("frame_attention's log-sum-exp is natural", "highest + tl.log2(total)", "highest + tl.log(total)"),
    _attention(
        "frame_attention's last block of queries is one short",
        "return Side(block, body, tail) if tail < block",
        "return Side(block, body, tail) if tail <= block",
        equivalent="a tail as large as a block computes the same rows in one masked tile more",
    ),
    _head(
        "the kernel that keeps keys sees the padding",
        'tail_scores = tl.where(valid[None, :], tail_scores, -float("inf"))',
        "tail_scores = tail_scores",
    ),
    _head(
        "the kernel that keeps keys takes the peak of two pieces",
        "peak = tl.maximum(peak, tl.max(tail_scores, axis=1)) * SCALE",
        "peak = peak * SCALE",
        equivalent="the peak only keeps powers finite: any shift near it gives the same weights",
    ),
    _frame(
        "the message stands one row late",
        "rows = tl.where(lane == TOKENS - BODY, message_ptr, rows)",
        "rows = tl.where(lane == TOKENS - BODY + 1, message_ptr, rows)",
    ),
    _frame("the tail has a key too many", "lane <= TOKENS - BODY\n", "lane <= TOKENS - BODY + 1\n"),
    _backward(
        "queries' gradient lacks delta",
        "grad_scores = weights * (grad_weights - delta[:, None])",
        "grad_scores = weights * grad_weights",
    ),
    _backward(
        "keys' gradient has queries past the end",
        "weights = tl.where(inside[None, :], weights, 0.0)",
        "weights = weights",
        equivalent="what it is multiplied by, the gradients of queries past the end, are loaded as zeros, and their scores and log-sum-exp are zero",
    ),
    _backward(
        "keys' gradient lacks its scale", "return grad_key * HEAD_DIM**-0.5, grad_value", "return grad_key, grad_value"
    ),
    _message(
        "a ragged clip is longer than its bound", "length = tl.minimum(last - first, longest)", "length = last - first"
    ),
    _message("a frame beyond the clip spoils it", "value = tl.where(in_clip[:, None], value, 0.0)", "value = value"),
    _message(
        "clips see the frames behind them",
        'scores = tl.where((in_clip | (frame == 0))[None, :], scores, float("-inf"))',
        "scores = scores",
    ),
    _message(
        "long clips do not shrink what they have summed",
        "attended = attended * shrink[:, None]",
        "attended = attended * 1.0",
    ),
    _gelu(
        "QuickGELU's kernel has GELU's slope in its gradient",
        "grad *= sigmoid + 1.702 * pre",
        "grad *= sigmoid + 1.7 * pre",
    ),
    _gelu(
        "QuickGELU's kernel leaves rows out of the sums of its gradient",
        "sums += grad",
        "sums = grad",
    ),
    _gelu(
        "linear_quick_gelu's last step reads past the row",
        "x_tile = tl.load(x, mask=k[None, :] < WIDTH - start, other=0.0)",
        "x_tile = tl.load(x, mask=k[None, :] < WIDTH, other=0.0)",
    ),
    _gelu(
        "linear_quick_gelu's rows past the end are not clamped",
        "tl.minimum(row, rows - 1)[:, None] * x_stride",
        "row[:, None] * x_stride",
    ),
    _mean(
        "mean_norm's frames past the last count",
        "total += tl.sum(tl.where(inside, normalised, 0.0), axis=0)",
        "total += tl.sum(normalised, axis=0)",
    ),
    _mean(
        "mean_norm divides its bias", "out = total / frames * weight + bias", "out = (total * weight + bias) / frames"
    ),
    _mean(
        "mean_norm's residual has the strides of the tokens",
        "added = _patch_rows(residual_ptr, patch, patches, residual_batch_stride, residual_patch_stride)\n    total",
        "added = _patch_rows(residual_ptr, patch, patches, batch_stride, patch_stride)\n    total",
    ),
    _patches(
        "patch rows swap the channels' factors",
        "tl.where(channel == 1, scale_green, scale_blue)",
        "tl.where(channel == 1, scale_blue, scale_green)",
    ),
    _patches(
        "patch rows leave the filling as it is",
        "x = tl.where(in_patch, x.to(tl.float32) * scale[:, None] + shift[:, None], 0.0)",
        "x = x.to(tl.float32) * scale[:, None] + shift[:, None]",
        equivalent="the weights of the filling are zeros, and what it holds is finite",
    ),
    _patches("patch_embed's kernel ignores eps", "axis=1) / WIDTH + eps)", "axis=1) / WIDTH + 1e-5)", EPS),
    _prompts(
        "prompt_attention's gradient has classes past the end",
        'mask=row < classes, other=float("inf"))',
        "mask=row < classes, other=0.0)",
        equivalent="their gradients are loaded as zeros: whatever they weigh adds nothing",
    ),
    _prompts(
        "prompt_attention's shared query moves on",
        "query.stride(0) if query.shape[0] == batch else 0",
        "query.stride(0)",
    ),
    _prompts(
        "prompt_attention's gradient sees the padding",
        "weights = tl.where((patch < PATCHES)[None, :], weights, 0.0)",
        "weights = weights",
        equivalent="keys past the end are loaded as zeros, which the weights are multiplied by",
    ),
    _skinny("skinny_linear ignores eps", "axis=1) / WIDTH + eps)", "axis=1) / WIDTH + 1e-5)", EPS),
    _skinny(
        "skinny_linear adds the residual before the activation",
        "if QUICK_GELU:\n",
        "if QUICK_GELU and not HAS_RESIDUAL:\n",
        equivalent="no launch has both",
    ),
    _skinny("skinny_linear pools over a frame too few", "axis=1) / POOL\n", "axis=1) / (POOL - 1)\n"),
    _folded(
        "folded_message's kernel sees the frames behind a clip",
        'scores = tl.where(in_clip[None, :], scores, float("-inf"))',
        "scores = scores",
    ),
    _folded(
        "folded_message's kernel takes one eps for both norms",
        "pair_shift.contiguous(), 1, 2, pair_eps)",
        "pair_shift.contiguous(), 1, 2, eps)",
        EPS,
    ),
]

_CSRC = "tests/csrc/test_sanitized_cpu_code.py"
_bytes = in_room("csrc/int8_rows_cpu.cpp", "tests/engine/test_engine_linears.py", _CSRC)
_linear = in_room("csrc/linear_kernel.h", "tests/engine/test_engine_linears.py", _CSRC)
_heads = in_room(
    "csrc/frame_attention_cpu.cpp",
    "tests/engine/test_engine_attention.py",
    "tests/ops/test_attention_extension.py",
    _CSRC,
)
_embed = in_room("csrc/patch_embed_cpu.cpp", "tests/ops/test_patch_embed.py", _CSRC)

EXTENSION: list[Fault] = [
    _bytes("bytes are cut, not rounded", "const float offset = zero + 0.5f;", "const float offset = zero;"),
    _bytes(
        "a NaN among bytes is not seen",
        "return spoilt == 0.0f ? Range{low, high} : Range{nan, nan};",
        "return Range{low, high};",
    ),
    _linear("a packed linear forgets its stream", "if (!finish.first || finish.add)", "if (!finish.first)"),
    _linear(
        "a packed linear starts anew at each block",
        "const Finish finish{from == 0, work.add,",
        "const Finish finish{true, work.add,",
    ),
    _linear("a packed linear adds its bias to each block", "last && work.bias ? bias", "work.bias ? bias"),
    _linear(
        "exponents of a packed linear's SiLU are not bounded",
        "x = minimum(broadcast(128.0f), maximum(broadcast(-127.0f), x));",
        "x = minimum(broadcast(64.0f), maximum(broadcast(-127.0f), x));",
    ),
    _heads(
        "the extension's attention sees the padding",
        "_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), tail, _mm512_load_ps(last))",
        "_mm512_load_ps(last)",
    ),
    _heads(
        "the extension's log-sum-exp is natural",
        "found.exponent + std::log2(found.sum)",
        "found.exponent + std::log(found.sum)",
    ),
    _heads(
        "the extension's last queries are left out",
        "for (int64_t first = 0; first < work.queries; first += kRows) {",
        "for (int64_t first = 0; first + kRows <= work.queries; first += kRows) {",
    ),
    _embed(
        "the extension's norm ignores eps",
        "squares / static_cast<Sum>(width) + static_cast<Sum>(work.eps)",
        "squares / static_cast<Sum>(width) + static_cast<Sum>(1e-5)",
    ),
    _embed(
        "weights of the extension are cut, not rounded",
        "static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f))",
        "static_cast<int32_t>(scaled)",
    ),
    _embed(
        "channels of bytes are read one apart",
        "row + c * frames.channel_stride",
        "row + (c + 0) * frames.channel_stride % (3 * frames.channel_stride) * 1 + (c > 1 ? -frames.channel_stride : 0)",
    ),
]
FAULTS = [*KERNELS, *EXTENSION]
