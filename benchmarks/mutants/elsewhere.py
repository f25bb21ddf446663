"""Faults of the layers, the reference, texts and videos: a few of each."""

# ruff: noqa: E501 texts of the sources are not broken

from __future__ import annotations

from benchmarks.mutants.fault import Fault, in_room

_layers = in_room(
    "xclip_fast/layers",
    "tests/model/test_layers.py",
    "tests/model/test_parity_rewrites.py",
    "tests/model/test_parity_golden.py",
)
_reference = in_room(
    "xclip_fast/reference",
    "tests/model/test_parity_golden.py",
    "tests/model/test_reference_contract.py",
    "tests/model/test_reference_numerics.py",
    "tests/model/test_layers.py",
)
_texts = in_room("xclip_fast/text", "tests/text")
_video = in_room(
    "xclip_fast/video",
    "tests/video/test_video_sampling.py",
    "tests/video/test_video_preprocess.py",
    "tests/video/test_video_load.py",
)

FAULTS: list[Fault] = [
    _layers("eps of a layer's joined norm ignored", "residual=residual, eps=norm.eps)", "residual=residual)"),
    _layers(
        "eps of the messages' pair ignored",
        "attention.in_proj_bias[width:],\n        eps=norm.eps,",
        "attention.in_proj_bias[width:],",
    ),
    _layers("dropped branches are not scaled up", "bernoulli_(keep).div_(keep)", "bernoulli_(keep)"),
    _layers(
        "whole videos keep or drop together",
        "shape = [branch.shape[0], *[1] * (branch.ndim - 1)]",
        "shape = [1, *[1] * (branch.ndim - 1)]",
    ),
    _layers(
        "branches are dropped in inference",
        "if self.training and self.drop_path else branch",
        "if self.drop_path else branch",
    ),
    _layers(
        "blocks are recomputed in inference",
        "stack.checkpointing is not None and stack.training and",
        "stack.checkpointing is not None and",
        "tests/model/test_optimize_wrapped.py",
        "tests/model/test_create_model.py",
    ),
    _layers(
        "a shared text is adapted to one video",
        "stream.expand_as(branch), branch)",
        "stream[:1].expand_as(branch), branch)",
        "tests/model/test_parity_rewrites.py",
    ),
    _layers("MIT's second eps is the first's", "and block.ln_1.eps == block.ln_2.eps:", ":"),
    _layers(
        "statistics of the pixels are the defaults",
        "mean=mean,\n        std=std,\n        dtype=dtype,",
        "dtype=dtype,",
        "tests/model/test_decoded_bytes.py",
    ),
    _reference(
        "scores have another temperature",
        "key.transpose(-2, -1) * query.shape[-1] ** -0.5",
        "key.transpose(-2, -1) * query.shape[-1] ** -0.45",
    ),
    _reference("positions are interpolated bilinearly", 'mode="bicubic"', 'mode="bilinear"'),
    _reference(
        "positions in time meet at their corners",
        'mode="linear", align_corners=False',
        'mode="linear", align_corners=True',
    ),
    _reference(
        "a grid of another shape with as many patches keeps the table",
        "if grid == (side, side):",
        "if grid[0] * grid[1] == side * side:",
    ),
    _texts(
        "texts of a model by its device alone",
        "device,\n                torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),",
        "device,",
    ),
    _texts(
        "texts by the weights that they do not need",
        "embedding[tokens.unique().to(embedding.device)], positions[: tokens.shape[1]]",
        "embedding[:2], positions[: tokens.shape[1]]",
    ),
    _texts(
        "a text's last token is cut off",
        "tokens = tokens[:, : int(ends.max()) + 1].long().contiguous()",
        "tokens = tokens[:, : max(1, int(ends.max()))].long().contiguous()",
    ),
    _texts("weights hash without what they are", "hashlib.sha256(kinds.encode() + sums", "hashlib.sha256(sums"),
    _texts("a kept text is handed out itself", "return features.clone()", "return features"),
    _texts(
        "a folder's files are pushed out in any order",
        "for _, size, path in sorted(found):",
        "for _, size, path in sorted(found, reverse=True):",
    ),
    _texts("neighbours in a digest may trade bytes", 'total.update(len(data).to_bytes(8, "little"))', "pass"),
    _video(
        "frames from the start of each segment",
        "(2 * clip + 1) * total / (2 * clips * frames)",
        "2 * clip * total / (2 * clips * frames)",
    ),
    _video(
        "rounding steps past the last frame",
        "min(int(i * total / frames + offset), total - 1)",
        "int(i * total / frames + offset)",
        equivalent="the offset of the last frame is below its segment's length, so that rounding reaches the end at none of the lengths a file can have",
    ),
    _video(
        "a crop is one pixel off",
        "[((height - size) // 2, (width - size) // 2)]",
        "[((height - size + 1) // 2, (width - size + 1) // 2)]",
    ),
    _video("bytes are cut after the resize", "resize(frame.float()).round_().byte()", "resize(frame.float()).byte()"),
    _video(
        "the long side is rounded for all presets",
        "int(long + 0.5) if self.rounds_side else int(long)",
        "int(long + 0.5)",
    ),
]
