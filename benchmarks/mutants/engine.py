"""Faults of the engine, its caches and what bounds its memory."""

# ruff: noqa: E501 texts of the sources are not broken

from __future__ import annotations

from benchmarks.mutants.fault import Fault, in_room

ENGINE = in_room("xclip_fast/engine")
_RECENT = in_room("xclip_fast/recent.py", "tests/text/test_recent.py")
_CLASSES = in_room(
    "xclip_fast/classes.py", "tests/model/test_large_label_sets.py", "tests/engine/test_engine_rewrites.py"
)

REWRITES, CONTRACT = "tests/engine/test_engine_rewrites.py", "tests/engine/test_engine_contract.py"
PRECISION, LINEARS = "tests/engine/test_engine_precision.py", "tests/engine/test_engine_linears.py"
TEXTS, GRAPHS = "tests/engine/test_engine_texts.py", "tests/engine/test_engine_graphs.py"
SETS, FLOAT8 = "tests/engine/test_engine_class_graphs.py", "tests/engine/test_engine_float8.py"
ATTENTION, KERNELS = "tests/engine/test_engine_attention.py", "tests/engine/test_engine_kernels.py"
PATCHES = "tests/engine/test_engine_patches.py"
QUICK = "-k", "not hundred and not process"

# of the sets of rewrites those that differ in their norms
_SOME = "those or all- or none or other or eps"
EPS = [
    ENGINE(
        "eps of the CPU's norms ignored",
        "self.weight, self.bias, self.eps)",
        "self.weight, self.bias)",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of the prompts' norms ignored",
        "constant=self.constant, eps=self.eps)[0]",
        "constant=self.constant)[0]",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of the patches' mean ignored",
        "constant=missing_bias, eps=norm.eps)",
        "constant=missing_bias)",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of MIT's blocks ignored",
        '"heads": block.attn.heads, "eps": block.ln_1.eps}',
        '"heads": block.attn.heads}',
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of ln_post ignored on CUDA",
        "constant=self.missing_bias, eps=self.eps_post)",
        "constant=self.missing_bias)",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE("eps of ln_pre ignored on CUDA", "eps=self.eps_pre,", "", REWRITES, "-k", _SOME),
    ENGINE(
        "eps of ln_1 ignored on CUDA",
        "layer_norm(rows, weight, bias, residual=branch, constant=missing_bias, eps=self.eps)",
        "layer_norm(rows, weight, bias, residual=branch, constant=missing_bias)",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of ln_2 ignored on CUDA",
        "constant=self.missing_bias_2, eps=self.eps)",
        "constant=self.missing_bias_2)",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of float8 rows ignored",
        "rows, weight=weight, bias=bias, residual=branch, constant=missing_bias, eps=self.eps",
        "rows, weight=weight, bias=bias, residual=branch, constant=missing_bias",
        FLOAT8,
    ),
    ENGINE(
        "eps of the pair's norm is the message's",
        '"pair_eps": block.ln_1.eps',
        '"pair_eps": norm.eps',
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of the merged message ignored", "(variance + self.norm.eps)", "(variance + 1e-5)", REWRITES, "-k", _SOME
    ),
    ENGINE(
        "eps of the first message ignored",
        "normed = layer_norm(message, message.shape, exact(norm.weight), exact(norm.bias), norm.eps)",
        "normed = layer_norm(message, message.shape, exact(norm.weight), exact(norm.bias))",
        REWRITES,
        "-k",
        _SOME,
    ),
    ENGINE(
        "eps of the constant class token ignored",
        "row = layer_norm(row, row.shape, exact(norm.weight), exact(norm.bias), norm.eps)",
        "row = layer_norm(row, row.shape, exact(norm.weight), exact(norm.bias))",
        REWRITES,
        "-k",
        _SOME,
    ),
]
CACHES = [
    ENGINE(
        "position grid of the CPU by its number of patches",
        "if grid not in self.grids:",
        "grid = next((x for x in self.grids if x[0] * x[1] == grid[0] * grid[1]), grid)\n        if grid not in self.grids:",
        REWRITES,
    ),
    ENGINE(
        "position grid of CUDA by its number of patches",
        "self.grids, grid, lambda",
        "self.grids, grid[0] * grid[1], lambda",
        REWRITES,
    ),
    ENGINE(
        "packed patches by their rows of patches",
        "self.packed_patches, grid, lambda",
        "self.packed_patches, grid[0], lambda",
        PATCHES,
    ),
    ENGINE(
        "positions of MIT kept for any number of frames",
        "self.mit_lengths, frames, lambda",
        "self.mit_lengths, 0, lambda",
        REWRITES,
    ),
    ENGINE(
        "class sets by their first tokens",
        "key = digest([self.encoder, tokens])",
        "key = digest([self.encoder, tokens[:, :3]])",
        TEXTS,
        *QUICK,
    ),
    ENGINE(
        "class sets by their first rows",
        "key = digest([self.encoder, tokens])",
        "key = digest([self.encoder, tokens[:3], bytes(len(tokens))])",
        TEXTS,
        *QUICK,
    ),
    ENGINE("class sets without their encoder", "key = digest([self.encoder, tokens])", "key = digest([tokens])", TEXTS),
    ENGINE("encoder without its heads", "how = [config.text_heads, ", "how = [", TEXTS, *QUICK),
    ENGINE(
        "encoder without its activation",
        "config.activation, packing.device.type, dtypes",
        "packing.device.type, dtypes",
        TEXTS,
        *QUICK,
    ),
    ENGINE("encoder without its device", "packing.device.type, dtypes, sorted", "dtypes, sorted", TEXTS, *QUICK),
    ENGINE(
        "encoder without what weights are kept in",
        'f"{packing.dtype} of {packing.stored}"',
        "str(packing.dtype)",
        TEXTS,
        *QUICK,
    ),
    ENGINE("encoder without its rewrites", "dtypes, sorted(packing.rewrites)]", "dtypes]", TEXTS, *QUICK),
    ENGINE(
        "size of a kept class set without its query",
        "texts.features.nbytes + texts.query.nbytes",
        "texts.features.nbytes",
        TEXTS,
        *QUICK,
    ),
    ENGINE(
        "graph by the place of a class set alone", "x.data_ptr(), x.dtype, x.shape, x.stride()", "x.data_ptr()", SETS
    ),
    ENGINE("graph without the strides of a class set", "x.shape, x.stride())", "x.shape)", SETS),
    ENGINE("graph without the frames of a video", "*video.shape[1:],", "*video.shape[2:],", GRAPHS),
    ENGINE("graph without the dtype of a video", "video.dtype,\n        bucket(", "bucket(", GRAPHS),
    ENGINE(
        "way of an odd batch without its class set",
        "key = video.dtype, *video.shape, *(x.shape for x in texts)",
        "key = video.dtype, *video.shape",
        SETS,
    ),
    ENGINE(
        "way of an odd batch without its dtype", "key = video.dtype, *video.shape, *(", "key = *video.shape, *(", SETS
    ),
    ENGINE("a set where another lay is taken for it", "before[0]() is texts[0]", "before[0] is not None", SETS),
    _RECENT(
        "an old value's size is kept in the sum",
        "self.taken -= self.size(self._values.pop(key))",
        "self._values.pop(key)",
    ),
    _RECENT("the newest goes first", "popitem(last=False)", "popitem(last=True)"),
    _RECENT("one value goes where several must", "while self.taken > self.room:", "if self.taken > self.room:"),
    _RECENT("what is used is not moved", "self._values.move_to_end(key)", "pass"),
]
WEIGHTS = [
    ENGINE(
        "packed vectors share the model's memory", "dtype or self.dtype, copy=True)", "dtype or self.dtype)", CONTRACT
    ),
    ENGINE(
        "texts share the memory they were given in",
        "exact_dtype(self.packing.dtype), copy=True)",
        "exact_dtype(self.packing.dtype))",
        TEXTS,
        *QUICK,
    ),
    ENGINE("bias of a norm is not in the product", "bias + weight @ exact(norm.bias)", "bias", REWRITES),
    ENGINE(
        "smoothed bias is not divided",
        "weight, bias = weight / share, bias / share",
        "weight = weight / share",
        REWRITES,
    ),
    ENGINE(
        "scale of the scores is the root of what it should be",
        "share[:width] = (width // attention.heads) ** -0.5",
        "share[:width] = (width // attention.heads) ** -0.25",
        REWRITES,
    ),
    ENGINE(
        "scale of the scores left out of the bias",
        "weight, bias = weight * share[:, None], bias * share",
        "weight = weight * share[:, None]",
        REWRITES,
    ),
    ENGINE("slope left out of the first bias", "(SLOPE * weight, SLOPE * bias)", "(SLOPE * weight, bias)", REWRITES),
    ENGINE(
        "bias of the message without the missing bias",
        "fc_bias = fc_bias + exact(block.message_fc.weight) @ missing_bias",
        "fc_bias = fc_bias + missing_bias",
        REWRITES,
    ),
    ENGINE(
        "last bias never reaches the residual stream",
        "missing_bias = missing_bias + out_bias + projection_bias",
        "missing_bias = missing_bias + out_bias",
        REWRITES,
    ),
    ENGINE(
        "patch mean without the missing bias",
        "patches, norm.weight, norm.bias, constant=missing_bias",
        "patches, norm.weight, norm.bias, constant=None",
        REWRITES,
    ),
    ENGINE("pixels centred at 127", ".to(self.dtype).sub_(128)", ".to(self.dtype).sub_(127)", REWRITES),
    ENGINE(
        "class row of another frame",
        "rows = rows[::tokens].contiguous()\n        rows = self.out",
        "rows = rows[: len(messages)].contiguous()\n        rows = self.out",
        REWRITES,
    ),
]
CHUNKS = [
    ENGINE(
        "mean of a video's parts weighs them alike",
        "(part.shape[1] / frames)",
        "(tokens[0].shape[1] / frames)",
        REWRITES,
    ),
    ENGINE(
        "mean of one video's parts goes on in the next",
        "mean, seen = 0.0, 0\n        means",
        "seen = 0\n        means",
        REWRITES,
    ),
    ENGINE(
        "queries of the first classes for all parts",
        "query=texts.query[chunk]",
        "query=texts.query[: len(texts.features[chunk])]",
        REWRITES,
    ),
    ENGINE("bytes share a scale among videos", "videos = 1 if self.packing.narrow else", "videos =", PRECISION),
    ENGINE(
        "last heads of the batched attention left out",
        "heads = max(1, _SCORES // (query.shape[1] * key.shape[2]))",
        "heads = max(1, _SCORES // (query.shape[1] * key.shape[2]))\n    query = query[: max(1, len(query) // heads * heads)]",
        ATTENTION,
    ),
    ENGINE(
        "parts of the batched attention overlap",
        "for first in range(0, len(query), heads):",
        "for first in range(0, len(query), heads + 1):",
        ATTENTION,
    ),
    ENGINE(
        "widened weights take the first biases",
        "bias = None if self.bias is None else self.bias[some]",
        "bias = None if self.bias is None else self.bias[: len(self.weight[some])]",
        LINEARS,
    ),
    _CLASSES(
        "last class of a part left out",
        "yield slice(first, first + size)",
        "yield slice(first, first + size - (size > 1))",
    ),
    _CLASSES("an empty class set has no part", "range(0, max(1, classes), size)", "range(0, classes, size)"),
    _CLASSES("parts do not shrink with the videos", "width * max(1, videos)", "width"),
]
LOW_PRECISION = [
    ENGINE(
        "calibration ignored",
        "self._probe(_PROBE_FRAMES) if clips is None else self._checked(clips)",
        "self._probe(_PROBE_FRAMES)",
        PRECISION,
    ),
    ENGINE(
        "calibration on the first part alone",
        "_smoothing([rows for rows, _ in getattr(block, name).seen], weight)",
        "_smoothing([rows for rows, _ in getattr(block, name).seen[:1]], weight)",
        PRECISION,
    ),
    ENGINE(
        "outlier channels move whole into the weights", "(ratio.log2() / 2).round()", "ratio.log2().round()", PRECISION
    ),
    ENGINE("a channel of zeros divides by zero", "ratio.isfinite() & (ratio > 0)", "ratio.isfinite()", PRECISION),
    ENGINE(
        "error of a product is the best of its parts",
        "torch.stack(errors).max()",
        "torch.stack(errors).min()",
        PRECISION,
    ),
    ENGINE("one of an MLP's GEMMs falls back alone", 'over |= {"fc", "projection"}', "pass", PRECISION),
    ENGINE("float8 at the first block", "index in (0, len(resblocks) - 1)", "index == len(resblocks) - 1", FLOAT8),
    ENGINE("bytes of a weight in 128 steps", "largest / 127", "largest / 128", LINEARS),
    ENGINE(
        "zero point one step off",
        "round(-low / scale) + 1",
        "round(-low / scale)",
        LINEARS,
        equivalent="the step is room for the rounding of float32, which reaches the next byte at no number that was found",
    ),
    ENGINE(
        "range of bytes without zero", "low, high = min(low, 0.0), max(high, 0.0)", "low, high = low, high", LINEARS
    ),
    ENGINE(
        "eight bits where pairs saturate",
        "SEVEN_BITS if processor.sums_bytes_in_16_bits() else EIGHT_BITS",
        "EIGHT_BITS",
        LINEARS,
    ),
    ENGINE(
        "bias of plain linear layers lost in the residual stream",
        "return stream if self.bias is None else stream.add_(self.bias)",
        "return stream",
        LINEARS,
    ),
    ENGINE(
        "what is no number hides in QNNPACK's bytes",
        "result if spoilt is None else result.fill_(spoilt)",
        "result",
        LINEARS,
    ),
    ENGINE(
        "detection of GEMMs takes any answer",
        "<= 0.02 * other.float().norm()",
        "<= 20 * other.float().norm()",
        LINEARS,
    ),
    ENGINE(
        "prompts in half precision on the CPU",
        'if packing.device.type == "cpu":\n            # half',
        'if packing.device.type == "cuda":\n            # half',
        PRECISION,
    ),
    ENGINE(
        "variance of the merged message in half precision",
        "wide = exact_dtype(message.dtype)",
        "wide = message.dtype",
        PRECISION,
        equivalent="PyTorch sums it in float32; its result is rounded once more, as is the product it scales",
    ),
]
FAULTS: list[Fault] = [*EPS, *CACHES, *WEIGHTS, *CHUNKS, *LOW_PRECISION]
