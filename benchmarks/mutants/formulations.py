"""Faults of the torch formulations and of what joins them to autograd."""

from __future__ import annotations

from benchmarks.mutants.fault import Fault, Maker, in_room

# what the kernels compute is another matter
_COMMON = (
    "-k",
    "formulation or registered or without_kernels or leak or padding_frames or loop or zero or definition or modules "
    "or stream or half_precision or residual or test_constant or torch_does or are_read or left_as or eps "
    "or test_dtypes or log_sum_exp or exact_gradients",
)


def _op(stem: str, *tests: str) -> Maker:
    own = f"tests/ops/test_{stem.lstrip('_')}.py"
    return in_room(f"xclip_fast/ops/{stem}.py", own, "tests/ops/test_eps.py", *tests, *_COMMON)


_norm, _logits, _mean = _op("layer_norm"), _op("clip_logits"), _op("mean_norm_over_frames")
_prompts, _attention, _gelu = _op("prompt_attention"), _op("frame_attention"), _op("linear_quick_gelu")
_message, _block, _patches = (
    _op("message_attention"),
    _op("temporal_block"),
    _op("patch_embed", "tests/ops/test_patch_embed_contract.py"),
)
_linear = in_room("xclip_fast/ops/_norm_linear.py", "tests/ops/test_norm_linear.py")
_again = in_room("xclip_fast/ops/_norm_linear_torch.py", "tests/ops/test_norm_linear.py", "-k", "torch")
_folded, _rows = _op("_folded_message"), _op("_quantize_rows")
_frames = in_room(
    "xclip_fast/ops/_frames.py", "tests/ops/test_message_attention.py", "tests/ops/test_temporal_block.py", *_COMMON
)
_dtypes = in_room(
    "xclip_fast/ops/_dtypes.py",
    "tests/ops/test_dtypes.py",
    "tests/ops/test_layer_norm.py",
    "tests/ops/test_clip_logits.py",
)

FAULTS: list[Fault] = [
    _norm(
        "layer_norm's torch form ignores eps",
        "weight.to(x.dtype), bias.to(x.dtype), eps)",
        "weight.to(x.dtype), bias.to(x.dtype))",
    ),
    _norm(
        "layer_norm's torch form leaves the constant out",
        "shifted = stream if constant is None else stream + constant.to(x.dtype)",
        "shifted = stream",
    ),
    _norm("layer_norm's saved deviation ignores eps", "(variance + eps).rsqrt()", "(variance + 1e-5).rsqrt()"),
    _norm(
        "layer_norm's saved deviation is of a sample",
        "torch.var_mean(shifted, dim=-1, correction=0)",
        "torch.var_mean(shifted, dim=-1, correction=1)",
    ),
    _norm(
        "layer_norm's saved statistics lack the constant",
        "shifted = (stream if constant is None else stream + constant)",
        "shifted = stream",
    ),
    _norm(
        "layer_norm's gradient lacks the constant",
        "rows = rows if constant is None else rows + constant",
        "rows = rows",
    ),
    _norm(
        "layer_norm's gradient lacks the stream's",
        "grad_x = grad_x if grad_stream is None else grad_x + grad_stream",
        "grad_x = grad_x",
    ),
    _norm(
        "layer_norm's gradient of the constant has the stream's in it",
        "grad_constant = grad_x.sum(0)",
        "grad_constant = (grad_x if grad_stream is None else grad_x + grad_stream.reshape(grad_x.shape)).sum(0)",
    ),
    _norm(
        "layer_norm's weight and bias gradients change places",
        "(grad * normalised).sum(0), grad.sum(0), grad_constant",
        "grad.sum(0), (grad * normalised).sum(0), grad_constant",
    ),
    _norm(
        "layer_norm's residual has no gradient",
        "grad_residual = grad_x if ctx.has_residual else None",
        "grad_residual = None",
    ),
    _norm(
        "layer_norm's sums in half precision",
        "exact = mean.dtype",
        "exact = stream.dtype",
        "tests/ops/test_without_kernels.py",
        equivalent="rows and gradients are in half precision, PyTorch sums them in float32: one rounding more",
    ),
    _logits(
        "clip_logits leaves the residual out",
        "prompts = prompts.to(exact) if residual is None else prompts.to(exact) + residual",
        "prompts = prompts.to(exact)",
    ),
    _logits(
        "clip_logits divides by a length of zero",
        "lengths = torch.linalg.vector_norm(adapted, dim=-1).clamp_min(1e-12)",
        "lengths = torch.linalg.vector_norm(adapted, dim=-1)",
    ),
    _logits(
        "clip_logits in half precision",
        "exact = exact_dtype(video.dtype)\n    prompts = ",
        "exact = text.dtype\n    prompts = ",
    ),
    _logits("clip_logits' gradient keeps what lies along the text", "(unit - cosine * direction)", "unit"),
    _logits(
        "clip_logits' gradient of alpha lacks the residual",
        "(grad_adapted * prompted).sum((0, 1))",
        "(grad_adapted * prompts).sum((0, 1))",
    ),
    _logits("clip_logits' residual has no gradient", "None if residual is None else grad_prompts", "None"),
    _logits(
        "clip_logits' gradient keeps what lies along the video",
        "(grad_unit - (grad_unit * unit).sum(-1, keepdim=True) * unit) / length",
        "grad_unit / length",
    ),
    _mean(
        "mean_norm's torch form ignores eps",
        "tokens.shape[-1:], weight, bias, eps)",
        "tokens.shape[-1:], weight, bias)",
    ),
    _mean(
        "mean_norm's torch form leaves the constant out",
        "tokens = tokens if constant is None else tokens + constant.to(tokens.dtype)",
        "tokens = tokens",
    ),
    _mean("mean_norm's gradient lacks the constant", "x = x if constant is None else x + constant", "x = x"),
    _mean(
        "mean_norm's gradient ignores eps",
        "mean(-1, keepdim=True) + eps).rsqrt()",
        "mean(-1, keepdim=True) + 1e-5).rsqrt()",
    ),
    _mean("mean_norm's bias has the gradient of one frame", "grad.to(exact).sum((0, 1))]", "spread.sum((0, 1, 2))]"),
    _mean(
        "mean_norm's constant has the gradient of the first frame",
        "grad_tokens.sum((0, 1, 2)).to(constant.dtype)",
        "grad_tokens[:, 0].sum((0, 1)).to(constant.dtype)",
    ),
    _prompts(
        "prompt_attention saves a natural logarithm",
        "lse.expand(key.shape[0], -1, -1) / torch.log(lse.new_full((), 2.0))",
        "lse.expand(key.shape[0], -1, -1).clone()",
    ),
    _prompts(
        "prompt_attention's torch form has another temperature",
        "_join(scaled_dot_product_attention(query, key, value))",
        "_join(scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.45))",
    ),
    _prompts(
        "prompt_attention's shared query has the gradient of one video",
        "grad_query = grad_query.sum(0, keepdim=True)",
        "grad_query = grad_query[:1]",
    ),
    _prompts("prompt_attention's gradient lacks its scale", "keepdim=True)) * scale\n", "keepdim=True))\n"),
    _attention(
        "frame_attention's torch form puts the message first",
        "query, torch.cat([key, message_key], dim=1), torch.cat([value, message_value], dim=1)",
        "query, torch.cat([message_key, key], dim=1), torch.cat([message_value, value], dim=1)",
    ),
    _attention(
        "frame_attention saves a natural logarithm", "logsumexp(dim=-1) * math.log2(math.e)", "logsumexp(dim=-1)"
    ),
    _attention(
        "frame_attention's message has a token's gradient",
        "torch.cat([grad_key[:, tokens], grad_value[:, tokens]], dim=-1)",
        "torch.cat([grad_key[:, tokens - 1], grad_value[:, tokens]], dim=-1)",
    ),
    _attention("frame_attention without a log-sum-exp is trained wrongly", "if not ctx.with_lse:", "if False:"),
    _gelu(
        "feed_forward's first bias lacks the slope",
        "hidden = torch.addmm(fc_bias, rows, fc_weight.T, beta=SLOPE, alpha=SLOPE)",
        "hidden = torch.addmm(fc_bias, rows, fc_weight.T, alpha=SLOPE)",
    ),
    _gelu(
        "feed_forward's first bias lacks the slope in training",
        "x.shape[-1]), fc_weight.T, beta=SLOPE, alpha=SLOPE)",
        "x.shape[-1]), fc_weight.T, alpha=SLOPE)",
        "tests/ops/test_norm_linear.py",
    ),
    _gelu("feed_forward's last bias lacks the slope", "proj_bias * SLOPE) / SLOPE", "proj_bias) / SLOPE"),
    _gelu(
        "QuickGELU's gradient lacks a slope",
        "(sigmoid + SLOPE * pre * sigmoid * (1 - sigmoid))",
        "(sigmoid + pre * sigmoid * (1 - sigmoid))",
    ),
    _gelu(
        "bias of a linear layer has no gradient",
        "ctx.needs_input_grad), grad_bias.to(bias.dtype), None",
        "ctx.needs_input_grad), torch.zeros_like(bias), None",
    ),
    _gelu(
        "bias of the second layer has the gradient of one row",
        "grad_proj_bias = column_sums_op(rows).to(proj_bias.dtype)",
        "grad_proj_bias = column_sums_op(rows[:1]).to(proj_bias.dtype)",
    ),
    _again(
        "the first tokens have no gradient on plain torch",
        "grad_x.select(-2, 0).add_(grad_first)",
        "pass",
    ),
    _again(
        "the first tokens alone have no gradient on plain torch",
        "grad_x = grad_first if grad_x is None else grad_x + grad_first",
        "grad_x = grad_x",
    ),
    _again("the stream has no gradient on plain torch", "total = grad_x.add_(grad_stream)", "total = grad_x"),
    _again(
        "second derivatives on plain torch lack the norm",
        "return linear(torch.layer_norm(stream, norm_weight.shape, norm_weight, norm_bias, eps), *layer)",
        "return linear(torch.layer_norm(stream, norm_weight.shape, norm_weight, norm_bias, eps).detach(), *layer)",
    ),
    _again(
        "rows made again on plain torch are the stream's",
        "_rows(_norm(ctx, stream, parameters)[0]) if needed[4]",
        "_rows(stream) if needed[4]",
    ),
    _again(
        "rows made again for the MLP on plain torch are the stream's",
        "lambda: _rows(_norm(ctx, stream, parameters)[0])",
        "lambda: _rows(stream)",
    ),
    _linear(
        "norms made again have another eps",
        "layer_norm_op(stream, weight, bias, None, None, ctx.eps)[0]",
        "layer_norm_op(stream, weight, bias, None, None, 1e-3)[0]",
    ),
    _linear(
        "a stream's gradient is lost where the branch has none",
        "return grad_stream, grad_stream, None, None",
        "return None, None, None, None",
    ),
    _gelu(
        "linear_quick_gelu's torch form has GELU's slope",
        "pre = linear(x, weight, bias.to(x.dtype))\n    return pre * torch.sigmoid(SLOPE * pre)",
        "pre = linear(x, weight, bias.to(x.dtype))\n    return pre * torch.sigmoid(1.7 * pre)",
        "tests/ops/test_without_kernels.py",
    ),
    _frames("attention among frames ignores eps", "norm_bias.to(rows.dtype), eps)", "norm_bias.to(rows.dtype))"),
    _frames(
        "attention among frames recomputes with another eps",
        "norm_weight, norm_bias, None, None, eps)\n    packed = torch.addmm",
        "norm_weight, norm_bias, None, None, 1e-5)\n    packed = torch.addmm",
    ),
    _frames("a clip sees one frame too many", "inside=(step < length[:, None])", "inside=(step <= length[:, None])"),
    _frames("frames of no clip attend", "rows[self.place].masked_fill(self.outside, 0.0)", "rows[self.place]"),
    _frames(
        "an empty clip has no key",
        "return inside | (torch.arange(self.longest, device=inside.device) == 0)",
        "return inside",
        equivalent="no row is gathered from the places of an empty clip, whatever stands there",
    ),
    _frames(
        "frames of no clip have gradients", "grad_attended = grad_attended.masked_fill(~clips.inside, 0.0)", "pass"
    ),
    _frames(
        "a clip's last frame shows the next clip",
        "torch.minimum(step, (length - 1).clamp(min=0)[:, None])",
        "torch.minimum(step, length.clamp(min=0)[:, None])",
    ),
    _frames(
        "the bound of clips is one short",
        "return min(max(longest, 1), bound)",
        "return min(max(longest - 1, 1), bound)",
    ),
    _frames(
        "gradient among frames lacks the residual",
        "grad_packed @ in_proj_weight, grad, rows",
        "grad_packed @ in_proj_weight, None, rows",
    ),
    _message(
        "message_key_value's torch form ignores eps",
        "norm_weight.to(dtype), norm_bias.to(dtype), eps)",
        "norm_weight.to(dtype), norm_bias.to(dtype))",
    ),
    _message(
        "message_key_value's gradient ignores eps",
        "layer_norm_op(messages, norm_weight, norm_bias, None, None, eps)",
        "layer_norm_op(messages, norm_weight, norm_bias, None, None, 1e-5)",
    ),
    _message(
        "message_attention's first bias has no gradient",
        "grad_message.t() @ rows, grad_message.sum(0)",
        "grad_message.t() @ rows, torch.zeros_like(fc_bias)",
    ),
    _block(
        "temporal_block's torch form ignores the second eps", "norm2_bias.to(x.dtype), eps)", "norm2_bias.to(x.dtype))"
    ),
    _block("positions have the gradient of one video", "grad_x.sum(0)", "grad_x[0]"),
    _block(
        "gradients of a placed block are of one without positions",
        "tensors = [x if positions is None else x + positions, *tensors]",
        "tensors = [x, *tensors]",
    ),
    _block("what is pooled has no gradient", "grad if ctx.pooled else None", "None"),
    _block("pooled gradients are not divided", "(grad / x.shape[1]).unsqueeze(1)", "grad.unsqueeze(1)"),
    _block(
        "temporal_block's gradient ignores the second eps",
        "norm2_weight, norm2_bias, None, None, eps)\n    pre = torch.addmm",
        "norm2_weight, norm2_bias, None, None, 1e-5)\n    pre = torch.addmm",
    ),
    _patches(
        "patch_embed's torch form ignores eps",
        "embedded.shape[-1:], weight, bias, eps)",
        "embedded.shape[-1:], weight, bias)",
    ),
    _patches(
        "patch_embed's gradient ignores eps", "scale.shape, None, None, ctx.eps)", "scale.shape, None, None, 1e-5)"
    ),
    _patches(
        "the class token has no position",
        "(class_embedding.to(wide) + positions[0]).expand",
        "class_embedding.to(wide).expand",
    ),
    _patches(
        "patch_embed's class token has the gradient of a patch",
        "grad_positions[0].to(class_dtype)",
        "grad_positions[-1].to(class_dtype)",
    ),
    _patches(
        "patch_embed sums the positions' gradient in half precision",
        "grad.sum(0, dtype=exact_dtype(grad.dtype))",
        "grad.sum(0)",
    ),
    _patches("patches are read column by column", "grid.permute(0, 1, 3, 5, 2, 4)", "grid.permute(0, 1, 3, 5, 4, 2)"),
    _folded(
        "folded_message takes one eps for both norms",
        "_inverse_deviation(stream[:, :width], pair_eps)",
        "_inverse_deviation(stream[:, :width], eps)",
    ),
    _folded(
        "folded_message keeps the mean of its weights",
        "return scaled - scaled.mean(dim=1, keepdim=True), weight @ norm_bias + bias",
        "return scaled, weight @ norm_bias + bias",
        "tests/engine/test_engine_rewrites.py",
    ),
    _rows(
        "quantize_rows' torch form ignores eps",
        "weight.to(wide.dtype), bias.to(wide.dtype), eps)",
        "weight.to(wide.dtype), bias.to(wide.dtype))",
    ),
    _rows(
        "quantize_rows' torch form leaves the constant out",
        "wide = wide if constant is None else wide.add_(constant)",
        "wide = wide",
    ),
    _rows(
        "quantize_rows' torch form writes over its input",
        "x.to(exact_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)",
        "x.to(exact_dtype(x.dtype))",
    ),
    _rows(
        "quantize_rows' stream has the constant",
        "stream = wide.add_(residual).to(x.dtype, copy=True)",
        "stream = wide.add_(residual).to(x.dtype)",
    ),
    _dtypes("half precision is summed in itself", "return torch.promote_types(dtype, torch.float32)", "return dtype"),
    _dtypes(
        "summands under autocast take the narrower dtype",
        "wide = torch.promote_types(x.dtype, other.dtype)",
        "wide = min(x.dtype, other.dtype, key=lambda dtype: dtype.itemsize)",
    ),
]
