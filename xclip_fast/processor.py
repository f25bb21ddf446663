"""What this processor computes natively, asked once: engine, ``xclip-fast info`` and benchmark results read it here."""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import torch

X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
FEATURES = (
    *("avx2", "avx512", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("neon", "bf16", "i8mm"),
)
# names of PyTorch that differ from those above
_TORCH_NAMES = {"avx512": ("avx512_bw",), "bf16": ("bf16", "sve_bf16"), "i8mm": ("i8mm", "sve_i8mm")}
# features left by each value of ONEDNN_MAX_CPU_ISA; any other value is no limit
_ONEDNN_LIMITS = {
    "SSE41": (),
    "AVX": (),
    "AVX2": FEATURES[:1],
    "AVX2_VNNI": ("avx2", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "avx_vnni"),
    "AVX512_CORE": FEATURES[:2],
    "AVX512_CORE_VNNI": ("avx2", "avx512", "avx512_vnni"),
    "AVX512_CORE_BF16": ("avx2", "avx512", "avx_vnni", "avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": FEATURES[:6],
}


@cache
def features() -> tuple[str, ...]:
    """Those of ``FEATURES`` that this processor has, in their order."""
    found = _capabilities()
    return tuple(name for name in FEATURES if any(found.get(known) for known in _TORCH_NAMES.get(name, (name,))))


@cache
def onednn_features() -> tuple[str, ...]:
    """Those of ``features`` that oneDNN, which runs PyTorch's packed GEMMs, may use in this process."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    allowed = _ONEDNN_LIMITS.get(limit.upper())
    return features() if allowed is None else tuple(name for name in features() if name in allowed)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether GEMMs in this dtype, bfloat16 or float16, run natively, and so not slower than in float32."""
    if dtype is torch.bfloat16:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(onednn_features()))
    return dtype is torch.float16 and "avx512_fp16" in onednn_features()


def sums_bytes_in_16_bits() -> bool:
    """Whether int8 GEMMs add pairs of products in 16 bits, which saturate: x86 without VNNI."""
    return X86 and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(onednn_features())


def describe() -> str:
    """The features in a line, such as ``x86_64 with avx2, avx512``, and what oneDNN was told to leave out."""
    machine = platform.machine()
    line = (
        f"{machine} with {', '.join(features())}" if features() else f"{machine} without vector extensions known here"
    )
    left_out = [name for name in features() if name not in onednn_features()]
    return f"{line}; oneDNN is told to leave out {', '.join(left_out)}" if left_out else line


def _capabilities() -> dict[str, Any]:
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask:
        return dict(ask())
    if not X86:
        return {"neon": platform.machine().lower() in ("aarch64", "arm64")}
    # torch 2.11 has no such list
    wide, tiles = torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()
    return {
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512_bw": wide,
        "avx512_vnni": wide and torch.cpu._is_vnni_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": tiles,
        "amx_int8": tiles,
    }
