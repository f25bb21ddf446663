"""The protocol: blocks in turn, noise, the gate in front of the clock, and what happens to a provider that fails."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xclip_fast import ops
from xclip_fast.bench import memory, models, operators
from xclip_fast.bench.machine import Sensors, ceilings
from xclip_fast.bench.models import Effort, measure_model
from xclip_fast.bench.operators import measure_op
from xclip_fast.bench.providers import PROVIDERS, Provider
from xclip_fast.bench.record import Case, Row, Run
from xclip_fast.bench.run import Job, effort_of, make_case, run
from xclip_fast.bench.setting import Classify, Frames, Setting, UnavailableError, inputs_of, setting_of
from xclip_fast.bench.timing import LEAST, SPENT, Blocks, Reading, alternate, blocks_of, noise_of, sampler, timing_of
from xclip_fast.errors import InputError
from xclip_fast.flops import parameters
from xclip_fast.ops.cases import OPS, SIZES, TRAINED, config_of, find_op
from xclip_fast.ops.inputs import OUTLIER_SCALE, OUTLIERS, Draw

EFFORT = Effort(blocks=1, block=0.001, memory=False)
CEILINGS = {"float32_tflops": 0.1, "copy_gbs": 10.0}
CASE = make_case("model", "tiny", batch=2)
# rivals have their own tests
APART = ("compile", "onnxruntime", "openvino", "open_clip")
RUNNING = [name for name in PROVIDERS if not any(word in name for word in APART)]


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    # measuring them takes seconds, and one test does
    monkeypatch.setattr("xclip_fast.bench.run.ceilings", lambda *arguments, **named: CEILINGS)


def test_contenders_take_turns_as_first_second_second_first() -> None:
    order: list[str] = []

    def sample(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    found = alternate(lambda: sample("a", 2.0), lambda: sample("b", 1.0), 2, Reading)
    assert "".join(order) == "abbaabba"
    assert found.ratios == [2.0, 2.0]
    assert (found.first, found.second) == ([2.0] * 4, [1.0] * 4)


def test_a_drift_of_the_machine_falls_on_both() -> None:
    clock = itertools.count(1)
    assert alternate(lambda: next(clock), lambda: next(clock), 1, Reading).ratios == [1.0]


@pytest.mark.parametrize(
    ("ratios", "noise", "verdict"),
    [
        ([1.2, 1.2, 1.2], 0.1, "faster"),
        ([1.2, 1.2, 1.2], 0.3, "no difference"),
        ([0.8, 0.8, 0.8], 0.1, "slower"),
        ([0.8, 0.8, 0.8], 0.3, "no difference"),
        ([1.0, 1.0, 1.5, 1.5], 0.1, "no difference"),
        ([1.0, 1.0, 1.0], 0.0, "no difference"),
    ],
)
def test_a_gain_has_to_leave_the_noise(ratios: list[float], noise: float, verdict: str) -> None:
    blocks = Blocks(second=[1.0] * 2 * len(ratios), ratios=ratios)
    assert timing_of(blocks, "base", noise, method="wall").verdict == verdict


def test_noise_is_the_distance_from_one_on_either_side() -> None:
    assert noise_of(Blocks(ratios=[0.9] * 20)) == pytest.approx(0.1)
    assert noise_of(Blocks(ratios=[1.1] * 20)) == pytest.approx(0.1)


def at(*clocks: tuple[float, float]) -> list[tuple[Reading, Reading]]:
    """Readings before and after each block."""
    return [(Reading(before, 300.0, 40.0), Reading(after, 700.0, 60.0)) for before, after in clocks]


def test_a_block_at_another_clock_is_dropped_and_counted() -> None:
    readings = at((1980.0, 1980.0), (1975.0, 1980.0), (300.0, 1980.0))
    blocks = Blocks(second=[1.0, 1.0, 1.0, 1.0, 9.0, 9.0], ratios=[1.0, 1.0, 0.1], readings=readings)
    found = timing_of(blocks, "base", 0.0, method="graph")
    assert (found.blocks, found.dropped, found.median_ms) == (2, 1, 1000.0)
    assert (found.clock_mhz, found.power_w, found.temperature_c) == ((300.0, 1980.0), (300.0, 700.0), (40.0, 60.0))


@pytest.mark.parametrize("clocks", [((1000.0, 1000.0),), ((1000.0, 1000.0), (1980.0, 1980.0)), ((200.0, 1980.0),)])
def test_a_block_is_left_however_the_clock_jumps(clocks: tuple[tuple[float, float], ...]) -> None:
    blocks = Blocks(second=[1.0] * 2 * len(clocks), ratios=[1.0] * len(clocks), readings=at(*clocks))
    assert timing_of(blocks, "base", 0.0, method="graph").blocks == 1


def test_a_gpu_that_says_nothing_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(device: str) -> float:
        calls.append(device)
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr("torch.cuda.clock_rate", refuse)
    monkeypatch.setattr("torch.cuda.power_draw", lambda device: 650_000)
    monkeypatch.setattr("torch.cuda.temperature", refuse)
    sensors = Sensors("cuda")
    assert [sensors(), sensors()] == [Reading(None, 650.0, None)] * 2
    # what fails once is not asked for again
    assert calls == ["cuda"] * 2
    found = timing_of(alternate(lambda: 1.0, lambda: 1.0, 3, sensors), "base", 0.0, method="graph")
    assert (found.blocks, found.dropped, found.clock_mhz, found.power_w) == (3, 0, None, (650.0, 650.0))
    assert Sensors("cpu")() == Reading()


@pytest.mark.parametrize(
    ("most", "seconds", "wanted"),
    [(10, 0.2, 10), (10, SPENT / 10, 10), (10, 6.0, 4), (10, 16.0, LEAST), (10, 1e4, LEAST), (1, 1e4, 1), (3, 8.0, 3)],
)
def test_long_calls_have_fewer_blocks(most: int, seconds: float, wanted: int) -> None:
    assert blocks_of(most, seconds) == wanted


def test_the_first_block_tells_how_many_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 6.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert len(alternate(lambda: 2.0, lambda: 2.0, 10, Reading).ratios) == 4
    assert len(alternate(lambda: 2.0, lambda: 2.0, 10, Reading, spent=1.0, least=2).ratios) == 2


@pytest.mark.parametrize("cold", [False, True])
def test_a_sampler_calls_and_returns_the_time_of_one_call(cold: bool) -> None:
    calls: list[int] = []
    found = sampler(lambda: calls.append(1), "cpu", 0.001, graph=False, cold=cold)()
    assert calls
    assert 0 < found < 0.1


def test_a_call_as_long_as_a_block_is_made_once() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.02)

    assert sampler(run, "cpu", 0.01, graph=False)() >= 0.02
    assert len(calls) == 1


def test_cold_caches_reach_models_and_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    fill = Tensor.fill_
    monkeypatch.setattr("xclip_fast.bench.timing.CACHE", 12345)
    monkeypatch.setattr(Tensor, "fill_", lambda x, value: (flushed.append(x.numel()), fill(x, value))[1])
    effort = replace(effort_of(False, "cold"), blocks=1, block=0.001)
    rows = run(
        [Job(CASE, ("layers",)), Job(make_case("layer_norm", "tiny"), ("torch",))], effort, lambda row: None
    ).rows
    assert [row.timing.cache for row in rows if row.timing] == ["cold"] * 2
    assert flushed.count(12345) >= 16
    assert effort_of(False, "warm").cache == "warm"


def test_every_provider_takes_bytes() -> None:
    case = replace(CASE, input="uint8")
    video, _ = inputs_of(setting_of(case))
    assert (video.dtype, video.shape) == (torch.uint8, (2, 4, 32, 32, 3))
    rows = {row.provider: row for row in measure_model(case, RUNNING, EFFORT, CEILINGS)}
    # float8 needs a GPU, int8 a processor or a PyTorch that multiplies bytes, and both say so
    others = {name: row.reason for name, row in rows.items() if row.status != "timed"}
    assert others.keys() <= {"engine-float8", "engine-int8"}
    assert all(rows[name].status == "unavailable" and reason for name, reason in others.items())
    known = replace(CASE, input="normalised")
    roofs = [models.roof_of(each, rows["layers"].timing, CEILINGS) for each in (case, known)]
    assert roofs[1].bytes - roofs[0].bytes == 3 * video.numel()


def test_frames_made_of_bytes_are_those_of_the_definition() -> None:
    setting = setting_of(replace(CASE, input="uint8"))
    video, _ = inputs_of(setting)
    made = Frames(setting)(video)
    wanted = PROVIDERS["reference"].build(setting).model.normalise(video)  # type: ignore[attr-defined]
    assert made.is_contiguous()
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)


class _Constant(nn.Module):
    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        return text.new_zeros(len(video), len(text))


class _Unwritten(nn.Module):
    """Right but for a corner that it leaves as it found it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        found = self.inner(video, text)
        out = torch.empty_like(found)
        out[1:] = found[1:]
        return out


def _raise(error: Exception) -> Classify:
    raise error


def _absent(setting: Setting) -> Classify:
    raise UnavailableError("it needs a quantum computer")


@pytest.fixture
def odd_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers that do what they should not."""
    odd = {
        "wrong": Provider("zeros", lambda setting: _Constant()),
        "unwritten": Provider("a corner", lambda setting: _Unwritten(PROVIDERS["layers"].build(setting))),  # type: ignore[arg-type]
        "crash": Provider("raises", lambda setting: _raise(RuntimeError("out of luck"))),
        "absent": Provider("cannot", _absent),
    }
    for name, provider in odd.items():
        monkeypatch.setitem(PROVIDERS, name, provider)


@pytest.mark.usefixtures("odd_providers")
def test_each_failure_is_a_row_and_the_rest_goes_on() -> None:
    names = ("wrong", "unwritten", "crash", "absent", "layers")
    rows = {row.provider: row for row in measure_model(CASE, names, EFFORT, CEILINGS)}
    assert list(rows) == list(names)
    assert {name: row.status for name, row in rows.items()} == {
        "wrong": "wrong",
        "unwritten": "wrong",
        "crash": "failed",
        "absent": "unavailable",
        "layers": "timed",
    }
    assert rows["crash"].reason == "RuntimeError: out of luck"
    assert rows["absent"].reason == "it needs a quantum computer"
    # nothing that is wrong is timed
    assert all(row.timing is None for name, row in rows.items() if name != "layers")
    check = rows["wrong"].check
    assert check is not None
    assert not check.passed
    assert check.error == pytest.approx(1.0)
    unwritten = rows["unwritten"].check
    assert unwritten is not None
    assert unwritten.error is None
    assert "its error is not finite" in (rows["unwritten"].reason or "")
    assert f"its error is 1.00e+00, {check.allowance:.2e} is allowed, plain torch errs" in (rows["wrong"].reason or "")


@pytest.mark.usefixtures("odd_providers")
@pytest.mark.parametrize(("name", "sound"), [("layers", True), ("absent", True), ("wrong", False), ("crash", False)])
def test_a_run_is_sound_when_nothing_is_wrong_or_failed(name: str, sound: bool) -> None:
    shown: list[Row] = []
    found = run([Job(CASE, (name,))], EFFORT, shown.append)
    assert found.sound is sound
    assert found.rows == shown
    assert found.ceilings == CEILINGS


def test_the_ceilings_are_those_of_a_machine() -> None:
    found = ceilings("cpu", ("float32",), seconds=0.01)
    assert found.keys() == CEILINGS.keys()
    # a core of the slowest machine and a rack of the fastest
    assert 1e-3 < found["float32_tflops"] < 1e4
    assert 0.1 < found["copy_gbs"] < 1e5


@pytest.mark.parametrize(("direction", "dtype"), [("forward", "bfloat16"), ("train", "float32")])
def test_every_provider_that_runs_here_is_right(direction: str, dtype: str) -> None:
    case = replace(CASE, direction=direction, dtype=dtype)
    rows = list(measure_model(case, RUNNING, EFFORT, CEILINGS))
    assert {row.provider: row.reason for row in rows if row.status not in ("timed", "unavailable")} == {}
    timed = {row.provider for row in rows if row.status == "timed"}
    others = {row.provider: row.reason for row in rows if row.provider not in timed}
    assert others.keys().isdisjoint({"hf-sdpa", "hf-eager", "reference", "layers", "optimized"}), others
    assert ("engine" in timed) == (direction == "forward"), others
    assert {row.provider: row.check.bit_repeat for row in rows if row.check} == dict.fromkeys(timed, True)


class _Restless(nn.Module):
    """Right, and never twice the same."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(video, text) * (1 + 1.2e-7 * (self.calls % 2))


def test_a_provider_that_does_not_repeat_is_shown_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    restless = Provider("right", lambda setting: _Restless(PROVIDERS["layers"].build(setting)))  # type: ignore[arg-type]
    monkeypatch.setitem(PROVIDERS, "restless", restless)
    rows = {row.provider: row for row in measure_model(CASE, ("layers", "restless"), EFFORT, CEILINGS)}
    assert [row.status for row in rows.values()] == ["timed"] * 2
    assert [row.check.bit_repeat for row in rows.values() if row.check] == [True, False]


def test_the_baseline_without_transformers_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    rows = {row.provider: row for row in measure_model(CASE, ("hf-sdpa", "layers"), EFFORT, CEILINGS)}
    assert rows["hf-sdpa"].status == "unavailable"
    assert "transformers does not import" in (rows["hf-sdpa"].reason or "")
    assert rows["layers"].timing is not None
    assert rows["layers"].timing.baseline == "reference"


def test_memory_is_asked_for_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr(models, "setting_of", lambda case: pytest.fail("something was built"))
    with pytest.raises(InputError, match=r"tiny, 4 frames, batch 2, float32 needs about .* GiB, 0\.0 GiB are free"):
        run([Job(CASE, ("layers",))], EFFORT, lambda row: None)


def test_a_job_that_does_not_fit_is_a_row_beside_one_that_does() -> None:
    huge = replace(CASE, batch=10**9)
    found = run([Job(huge, ("layers",)), Job(CASE, ("layers",))], EFFORT, lambda row: None)
    assert [row.status for row in found.rows] == ["failed", "timed"]
    assert "ask for a smaller batch" in (found.rows[0].reason or "")


def test_a_run_that_is_cut_off_leaves_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen = []

    def interrupt(row: Row) -> None:
        seen.append(row)
        assert Run.load(path).rows == seen
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Job(CASE, ("layers", "reference", "hf-sdpa"))], EFFORT, interrupt, path)
    assert [row["provider"] for row in json.loads(path.read_text())["rows"]] == ["layers", "reference"]
    assert Run.load(path).facts["seconds"] > 0
    assert list(tmp_path.iterdir()) == [path]


def test_the_estimate_grows_with_everything() -> None:
    base = memory.estimate(make_case("model", "B/32"))
    assert memory.estimate(make_case("model", "B/32", batch=64)) > base
    assert memory.estimate(make_case("model", "B/16")) > base
    assert memory.estimate(make_case("model", "B/32", direction="train")) > base


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")


@linux
def test_peak_memory_is_what_the_model_takes_and_no_library(tmp_path: Path) -> None:
    found = memory.peak_memory(CASE, "hf-sdpa", tmp_path)
    assert found is not None
    weights = parameters(config_of("tiny")) * 4 / 1e6
    # torch alone would be hundreds
    assert 0.8 * weights < found < 20 * weights


@linux
def test_the_peak_of_a_process_is_that_since_it_settled() -> None:
    process = memory._Process()
    earlier = bytearray(200 << 20)
    del earlier
    before = process.settle()
    assert process.peak() - before < 50 << 20
    since = bytearray(100 << 20)
    del since
    assert 90 << 20 < process.peak() - before < 150 << 20


def test_a_provider_without_a_tiny_model_imports_its_libraries_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = []

    def ready(case: Case, provider: str, folder: Path) -> Callable[[], object]:
        built.append(case.variant)
        if case.variant == "tiny":
            raise UnavailableError("no model of these sizes")
        return lambda: pytest.fail("it computed")

    monkeypatch.setattr(memory, "_ready", ready)
    memory._warm_up(replace(CASE, variant="B/32"), "open_clip-frames", tmp_path)
    assert built == ["tiny", "B/32"]


def test_a_process_that_cannot_measure_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", "false")
    assert memory.peak_memory(CASE, "layers", tmp_path) is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direction", ["forward", "train"])
def test_every_op_is_measured_in_the_shape_of_a_model(op: str, direction: str) -> None:
    case = make_case(op, "tiny", batch=2, direction=direction)
    if direction == "train" and not OPS[op].trained:
        rows = list(measure_op(case, ("reference", "torch"), EFFORT, CEILINGS))
        assert [(row.status, row.reason) for row in rows] == [
            ("unavailable", "it is for inference: no backward pass")
        ] * 2
        return
    rows = {
        row.provider: row for row in measure_op(case, ("reference", "torch", "triton"), EFFORT, CEILINGS, model_ms=5.0)
    }
    assert {name: row.status for name, row in rows.items()} == {
        "reference": "timed",
        "torch": "timed",
        "triton": "unavailable",
    }
    if direction == "forward":
        found = rows["torch"]
        assert found.roof is not None
        assert found.roof.bytes > 0
        assert found.amdahl is not None
        assert 0 < found.amdahl.share <= 1 <= found.amdahl.bound


def test_an_op_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = find_op("layer_norm")

    def wrong(*args: object, backend: str, **inputs: Tensor) -> object:
        normed, stream = right(*args, backend=backend, **inputs)
        return (normed * 1.01, stream) if backend == "torch" else (normed, stream)

    monkeypatch.setattr(operators, "find_op", lambda name: wrong)
    rows = list(measure_op(make_case("layer_norm", "tiny"), ("reference", "torch"), EFFORT, CEILINGS))
    assert [row.status for row in rows] == ["timed", "wrong"]
    assert rows[1].timing is None


def test_an_op_that_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ops, "layer_norm")
    rows = list(measure_op(make_case("layer_norm", "tiny"), ("reference", "torch"), EFFORT, CEILINGS))
    assert {row.reason for row in rows} == {"this installation has no layer_norm"}
    assert {row.status for row in rows} == {"unavailable"}


def test_the_registry_has_every_op() -> None:
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert functions - {"backend", "explain"} == set(TRAINED)
    assert all(case.small and case.times(config_of("B/32")) >= 1 for case in OPS.values())


def _activations() -> Iterator[Tensor]:
    for name in ("layer_norm", "message_attention", "temporal_block"):
        inputs = operators.inputs_of(make_case(name, "tiny", batch=4))
        yield next(x for x in inputs.values() if isinstance(x, Tensor) and x.ndim > 1)


def test_activations_have_outlier_channels_and_are_never_zeros() -> None:
    for x in _activations():
        spread = x.flatten(0, -2).std(0)
        usual = spread[2:-2].median()
        assert spread[list(OUTLIERS)].min() > OUTLIER_SCALE / 3 * usual
        assert (x == 0).sum() == 0
    state = setting_of(CASE).state["visual.ln_pre.weight"]
    assert state[list(OUTLIERS)].tolist() == [OUTLIER_SCALE] * 2


def test_inputs_are_the_same_for_every_dtype_but_for_rounding() -> None:
    one, two = (Draw(dtype, "cpu", seed=3)(4, 5) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(one.bfloat16(), two)
    assert not torch.equal(one, Draw(torch.float32, "cpu", seed=4)(4, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "softmax"}, "unknown case 'softmax'"),
        ({"variant": "B/8"}, f"unknown variant 'B/8': choose one of {', '.join(SIZES)}"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"direction": "sideways"}, "unknown mode 'sideways'"),
        ({"input": "frames"}, "unknown input 'frames': choose one of normalised, uint8"),
        ({"input": "uint8", "name": "layer_norm"}, "layer_norm has its own: ask for a model"),
        ({"input": "uint8", "direction": "train"}, "bytes have no gradient to check, use normalised"),
        ({"device": "cuda:7"}, "device 'cuda:7' was asked for: "),
    ],
)
def test_unknown_parts_of_a_case_are_named(change: dict[str, str], words: str) -> None:
    if "device" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        make_case(**({"name": "model", "variant": "tiny"} | change))


def test_an_unknown_cache_is_named() -> None:
    with pytest.raises(InputError, match="unknown cache 'hot': choose one of warm, cold"):
        effort_of(True, "hot")


def test_unknown_providers_are_named_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match="unknown provider 'fastest': choose one of hf-sdpa"):
        run([Job(CASE, ("layers",)), Job(CASE, ("fastest",))], EFFORT, lambda row: pytest.fail("it began"))
    with pytest.raises(InputError, match="unknown provider 'layers' of an op: choose one of reference"):
        run([Job(make_case("layer_norm", "tiny"), ("layers",))], EFFORT, lambda row: None)
