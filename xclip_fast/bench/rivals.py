"""Rivals on the CPU: a PyTorch model exported to ONNX, and run by onnxruntime or OpenVINO as their users run it best.

Both compute with as many threads as torch, and copy no frames. A package that is missing is a ``ModuleNotFoundError``.
What they write on the way is gone when they are built, and neither prints, logs or sends anything.
"""

from __future__ import annotations

import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[[int], tuple[Tensor, Tensor]]
Run = Callable[[Tensor, Tensor], Tensor]

CLIPS = 8  # to calibrate with
INPUTS = ("video", "text")


def onnxruntime(model: nn.Module, draw: Draw, precision: str) -> Run:
    """The model under onnxruntime.

    Args:
        model: takes frames (B, T, 3, H, W) and texts (K, E) to logits (B, K), all in float32.
        draw: frames and texts of the sizes to run with, random by a seed.
        precision: "float32", or "int8": weights by channel, activations by tensor in each call.

    Raises:
        ModuleNotFoundError: onnxruntime, onnx or onnxscript is not installed.
        ValueError: another precision.
    """
    if precision not in ("float32", "int8"):
        raise ValueError(f"precision is float32 or int8, found {precision!r}")
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # its threads would go on spinning while the next contender computes
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _exported(model, draw) as path:
        path = _quantised(path) if precision == "int8" else path
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(video: Tensor, text: Tensor) -> Tensor:
        (logits,) = session.run(None, dict(zip(INPUTS, (video.numpy(), text.numpy()), strict=True)))
        return torch.from_numpy(logits)

    return run


def openvino(model: nn.Module, draw: Draw, precision: str) -> Run:
    """The model under OpenVINO.

    Args:
        model, draw: as for ``onnxruntime``.
        precision: "float32", "bfloat16", or "int8": quantised by NNCF for transformers, with SmoothQuant, calibrated on
            ``CLIPS`` clips; what stays is in the precision that OpenVINO chooses on this processor.

    Raises:
        ModuleNotFoundError: openvino, nncf, onnx or onnxscript is not installed.
        NotImplementedError: this processor has no bfloat16.
    """
    hint = {"float32": "f32", "bfloat16": "bf16", "int8": None}[precision]
    with _untold():
        runtime = import_module("openvino")
        quantiser = import_module("nncf") if precision == "int8" else None
    core = runtime.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    options |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    with _exported(model, draw) as path:
        graph = core.read_model(path)
        graph = _calibrated(quantiser, graph, draw) if quantiser else graph
        compiled = core.compile_model(graph, "CPU", options)
    if hint == "bf16" and compiled.get_property("INFERENCE_PRECISION_HINT") != runtime.Type.bf16:
        raise NotImplementedError("OpenVINO has no bfloat16 on this processor")
    request = compiled.create_infer_request()

    def run(video: Tensor, text: Tensor) -> Tensor:
        request.infer([video.numpy(), text.numpy()], share_inputs=True)
        # the next call writes to the same place
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return run


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}


@contextmanager
def _exported(model: nn.Module, draw: Draw) -> Iterator[Path]:
    """The model as a file of ONNX, in a folder that is gone afterwards."""
    for name in ("onnx", "onnxscript"):
        import_module(name)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        with torch.no_grad():
            program = torch.onnx.export(model, draw(0), dynamo=True, input_names=INPUTS, verbose=False)
        assert program is not None
        program.save(path, external_data=True)
        del program
        yield path


def _quantised(path: Path) -> Path:
    quantisation = import_module("onnxruntime.quantization")
    out = path.with_name("int8.onnx")
    quantisation.quantize_dynamic(
        path,
        out,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        # without VNNI sums of two products of eight bits saturate
        reduce_range=platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported(),
        weight_type=quantisation.QuantType.QInt8,
        use_external_data_format=True,
    )
    return out


def _calibrated(nncf: Any, graph: Any, draw: Draw) -> Any:
    samples = max(1, CLIPS // len(draw(0)[0]))
    # seeds that no input has that is measured
    clips = ({name: x.numpy() for name, x in zip(INPUTS, draw(seed), strict=True)} for seed in range(2, 2 + samples))
    return nncf.quantize(graph, nncf.Dataset(list(clips)), model_type=nncf.ModelType.TRANSFORMER, subset_size=samples)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log or progress bars of others."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _untold() -> Iterator[None]:
    """Imports find no telemetry, and use their stubs of it."""
    name = "openvino_telemetry"
    present = name in sys.modules
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if not present:
            del sys.modules[name]
