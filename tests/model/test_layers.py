"""The layers against their reference: outputs, gradients, names; drop path, checkpointing, autocast, distribution."""

from __future__ import annotations

import copy
import os
import socket
import statistics
from functools import partial

import pytest
import torch
from interpreted_bfloat16 import interpreted_bfloat16
from numerics import (
    TOLERANCES,
    assert_gradients,
    assert_within,
    model_allowance,
    randomise_parameters,
    relative_error,
)
from torch import Tensor, nn

import xclip_fast
from xclip_fast import XCLIPConfig, layers, ops, reference

TINY = XCLIPConfig(
    image_size=48,
    patch_size=16,
    vision_width=128,
    vision_layers=3,
    embed_dim=64,
    vocab_size=64,
    text_width=64,
    text_layers=2,
    frames=4,
    mit_layers=2,
)
BACKENDS = ["reference", "torch", "triton"]
LIMIT = TOLERANCES[torch.float32].model
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def pair(config: XCLIPConfig = TINY) -> tuple[reference.XCLIP, xclip_fast.model.XCLIP]:
    """The same random weights in the oracle and in the fused model."""
    oracle = randomise_parameters(reference.XCLIP(config)).eval()
    model = xclip_fast.create_model(config)
    model.load_state_dict(oracle.state_dict())
    return oracle.to(DEVICE), model.to(DEVICE)


def inputs(config: XCLIPConfig = TINY, videos: int = 2, texts: int = 3) -> tuple[Tensor, Tensor]:
    video = torch.randn(videos, config.frames, 3, config.image_size, config.image_size, device=DEVICE)
    return video, torch.randint(0, config.vocab_size, (texts, 7), device=DEVICE)


def module_pairs() -> dict[str, tuple[nn.Module, nn.Module, tuple[Tensor, ...]]]:
    """Each layer beside its reference, and inputs for both."""
    tokens, messages = torch.randn(2, 3, 10, 128), torch.randn(2, 3, 128)
    return {
        "PatchEmbed": (reference.PatchEmbed(128, 16, 48), layers.PatchEmbed(128, 16, 48), (torch.randn(2, 3, 48, 48),)),
        "MessageAttention": (reference.MessageAttention(128, 2), layers.MessageAttention(128, 2), (messages,)),
        "FrameAttention": (reference.FrameAttention(128, 2), layers.FrameAttention(128, 2), (tokens, messages)),
        "CrossFrameBlock": (reference.CrossFrameBlock(128, 2), layers.CrossFrameBlock(128, 2), (tokens,)),
        "CrossFrameBlock gelu": (
            reference.CrossFrameBlock(128, 2, 200, "gelu"),
            layers.CrossFrameBlock(128, 2, 200, "gelu"),
            (tokens,),
        ),
        "MultiframeIntegration": (
            reference.MultiframeIntegration(128, 2, 2, 5),
            layers.MultiframeIntegration(128, 2, 2, 5),
            (messages,),
        ),
        "VideoPrompts": (
            reference.VideoPrompts(128, 2),
            layers.VideoPrompts(128, 2),
            (torch.randn(2, 5, 128), torch.randn(2, 9, 128)),
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(module_pairs()))
def test_layer_parity(name: str, backend: str) -> None:
    oracle, layer, arguments = module_pairs()[name]
    randomise_parameters(oracle)
    assert list(oracle.state_dict()) == list(layer.state_dict())
    layer.load_state_dict(oracle.state_dict())
    arguments = tuple(x.requires_grad_() for x in arguments)
    expected = oracle(*arguments)
    upstream = torch.randn_like(expected)
    plain = torch.autograd.grad(expected, [*arguments, *oracle.parameters()], upstream)
    exact, wide = copy.deepcopy(oracle).double(), [x.detach().double().requires_grad_() for x in arguments]
    truth = torch.autograd.grad(exact(*wide), [*wide, *exact.parameters()], upstream.double())
    oracle, layer, arguments = oracle.to(DEVICE), layer.to(DEVICE), tuple(x.to(DEVICE) for x in arguments)
    with ops.backend(backend):
        found = layer(*arguments)
        grads = torch.autograd.grad(found, [*arguments, *layer.parameters()], upstream.to(DEVICE))
    assert_within(found, expected, LIMIT, what=f"layer {name} {backend}")
    assert_gradients(grads, plain, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_parity(backend: str) -> None:
    oracle, model = pair()
    video, tokens = inputs()
    expected = oracle(video, tokens)
    upstream = torch.randn_like(expected)
    plain = torch.autograd.grad(expected, list(oracle.parameters()), upstream)
    exact = copy.deepcopy(oracle).double()
    truth = torch.autograd.grad(exact(video.double(), tokens), list(exact.parameters()), upstream.double())
    with ops.backend(backend):
        found = model(video, tokens)
        grads = torch.autograd.grad(found, list(model.parameters()), upstream)
        with torch.no_grad():
            features, text = model.encode_video(video), model.encode_text(tokens)
    assert_within(found, expected, LIMIT, what=f"model logits {backend}")
    assert_within(features.video, oracle.encode_video(video).video, LIMIT, what=f"model video {backend}")
    assert_within(features.patches, oracle.encode_video(video).patches, LIMIT, what=f"model patches {backend}")
    assert_within(text, oracle.encode_text(tokens), LIMIT, what=f"model text {backend}")
    assert_gradients(grads, plain, truth)


def test_other_clip_lengths_and_sizes() -> None:
    oracle, model = pair()
    tokens = inputs()[1]
    for shape in ((1, 1, 3, 48, 48), (3, 7, 3, 32, 64)):
        video = torch.randn(shape, device=DEVICE)
        assert relative_error(model(video, tokens), oracle(video, tokens)) <= LIMIT
    video = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8, device=DEVICE)
    assert relative_error(model(video, tokens), oracle(video, tokens)) <= LIMIT


def test_the_block_can_leave_its_last_addition_to_the_next() -> None:
    block = randomise_parameters(layers.CrossFrameBlock(64, 1))
    tokens = torch.randn(2, 3, 5, 64)
    whole = block(block(tokens))
    stream, pending = block._advance(*block._advance(tokens, None))
    assert torch.allclose(stream + pending, whole, atol=1e-5)


@pytest.mark.parametrize("unit", layers.DROP_PATH_UNITS)
def test_drop_path_drops_whole_units_and_keeps_the_mean(unit: str) -> None:
    branch = torch.ones(40, 3, 50, 4)
    dropped = layers.drop_path(branch, 0.5, unit)
    per_unit = dropped.flatten(1) if unit == "video" else dropped.transpose(0, 2).flatten(1)
    assert ((per_unit == 0).all(1) | (per_unit == 2).all(1)).all()
    assert 0.5 < dropped.mean() < 1.5


def test_drop_path_is_for_training_only() -> None:
    block = layers.CrossFrameBlock(64, 1, drop_path=0.5)
    tokens = torch.randn(8, 2, 3, 64)
    assert not torch.equal(block(tokens), block(tokens))
    block.eval()
    assert torch.equal(block(tokens), block(tokens))
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        layers.CrossFrameBlock(64, 1, drop_path=1.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    _, model = pair()
    video, tokens = inputs()
    model(video.requires_grad_(), tokens).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for block in model.visual.transformer.resblocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=reentrant)
    model(video, tokens).sum().backward()
    # the reentrant kind runs its forward pass without gradients, where the perceptron takes a shorter way
    tolerance = 1e-4 if reentrant else 0.0
    for name, parameter in model.named_parameters():
        assert (parameter.grad - plain[name]).norm() <= tolerance * plain[name].norm().clamp_min(1e-2), name


def test_autocast_as_the_reference() -> None:
    oracle, model = pair()
    video, tokens = inputs(videos=6, texts=12)
    with torch.no_grad():
        exact = oracle.encode_video(video), oracle.encode_text(tokens)
        truth = [*exact[0], exact[1], oracle(video, tokens)]
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = [*oracle.encode_video(video), oracle.encode_text(tokens), oracle(video, tokens)]
        found = [*model.encode_video(video), model.encode_text(tokens), model(video, tokens)]
    for ours, theirs, right in zip(found, plain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = model_allowance(relative_error(theirs, right.double()), torch.bfloat16)
        assert relative_error(ours, right.double()) <= allowed
    found[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, backend: str) -> None:
    oracle, model = pair()
    exact = copy.deepcopy(oracle).double()
    video, tokens = inputs()
    truth, plain = exact(video.double(), tokens), oracle.to(dtype)(video, tokens)
    with interpreted_bfloat16(), ops.backend(backend):
        found = model.to(dtype)(video, tokens)
        found.backward(upstream := torch.randn(found.shape, device=DEVICE).to(dtype))
    assert found.dtype == dtype
    assert relative_error(found, truth) <= model_allowance(relative_error(plain, truth), dtype)
    truth.backward(upstream.double())
    plain.backward(upstream)
    errors = {
        name: (relative_error(model.get_parameter(name).grad, right.grad), relative_error(other.grad, right.grad))
        for (name, right), other in zip(exact.named_parameters(), oracle.parameters(), strict=True)
    }
    # one gradient is a draw that depends on the processor; what the most of them err is no luck
    limit = TOLERANCES[dtype].gradients
    wrong = {name: (ours, other) for name, (ours, other) in errors.items() if not ours <= 2 * other + limit}
    assert wrong == {}
    ours, other = (statistics.median(both) for both in zip(*errors.values(), strict=True))
    assert ours <= 1.5 * other


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.slow
def test_compiles_whole(backend: str) -> None:
    _, model = pair()
    video, tokens = inputs()
    with ops.backend(backend), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(video, tokens), model(video, tokens), rtol=1e-4, atol=1e-4)


def test_weights_are_moved_by_name_and_loading_gives_the_fused_model(tmp_path) -> None:
    oracle, model = pair()
    xclip_fast.save_model(oracle, tmp_path / "weights.safetensors")
    loaded = xclip_fast.load_model(tmp_path / "weights.safetensors")
    assert type(loaded) is type(model)
    assert isinstance(loaded, reference.XCLIP)
    video, tokens = inputs()
    assert torch.equal(loaded.to(DEVICE)(video, tokens), model(video, tokens))


def distributed_model(kind: str) -> nn.Module:
    """The model of each rank, before it is wrapped; it is optimised Hugging Face's where the kind says so."""
    if not kind.startswith("transformers"):
        return xclip_fast.create_model(TINY, seed=0)
    from test_optimize import huggingface

    model = huggingface(frames=TINY.frames)
    if kind != "transformers, then optimize":
        xclip_fast.optimize(model)
    return model


def distributed_loss(model: nn.Module, rank: int, ranks: int) -> Tensor:
    """The loss of a rank's own video."""
    torch.manual_seed(1)
    video, tokens = torch.randn(ranks, 4, 3, 48, 48)[rank : rank + 1], torch.randint(0, 64, (3, 7))
    if hasattr(model, "text_model") or hasattr(getattr(model, "module", None), "text_model"):
        return model(pixel_values=video, input_ids=tokens).logits_per_video.square().mean()
    return model(video, tokens).square().mean()


def _train_on_one_rank(rank: int, ranks: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    for kind in KINDS:
        found = _gradients_of_one_rank(rank, ranks, mesh, kind)
        if rank == 0:
            results.put((kind, {name: grad.numpy() for name, grad in found.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _gradients_of_one_rank(rank: int, ranks: int, mesh: object, kind: str) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = distributed_model(kind)
    wrapped = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif kind == "xclip_fast.parallel":
        xclip_fast.parallel.fully_shard(model, mesh=mesh)
    elif kind == "frozen scale":
        model.logit_scale.requires_grad_(False)
        for module in list(model.modules()):
            if isinstance(module, layers.CrossFrameBlock | layers.Block | layers.PromptLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    elif kind == "whole":
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    elif kind == "towers":
        for module in (model.visual, model.transformer, model.mit, model.prompts_generator):
            fully_shard(module, mesh=mesh)
    else:
        for module in list(model.modules()):
            if type(module).__name__ in ("XCLIPVisionEncoderLayer", "XCLIPEncoderLayer", "PromptGeneratorLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
        if kind == "transformers, then optimize":
            assert xclip_fast.optimize(model).replaced
    distributed_loss(wrapped, rank, ranks).backward()
    grads = {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (name != "logit_scale" or kind in ("ddp", "xclip_fast.parallel"))
    }
    return {name: grad for name, grad in grads.items() if kind != "towers" or "resblocks" in name}


KINDS = [
    "ddp",
    "xclip_fast.parallel",
    "frozen scale",
    "whole",
    "towers",
    "transformers",
    "transformers, then optimize",
]


@pytest.fixture(scope="module")
def gradients_of_two_ranks() -> dict[str, dict[str, Tensor]]:
    """Those of every kind, from one pair of processes: starting one takes longer than its training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_train_on_one_rank, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=200) for _ in KINDS)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return {kind: {name: torch.from_numpy(grad) for name, grad in grads.items()} for kind, grads in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_two_ranks_train_as_one(kind: str, gradients_of_two_ranks: dict[str, dict[str, Tensor]]) -> None:
    found = gradients_of_two_ranks[kind]
    model = distributed_model(kind)
    torch.stack([distributed_loss(model, rank, 2) for rank in range(2)]).mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) >= len(expected) - 1 or kind == "towers"
    # some gradients are nothing but rounding: a bias of the keys moves no softmax
    least = 1e-2 * max(grad.norm() for grad in expected.values())
    errors = {name: (grad - expected[name]).norm() / max(expected[name].norm(), least) for name, grad in found.items()}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
