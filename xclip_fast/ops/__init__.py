"""The fused operations, each in a file of its own: contract, reference, torch formulation, registration."""

from xclip_fast.ops._backends import BACKENDS, backend, explain
from xclip_fast.ops.layer_norm import layer_norm

__all__ = ["BACKENDS", "backend", "explain", "layer_norm"]
