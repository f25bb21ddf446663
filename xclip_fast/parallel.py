"""Training on several processes with sharded weights (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

from xclip_fast import reference
from xclip_fast.reference.prompts import PromptLayer
from xclip_fast.reference.transformer import Block

_BLOCKS = (reference.CrossFrameBlock, Block, PromptLayer)


def fully_shard(model: reference.XCLIP, **options: Any) -> reference.XCLIP:
    """``torch.distributed.fsdp.fully_shard`` of every block of all towers, then of the whole model, in place.

    PyTorch shards no scalar: ``logit_scale`` stays whole in every process, and its gradient is averaged like the
    others. ``encode_video``, ``encode_text`` and ``logits`` can be called by themselves too. With ``logit_scale`` among
    its ``ignored_params``, PyTorch's own function does as well, on whatever parts you choose.

    Args:
        model: on the device where it will train, in an initialised process group.
        options: those of PyTorch's function, such as ``mesh`` and ``mp_policy``.

    Returns:
        The model.

    Example:
        >>> import torch, xclip_fast
        >>> from torch import distributed, nn
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from xclip_fast.parallel import fully_shard
        >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # or torchrun
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, text_width=64, vocab_size=514)
        >>> model = fully_shard(xclip_fast.create_model(config).train(), mesh=init_device_mesh("cpu", (1,)))
        >>> type(model.visual.proj).__name__
        'DTensor'
        >>> distributed.destroy_process_group()
    """
    from torch.distributed import fsdp

    options["ignored_params"] = {model.logit_scale} | set(options.get("ignored_params") or ())
    for module in list(model.modules()):
        if isinstance(module, _BLOCKS):
            fsdp.fully_shard(module, **options)
    fsdp.fully_shard(model, **options)
    for method in ("encode_video", "encode_text", "logits"):
        fsdp.register_fsdp_forward_method(model, method)
    mesh = options.get("mesh")
    groups = [None] if mesh is None else mesh.get_all_groups()
    average_gradient(model.logit_scale, groups)
    return model


def average_gradient(parameter: nn.Parameter, groups: Sequence[Any]) -> None:
    """Let every process have the mean of a parameter's gradients, where none of PyTorch's wrappers sees to it."""
    if not parameter.requires_grad:
        return

    @torch.no_grad()
    def average(changed: Any) -> None:
        for group in groups:
            distributed.all_reduce(changed.grad, group=group)
            changed.grad /= distributed.get_world_size(group)

    parameter.register_post_accumulate_grad_hook(average)
