"""Adapters, pruned, parametrized, quantised and offloaded weights: answers and gradients are those without us."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import randomise_parameters, relative_error
from test_on_a_layer import ORACLE, inputs, pair
from test_optimize import CrossFramelAttentionBlock
from test_optimize_wrapped import BARE, INPUTS, differs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import xclip_fast

HUGGINGFACE = {
    "q, v": ["q_proj", "v_proj"],
    "k": ["k_proj"],
    "out": ["out_proj"],
    "perceptron": ["fc1", "fc2"],
    "message_fc": ["message_fc"],
    "message attention": r".*message_attn\.(q|k|v|out)_proj",
    "MIT": r"mit\..*(_proj|fc1|fc2)",
    "prompts": r"prompts_generator\..*(_proj|\.proj|mlp\.[03])",
    "text": r"text_model\..*(_proj|fc1|fc2)",
    "all": r".*(_proj|\.proj|fc1|fc2|message_fc|mlp\.[03])",
}
OWN = {
    "perceptron": ["c_fc", "c_proj"],
    "out": ["out_proj"],
    "message_fc": ["message_fc"],
    "message attention": r".*message_attn\.out_proj",
    "MIT": r"mit\..*(out_proj|c_fc|c_proj)",
    "prompts": r"prompts_generator\..*(_proj|\.proj|mlp\.[03])",
    "text": r"transformer\..*(out_proj|c_fc|c_proj)",
    "patches": ["conv1"],
    "all": r".*(_proj|\.proj|c_fc|message_fc|mlp\.[03]|conv1|token_embedding)",
}


def official() -> nn.Module:
    """Two blocks with the official names."""
    torch.manual_seed(0)
    return randomise_parameters(nn.Sequential(*(CrossFramelAttentionBlock(128, 2, 3) for _ in range(2)))).eval()


def run(model: nn.Module, *given: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(*given, **named)
    output = getattr(output, "logits_per_video", output)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def double(given: Any) -> Any:
    if isinstance(given, dict):
        return {name: double(value) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(map(double, given))
    return given.double() if given.is_floating_point() else given


def tokens() -> Tensor:
    return torch.randn(10, 6, 128, generator=torch.Generator().manual_seed(0))


def with_adapters(model: nn.Module, targets: Any) -> nn.Module:
    """The model in float64, where nothing is rounding, with random LoRA adapters on linear layers."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval().double()


def check_adapters(expected: tuple[Tensor, dict[str, Tensor]], found: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert differs(expected, found, 1e-9) == ""
    adapters = {name: grad for name, grad in expected[1].items() if "lora_" in name}
    assert adapters
    assert all(found[1][name].any() for name, grad in adapters.items() if grad.any())


@pytest.mark.parametrize("order", ["adapters first", "optimize first"])
@pytest.mark.parametrize("targets", HUGGINGFACE.values(), ids=HUGGINGFACE)
def test_adapters_on_hugging_face(targets: Any, order: str) -> None:
    expected = run(with_adapters(copy.deepcopy(BARE), targets), **double(INPUTS))
    model = copy.deepcopy(BARE)
    if order == "optimize first":
        xclip_fast.optimize(model)
    adapted = with_adapters(model, targets)
    if order == "adapters first":
        assert any("lora" in reason for reason in xclip_fast.optimize(adapted).kept.values()) or "prompts" in targets
    check_adapters(expected, run(adapted, **double(INPUTS)))
    merged = adapted.merge_and_unload()
    assert relative_error(merged(**double(INPUTS)).logits_per_video, expected[0]) <= 1e-9
    xclip_fast.restore(merged)
    assert relative_error(merged(**double(INPUTS)).logits_per_video, expected[0]) <= 1e-9


@pytest.mark.parametrize("targets", OWN.values(), ids=OWN)
def test_adapters_on_our_own_layers(targets: Any) -> None:
    oracle, model = pair()
    expected, adapted = run(with_adapters(oracle, targets), *double(inputs())), with_adapters(model, targets)
    check_adapters(expected, run(adapted, *double(inputs())))
    assert relative_error(adapted.merge_and_unload()(*double(inputs())), expected[0]) <= 1e-9


@pytest.mark.parametrize("order", ["adapters first", "optimize first"])
@pytest.mark.parametrize("targets", [["message_fc"], ["c_fc"], ["c_proj"], ["attn"], ["message_attn"]], ids=str)
def test_adapters_on_official_blocks(targets: list[str], order: str) -> None:
    expected = run(with_adapters(official(), targets), double(tokens()))
    model = official()
    if order == "optimize first":
        xclip_fast.optimize(model)
    adapted = with_adapters(model, targets)
    if order == "adapters first":
        xclip_fast.optimize(adapted)
    check_adapters(expected, run(adapted, double(tokens())))


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)


def weight_normed(module: nn.Module) -> None:
    parametrizations.weight_norm(module)


def spectral_normed(module: nn.Module) -> None:
    parametrizations.spectral_norm(module)


def without_bias(module: nn.Module) -> None:
    module.register_parameter("bias", None)


def sparse(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)


class Halved(Tensor):
    """A weight that stands for twice its numbers, as quantised ones stand for others than they hold."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Halved:
        return Tensor._make_subclass(cls, numbers, False)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(*(2 * x.as_subclass(Tensor) if isinstance(x, Halved) else x for x in given))
        return super().__torch_function__(function, types, given, options or {})


def quantised(module: nn.Module) -> None:
    module.weight = nn.Parameter(Halved(module.weight.detach() / 2), requires_grad=False)


WEIGHTS = [pruned, weight_normed, spectral_normed, without_bias, sparse, quantised]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
@pytest.mark.slow
def test_other_weights_in_hugging_face(change: Callable[[nn.Module], None]) -> None:
    names = [name for name, module in BARE.named_modules() if type(module) is nn.Linear and module.bias is not None]
    wrong = {}
    for name in names:
        models = [copy.deepcopy(BARE) for _ in range(3)]
        xclip_fast.optimize(models[2])
        for model in models:
            torch.manual_seed(0)
            change(model.get_submodule(name))
        xclip_fast.optimize(models[1])
        expected, *found = (run(model, **INPUTS) for model in models)
        wrong |= {f"{name} {index}": why for index, one in enumerate(found) if (why := differs(expected, one))}
    assert wrong == {}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
@pytest.mark.slow
def test_other_weights_in_our_own_layers(change: Callable[[nn.Module], None]) -> None:
    names = [name for name, module in ORACLE.named_modules() if type(module) is nn.Linear]
    wrong = {}
    for name in names:
        oracle, model = pair()
        for one in (oracle, model):
            torch.manual_seed(0)
            change(one.get_submodule(name))
        if why := differs(run(oracle, *inputs()), run(model, *inputs())):
            wrong[name] = why
    assert wrong == {}


@pytest.mark.parametrize("change", [pruned, weight_normed, spectral_normed], ids=lambda change: change.__name__)
def test_other_weights_in_official_blocks(change: Callable[[nn.Module], None]) -> None:
    wrong = {}
    for name in ("0.message_fc", "0.mlp.c_fc", "1.mlp.c_proj"):
        plain, before, after = official(), official(), official()
        xclip_fast.optimize(after)
        for model in (plain, before, after):
            torch.manual_seed(0)
            change(model.get_submodule(name))
        xclip_fast.optimize(before)
        expected = run(plain, tokens())
        for model in (before, after):
            if why := differs(expected, run(model, tokens())):
                wrong[name] = why
    assert wrong == {}


def test_parameters_that_are_parametrized_are_read_as_properties() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    wrong = {}
    owners = {"visual": "proj", "mit": "positional_embedding", "prompts_generator": "alpha", "": "text_projection"}
    blocks = [name for name, module in ORACLE.named_modules() if hasattr(module, "in_proj_weight")]
    for name, weight in [*owners.items(), *((block, "in_proj_weight") for block in blocks)]:
        oracle, model = pair()
        for one in (oracle, model):
            nn.utils.parametrize.register_parametrization(one.get_submodule(name), weight, Twice())
        if why := differs(run(oracle, *inputs()), run(model, *inputs())):
            wrong[name] = why
    assert wrong == {}


@pytest.mark.slow
def test_other_modules_in_our_own_layers() -> None:
    norms = [name for name, module in ORACLE.named_modules() if type(module) is nn.LayerNorm]
    activations = [name for name, module in ORACLE.named_modules() if name.endswith(("gelu", "mlp.1"))]
    others: list[tuple[list[str], Callable[[], nn.Module]]] = [
        (norms, lambda: nn.LayerNorm(64, elementwise_affine=False)),
        (norms, lambda: nn.LayerNorm(64, bias=False)),
        (norms, lambda: nn.RMSNorm(64)),
        (norms, nn.Identity),
        (norms, lambda: nn.LayerNorm(64, eps=0.1)),
        (["visual.conv1"], lambda: nn.Conv2d(3, 64, 16, 16, bias=True)),
        (["visual.conv1"], lambda: nn.Conv2d(3, 64, 16, 8, bias=False)),
        (["visual.conv1"], lambda: nn.Conv2d(3, 64, 16, 16, padding=8, padding_mode="reflect", bias=False)),
        (["visual.conv1"], lambda: nn.Conv2d(3, 64, 8, 16, bias=False)),
        (activations, nn.GELU),
        (activations, nn.ReLU),
    ]
    wrong = {}
    for names, make in others:
        for name in names:
            oracle, model = pair()
            for one in (oracle, model):
                owner, _, last = name.rpartition(".")
                torch.manual_seed(0)
                setattr(one.get_submodule(owner), last, make())
            if why := differs(run(oracle, *inputs()), run(model, *inputs())):
                wrong[f"{name} {make()}"] = why
    assert wrong == {}


def dynamic_int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def int8_weights(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


QUANTISED = [dynamic_int8, int8_weights]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", QUANTISED, ids=lambda quantise: quantise.__name__)
def test_quantised_hugging_face_models(quantise: Callable[[nn.Module], nn.Module]) -> None:
    with torch.no_grad():
        model = quantise(copy.deepcopy(BARE))
        expected = model(**INPUTS).logits_per_video
        report = xclip_fast.optimize(model)
        assert relative_error(model(**INPUTS).logits_per_video, expected) <= 1e-5
        assert len(report.kept) >= 10
        optimized = copy.deepcopy(BARE)
        xclip_fast.optimize(optimized)
        assert relative_error(quantise(optimized)(**INPUTS).logits_per_video, expected) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", QUANTISED, ids=lambda quantise: quantise.__name__)
def test_quantised_layers_of_our_own(quantise: Callable[[nn.Module], nn.Module]) -> None:
    with torch.no_grad():
        expected, found = (quantise(model)(*inputs()) for model in pair())
    # bytes are rounded anew where a sum differs by a bit
    assert relative_error(found, expected) <= (1e-2 if quantise is dynamic_int8 else 1e-5)


@pytest.mark.parametrize("order", ["offload first", "optimize first"])
def test_offloaded_weights(order: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = BARE(**INPUTS).logits_per_video
    model = copy.deepcopy(BARE)
    if order == "optimize first":
        xclip_fast.optimize(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if order == "offload first":
        xclip_fast.optimize(model)
    with torch.no_grad():
        assert relative_error(model(**INPUTS).logits_per_video, expected) <= 1e-5
    accelerate.hooks.remove_hook_from_submodules(model)
    xclip_fast.restore(model)


def test_offloaded_layers_of_our_own() -> None:
    accelerate = pytest.importorskip("accelerate")
    oracle, model = pair()
    with torch.no_grad():
        expected = oracle(*inputs())
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert relative_error(model(*inputs()), expected) <= 1e-5
