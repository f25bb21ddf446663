"""Rivals on the CPU: a PyTorch model exported to ONNX, and run by onnxruntime or OpenVINO as users run it fastest.

Both compute with as many threads as torch, and copy no frames. A package that is missing is a ``ModuleNotFoundError``.
Neither prints, logs or sends anything.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xclip_fast import processor

Run = Callable[[Tensor, Tensor], Tensor]

CLIPS = 8  # to calibrate with
INPUTS = ("video", "text")


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        build: a model that takes frames (B, T, 3, H, W) and texts (K, E) to logits (B, K), all in float32.
        draw: frames and texts of the sizes to run with, random by a seed.
        folder: where files of the model are made, and found again.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    folder: Path

    def onnx(self) -> Path:
        """The model in float32."""
        for name in ("onnx", "onnxscript"):
            import_module(name)
        path = self.folder / "float32.onnx"
        if not path.exists():
            with torch.no_grad():
                program = torch.onnx.export(
                    self.build(), self.draw(0), dynamo=True, input_names=INPUTS, optimize=True, verbose=False
                )
            assert program is not None
            program.save(path, external_data=True)
        return path


def onnxruntime(source: Source, precision: str) -> Run:
    """The model under onnxruntime.

    Args:
        source: the model.
        precision: "float32", or "int8": a scale for each channel of the weights, and for the activations of each call.

    Raises:
        ModuleNotFoundError: onnxruntime, onnx or onnxscript is not installed.
    """
    make = {"float32": Source.onnx, "int8": _quantised_weights}[precision]
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # its threads would spin on while the next contender computes
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _quiet():
        session = runtime.InferenceSession(make(source), options, providers=["CPUExecutionProvider"])

    def run(video: Tensor, text: Tensor) -> Tensor:
        (logits,) = session.run(None, dict(zip(INPUTS, (video.numpy(), text.numpy()), strict=True)))
        return torch.from_numpy(logits)

    return run


def openvino(source: Source, precision: str) -> Run:
    """The model under OpenVINO.

    Args:
        source: the model.
        precision: "float32", "bfloat16", or "int8": quantised by NNCF as a transformer, with SmoothQuant, calibrated on
            ``CLIPS`` clips; what stays is computed in the precision that OpenVINO prefers on this processor.

    Raises:
        ModuleNotFoundError: openvino, nncf, onnx or onnxscript is not installed.
        NotImplementedError: OpenVINO has no bfloat16 on this processor.
    """
    hint = {"float32": "f32", "bfloat16": "bf16", "int8": None}[precision]
    with _without_telemetry():
        runtime = import_module("openvino")
        nncf = import_module("nncf") if precision == "int8" else None
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    options |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    with _quiet():
        path = _calibrated(source, runtime, nncf) if nncf else source.onnx()
        compiled = runtime.Core().compile_model(path, "CPU", options)
    if hint == "bf16" and compiled.get_property("INFERENCE_PRECISION_HINT") != runtime.Type.bf16:
        raise NotImplementedError("OpenVINO has no bfloat16 on this processor")
    request = compiled.create_infer_request()

    def run(video: Tensor, text: Tensor) -> Tensor:
        request.infer([video.numpy(), text.numpy()], share_inputs=True)
        # the next call writes to the same place
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return run


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}


def _quantised_weights(source: Source) -> Path:
    path = source.folder / "onnxruntime-int8.onnx"
    if not path.exists():
        quantisation = import_module("onnxruntime.quantization")
        quantisation.quantize_dynamic(
            source.onnx(),
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # seven bits of a weight where sums of products saturate
            reduce_range=processor.sums_bytes_in_16_bits(),
            weight_type=quantisation.QuantType.QInt8,
            use_external_data_format=True,
        )
    return path


def _calibrated(source: Source, runtime: Any, nncf: Any) -> Path:
    path = source.folder / "openvino-int8.xml"
    if not path.exists():
        samples = max(1, CLIPS // len(source.draw(0)[0]))
        # seeds of no input that is measured
        drawn = (zip(INPUTS, source.draw(seed), strict=True) for seed in range(2, 2 + samples))
        clips = nncf.Dataset([{name: x.numpy() for name, x in inputs} for inputs in drawn])
        graph = runtime.Core().read_model(source.onnx())
        graph = nncf.quantize(graph, clips, model_type=nncf.ModelType.TRANSFORMER, subset_size=samples)
        runtime.save_model(graph, path, compress_to_fp16=False)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, logs or progress bars of others."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """OpenVINO and NNCF, imported here, find no telemetry, and send nothing."""
    name = "openvino_telemetry"
    modules: dict[str, Any] = sys.modules
    known = name in modules
    modules.setdefault(name, None)
    try:
        yield
    finally:
        if not known:
            del modules[name]
