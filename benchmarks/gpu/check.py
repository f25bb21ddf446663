"""``--window check``: is it right on this GPU, and first figures in case nothing follows. bfloat16 before all else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from benchmarks.gpu import contest, sanitize, standin
from benchmarks.gpu.lane import IMPORTS, TOOLS, UNAVAILABLE, Desk, Found, Task
from benchmarks.gpu.prepare import run
from benchmarks.gpu.quick import QuickDraw
from xclip_fast import _extension
from xclip_fast.bench.parity import compare, floating, run_op, same_bits
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Case, finite
from xclip_fast.bench.setting import inputs_of, setting_of
from xclip_fast.bench.timing import capture
from xclip_fast.engine import Engine
from xclip_fast.numerics import model_allowance, relative_error
from xclip_fast.ops._quantize_rows import quantize_rows
from xclip_fast.ops.cases import IN_EXTENSION, OPS, TRAINED, Load, config_of, find_op
from xclip_fast.ops.inputs import Inputs
from xclip_fast.ops.linear_quick_gelu import SLOPE

CLASSES = 400
REPEATS = 20
FACTORS = (0.5, -2.0)  # other numbers for a replay
# variant, batch, gradients, dtype: one of each tile first, then the shapes that differ, then the other dtypes
OP_SHAPES = (
    ("B/16", 2, True, torch.bfloat16),
    ("B/32", 1, True, torch.bfloat16),
    ("L/14", 1, True, torch.bfloat16),
    ("B/16", 1, True, torch.float16),
    ("B/32", 1, True, torch.float32),
)
TINY_SHAPES = (("tiny", 1, True, torch.bfloat16),)
FIGURES = {"B/16": 8, "B/32": 1, "L/14": 8, "tiny": 1}  # batch of the first figures
FIRST = ("hf-sdpa", "engine", "engine-float8")
OPS_LANES = 4
QUANTISED = 0.04  # error of rows in e4m3, relative to the largest number: half of the last of 14 steps, and a rounding
COSINE = 0.99  # of the features of a float8 engine and the model's
REFUSED, MISSING = "Device not supported", 127  # what a sanitizer says on machines that it cannot look into
SANITIZER = 60  # seconds of one of its runs
SANITIZED = ("extension", "temporal_block", "frame_attention", "column_sums", "linear_quick_gelu")
EXTENSION_TESTS = "tests/gpu/test_gpu_patch_extension.py"
# of what training is made of beside the ops
TRAINING_TESTS = ("tests/ops/test_linear.py", "tests/ops/test_norm_linear.py")


def tasks(lane: str, desk: Desk) -> dict[str, Task]:
    """The cases of a lane."""
    if lane.startswith("ops"):
        return _op_tasks(int(lane.split()[1]) - 1, desk)
    if lane == "extension":
        return _extension_tasks(desk)
    if lane == "compile":
        return {"compile hf-compile B/32 x1": Task(120, partial(_compile, desk))}
    if lane in TOOLS:
        return {f"{lane} {what}": Task(SANITIZER + 5, partial(_sanitize, desk, lane, what)) for what in SANITIZED}
    return _engine_tasks(lane, desk)


def _op_tasks(part: int, desk: Desk) -> dict[str, Task]:
    found = {}
    for variant, batch, gradients, dtype in TINY_SHAPES if desk.tiny else OP_SHAPES:
        # the ops in turn: those of one lane compile in one process
        for op in TRAINED[part :: 1 if desk.tiny else OPS_LANES]:
            arguments = op, variant, batch, gradients, dtype, "triton"
            name = f"op {op} {variant} x{batch} {_name(dtype)}{' and gradients' if gradients else ''}"
            found[name] = Task(60, partial(_check_op, desk, *arguments))
    if part == 0:
        for mode in ("plain", "norm", "activation"):
            found[f"op quantize_rows {mode}"] = Task(20, partial(_check_float8, desk, mode))
    if part == 1 and not desk.tiny:
        found["op tests of training"] = Task(60, partial(_tests, desk, *TRAINING_TESTS))
    return found


def _check_op(
    desk: Desk, op: str, variant: str, batch: int, gradients: bool, dtype: torch.dtype, backend: str
) -> Found:
    """Parity with float64, the same bits again and again, and a graph's replays with other numbers."""
    with desk.turns.together():
        torch.manual_seed(0)
        inputs = OPS[op].arguments(QuickDraw(dtype, "cuda"), Load(config_of(variant), batch, CLASSES))
        function, wanted = find_op(op), floating(inputs) if gradients else []
        ceiling = OPS[op].ceiling(dtype)
        checks = [
            {
                "what": row.name,
                "error": finite(row.error),
                "torch_error": finite(row.torch_error),
                "allowance": row.allowance,
                "passed": row.passed,
            }
            for row in compare(function, inputs, backend, gradients=gradients, ceiling=ceiling)
        ]
        first = run_op(function, inputs, wanted, backend, gradients)
        same = [
            same_bits(first, run_op(function, inputs, wanted, backend, gradients))
            for _ in range(2 if desk.tiny else REPEATS)
        ]
        checks.append(_yes(f"{len(same)} repeats bit for bit", all(same)))
        checks.append(_yes("a graph's replays", _replays(function, inputs, backend)))
    return _judged(desk, checks) | {"dtype": _name(dtype)}


def _replays(function: Callable[..., Any], inputs: Inputs, backend: str) -> bool:
    """Whether a graph of the op gives the bits of plain calls for other numbers too."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            result = function(**inputs, backend=backend)
        return [result] if isinstance(result, Tensor) else list(result)

    # one call compiles, and nothing else has to happen before a capture
    graph, results = capture(call, warm_ups=1)
    right = True
    for factor in FACTORS:
        for x in inputs.values():
            if isinstance(x, Tensor) and x.is_floating_point():
                x.detach().mul_(factor)
        expected = [x.clone() for x in call()]
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        right &= all(map(torch.equal, results, expected))
    return right


def _check_float8(desk: Desk, mode: str) -> Found:
    """The kernel that quantises rows against the exact rows, half a step of e4m3 away at most."""
    with desk.turns.together():
        torch.manual_seed(0)
        x = torch.randn(1576, 768, device="cuda", dtype=torch.bfloat16)
        weight, bias = (torch.randn(768, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        options: dict[str, Any] = {"norm": {"weight": weight, "bias": bias}}
        options["activation"] = {"activation": "quick_gelu"}
        exact = x.double()
        if mode == "norm":
            exact = layer_norm(exact, (768,), weight.double(), bias.double())
        elif mode == "activation":
            exact = exact * torch.sigmoid(SLOPE * exact)
        rows, scale, _ = quantize_rows(x, **options.get(mode, {}), backend="triton")
        error = relative_error(rows.double() * scale.double(), exact)
    return _judged(desk, [{"what": mode, "error": error, "allowance": QUANTISED, "passed": error <= QUANTISED}])


def _extension_tasks(desk: Desk) -> dict[str, Task]:
    found = {"extension": Task(30, partial(_extension_there, desk))}
    shapes = TINY_SHAPES if desk.tiny else (*OP_SHAPES[:3], ("B/16", 8, False, torch.float16))
    for variant, batch, _, dtype in shapes:
        for op in IN_EXTENSION:
            if op == "patch_embed":
                arguments = op, variant, batch, False, dtype, "extension"
                found[f"extension {op} {variant} x{batch} {_name(dtype)}"] = Task(
                    30, partial(_check_op, desk, *arguments)
                )
    if not desk.tiny:
        # one-hot pixels by every read, large batches, graphs: as its tests have them
        # a rehearsal compiles what these tests launch beside the extension
        found["extension tests"] = Task(100, partial(_tests, desk, EXTENSION_TESTS, "-k", "not triton"))
    return found


def _extension_there(desk: Desk) -> Found:
    refusal = _extension.cuda_refusal()
    check = _yes("it loads and has code for this GPU", refusal is None)
    return _judged(desk, [check]) | {"reason": refusal, "architectures": _extension.architectures()}


def _tests(desk: Desk, *arguments: str) -> Found:
    """Some of the tests, in a process of their own."""
    from benchmarks.gpu.parity import read_junit

    path = desk.folder / f"{desk.record.stem}.xml"
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider", f"--junit-xml={path}"]
    with desk.turns.together():
        done = run(command, 95 if desk.judged else 900)
    tests, failures, rows = read_junit(path.read_text(encoding="utf-8") if path.exists() else "")
    # tests that were skipped have shown nothing
    passed = done["code"] == 0 and tests.get("passed", 0) > 0
    checks = [{"what": one, "passed": False} for one in failures] or [_yes(f"{tests}", passed)]
    return _judged(desk, checks) | {"tests": tests, "parity": rows}


def _engine_tasks(variant: str, desk: Desk) -> dict[str, Task]:
    batch = FIGURES[variant]
    found = {}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        name = f"engine {variant} {_name(dtype)}"
        found[name] = Task(90, partial(_check_engine, desk, variant, dtype))
        found[f"{name} calls"] = Task(60, partial(_check_calls, desk, variant, dtype))
    case = contest.case_of(variant, batch)
    found[f"build {contest.name_of(case)}"] = Task(60, partial(contest.build, desk, case, FIRST))
    found[f"first figures {contest.name_of(case)}"] = Task(60, partial(_first_figures, desk, case))
    found[f"profile {contest.name_of(case)}"] = Task(30, partial(contest.profile, desk, case, FIRST[:2]))
    return found


def _first_figures(desk: Desk, case: Case) -> Found:
    # what is right comes first: who waits to be alone keeps others from beginning
    desk.wait_while(lambda name: name.startswith((IMPORTS, "op ", "engine ", "build ", "extension")))
    return contest.measure(desk, case, FIRST, ("graph",))


def _model(desk: Desk, variant: str) -> Any:
    def make() -> Any:
        return PROVIDERS["layers"].build(setting_of(_bytes_case(variant, "float32"))).model  # type: ignore[attr-defined]

    return desk.keep(f"model {variant}", make)


def _engine(desk: Desk, variant: str, dtype: torch.dtype) -> Engine:
    return desk.keep(f"{variant} {dtype}", lambda: Engine(_model(desk, variant), dtype, "cuda"))


def _bytes_case(variant: str, dtype: str, batch: int = 1) -> Case:
    return Case("model", variant, config_of(variant).frames, batch, CLASSES, dtype, "forward", "uint8", "cuda")


def _check_engine(desk: Desk, variant: str, dtype: torch.dtype) -> Found:
    """Logits of one clip of bytes against the definition in float64, beside plain torch in bfloat16; its report."""
    with desk.turns.together():
        exact = setting_of(_bytes_case(variant, "float64"))
        video, text = inputs_of(exact)
        with torch.inference_mode():
            truth = desk.keep(f"truth {variant}", lambda: PROVIDERS["reference"].build(exact)(video, text))
            plain_setting = setting_of(_bytes_case(variant, "bfloat16"))
            plain = desk.keep(
                f"plain {variant}", lambda: PROVIDERS["reference"].build(plain_setting)(video, text.bfloat16())
            )
        engine = _engine(desk, variant, dtype)
        found = engine(video, engine.texts_of(text))
        if dtype is torch.bfloat16:
            error, allowed = relative_error(found, truth), model_allowance(relative_error(plain, truth), dtype)
            check = {"what": "logits", "error": error, "allowance": allowed, "passed": error <= allowed}
        else:
            cosine = cosine_similarity(found.double(), truth, dim=-1).min().item()
            check = {
                "what": "1 - cosine of logits",
                "error": 1 - cosine,
                "allowance": 1 - COSINE,
                "passed": cosine >= COSINE,
            }
        report = engine.report()
    # those of the first and the last block are kept in a higher precision anyway
    fell_back = [str(gemm) for gemm in report.products if not gemm.error <= gemm.budget]
    return _judged(desk, [check]) | {
        "dtype": _name(dtype),
        "fell_back": fell_back,
        "video_error": report.video_error,
        "top1_agreement": report.top1_agreement,
    }


def _check_calls(desk: Desk, variant: str, dtype: torch.dtype) -> Found:
    """A graph's bits are those of plain calls, odd batches fit, results outlive the next call, threads do not mix."""
    with desk.turns.together():
        engine = _engine(desk, variant, dtype)
        config = engine.config
        size, checks = config.image_size, []
        found: Found = {"dtype": _name(dtype)}
        texts = engine.texts_of(torch.randn(CLASSES, config.embed_dim, device="cuda"))

        def draw(batch: int) -> Tensor:
            return torch.randint(256, (batch, config.frames, size, size, 3), dtype=torch.uint8, device="cuda")

        videos = {batch: draw(batch) for batch in (1, 2, 3, 8)[: 2 if desk.tiny else 4]}
        for batch, video in videos.items():
            engine(video, texts)
            replayed = engine(video, texts).clone()
            if standin.in_force():
                # of the graph that was captured last: a call's, with this batch
                found.setdefault("nodes", standin.counts()["captured"])
            engine(draw(batch), texts)
            checks.append(_yes(f"x{batch} again", torch.equal(engine(video, texts), replayed)))
            graphs, engine._graphs = engine._graphs, None
            plain = engine(video, texts)
            engine._graphs = graphs
            close = relative_error(replayed, plain) if batch == 3 else 0.0 if torch.equal(replayed, plain) else 1.0
            # the library's GEMMs of a padded batch may sum in another order
            limit = 0.02 if batch == 3 else 0.0
            checks.append({"what": f"x{batch} graph and plain call", "error": close, "allowance": limit,
                           "passed": close <= limit})  # fmt: skip
            probabilities = engine.classify(video, texts)
            total = (probabilities.sum(-1) - 1).abs().max().item()
            checks.append(
                {"what": f"x{batch} probabilities", "error": total, "allowance": 1e-4, "passed": total <= 1e-4}
            )
        checks.append(_yes("4 threads", _threads(engine, texts, videos)))
    return _judged(desk, checks) | found


def _threads(engine: Engine, texts: Any, videos: dict[int, Tensor]) -> bool:
    wanted = {batch: engine(video, texts).clone() for batch, video in videos.items()}
    torch.cuda.synchronize()

    def work(batch: int) -> bool:
        # streams of their own: what one thread queues must not overtake the other's
        with torch.cuda.stream(torch.cuda.Stream()):
            found = engine(videos[batch], texts)
            torch.cuda.current_stream().synchronize()
        return torch.equal(found, wanted[batch])

    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(work, list(videos) * 8))


def _compile(desk: Desk) -> Found:
    """How long torch.compile takes for Hugging Face's smallest case, and whether what it makes can be captured."""
    case = contest.case_of("B/32", 1)
    with desk.turns.together():
        setting = setting_of(case)
        inputs = inputs_of(setting)
        start = time.monotonic()
        compiled = PROVIDERS["hf-compile"].build(setting)
        with torch.inference_mode():
            compiled(*inputs)
            seconds = time.monotonic() - start
            capture(lambda: compiled(*inputs))
    return _judged(desk, [_yes("it compiles and is captured", True)]) | {"compile_s": round(seconds, 1)}


def _sanitize(desk: Desk, tool: str, what: str) -> Found:
    """compute-sanitizer over the small launches of one launcher."""
    with desk.turns.together():
        found = sanitize.check_small(tool, what, SANITIZER if desk.judged else 900, rehearsed=not desk.judged)
    if any(REFUSED in line for line in found["said"]) or found["code"] == MISSING:
        return {"status": UNAVAILABLE, "reason": " ".join(found["said"][-2:]) or "there is no compute-sanitizer"}
    check = _yes(found["said"][-1] if found["said"] else what, found["status"] == sanitize.PASSED)
    return _judged(desk, [check]) | {"said": found["said"]}


def _judged(desk: Desk, checks: list[dict[str, Any]]) -> Found:
    return {"status": desk.verdict(all(check["passed"] for check in checks)), "checks": checks}


def _yes(what: str, right: bool) -> dict[str, Any]:
    return {"what": what, "passed": right}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
