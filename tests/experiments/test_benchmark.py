"""`saelens-cosine benchmark`: what it writes and prints, that it times what it says, and what it refuses."""

import contextlib
import io
import json
import math
from functools import partial

import pytest
import torch

from saelens_cosine.cli import main
from saelens_cosine.experiments.benchmark import clock as clock_module
from saelens_cosine.experiments.benchmark import run as benchmark
from saelens_cosine.experiments.benchmark.results import Benchmark, Row
from saelens_cosine.experiments.benchmark.run import WARM_UP
from saelens_cosine.experiments.benchmark.settings import SAELENS_ARMS, BenchmarkSettings
from saelens_cosine.saes import scored_sae

SIZE = ["--d-in", "16", "--d-sae", "128", "--batch", "32", "--k", "2"]
ARMS = [
    "saelens_topk",
    "saelens_topk_sparse",
    "cosine_topk/reference",
    "cosine_topk/fast",
    "saelens_batchtopk",
    "per_feature_cosine_batchtopk/fast",
]
REPEATS = 2


def small_copy(patch):
    """Bandwidth from 1 MiB instead of 256, which takes longer than all else here."""
    ones = torch.ones
    patch.setattr(torch, "ones", lambda *size, **options: ones(2**18 if size == (2**26,) else size, **options))


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch):
    small_copy(monkeypatch)


class Run:
    """One run of the command with everything that a test looks at."""

    def __init__(self, folder, patch):
        self.path = folder / "new" / "benchmark.json"
        self.steps, self.precisions, self.fast = [], set(), []
        self.arms = {}
        init, step, fast_encode = benchmark.Arm.__init__, benchmark.Arm.step, scored_sae.fast_encode

        def spy_init(arm, name, settings, clock):
            init(arm, name, settings, clock)
            self.arms[name] = arm

        def spy_step(arm, batch):
            self.steps.append(next(name for name, other in self.arms.items() if other is arm))
            self.precisions.add(torch.get_float32_matmul_precision())
            assert batch.shape == (32, 16)
            step(arm, batch)

        def spy_encode(sae, x):
            self.fast.append(f"{sae.cfg.architecture()}/{sae.cfg.kernels}")
            return fast_encode(sae, x)

        patch.setattr(benchmark.Arm, "__init__", spy_init)
        patch.setattr(benchmark.Arm, "step", spy_step)
        patch.setattr(scored_sae, "fast_encode", spy_encode)
        out, err = io.StringIO(), io.StringIO()
        flags = [*SIZE, "--repeats", str(REPEATS), "--arms", *ARMS, "--json", str(self.path), "--quiet"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.status = main(["benchmark", *flags])
        self.out, self.err = out.getvalue(), err.getvalue()
        self.content = json.loads(self.path.read_text())
        self.rows = {row["arm"]: row for row in self.content["rows"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with pytest.MonkeyPatch.context() as patch:
        small_copy(patch)
        yield Run(tmp_path_factory.mktemp("benchmark"), patch)
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


def test_json_has_every_figure(run):
    assert run.status == 0
    assert run.content["schema"] == "saelens-cosine/benchmark/1"
    assert set(run.content) == {
        "schema", "rows", "product_ms", "optimizer_ms", "floor_ms", "bandwidth_gb_s", "optimizer_bytes_ms"
    }  # fmt: skip
    assert [row["arm"] for row in run.content["rows"]] == ARMS
    size = {"d_in": 16, "d_sae": 128, "batch": 32, "k": 2, "device": "cpu", "dtype": "float32"}
    for name, row in run.rows.items():
        assert {key: row[key] for key in size} == size
        for key in ("step_ms", "ratio_to_saelens", "ratio_to_floor", "encode_ms"):
            assert row[key] > 0, key
        first, third = row["step_spread_ms"]
        assert first <= row["step_ms"] <= third
        assert row["peak_bytes_over_state"] is None or row["peak_bytes_over_state"] >= 0
        assert (row["encode_sparse_ms"] is None) == name.startswith("saelens")
        assert set(row["parts_ms"]) == {
            "scores", "selection", "decode", "rest_of_forward", "counters", "backward", "clip_and_optimizer"
        }  # fmt: skip
        assert row["parts_ms"]["backward"] > 0
    assert [path.name for path in run.path.parent.iterdir()] == ["benchmark.json"]


def test_ratios_are_of_this_runs_times(run):
    floor = run.content["floor_ms"]
    assert floor == pytest.approx(run.content["product_ms"] + run.content["optimizer_ms"])
    for name, row in run.rows.items():
        saelens = "saelens_batchtopk" if "batchtopk" in name else "saelens_topk"
        assert row["ratio_to_floor"] == pytest.approx(row["step_ms"] / floor)
        assert row["ratio_to_saelens"] == pytest.approx(row["step_ms"] / run.rows[saelens]["step_ms"])
    # 28 bytes for each of the 2 * 16 * 128 weights
    adam_ms = 28 * 2 * 16 * 128 / (run.content["bandwidth_gb_s"] * 1e9) * 1e3
    assert run.content["optimizer_bytes_ms"] == pytest.approx(adam_ms)


def test_tables_are_printed(run):
    title = "Training step (d_in 16, d_sae 128, batch 32, k 2, cpu, float32)"
    assert run.out.startswith(title)
    steps, rest = run.out.split("Where a step's time goes")
    parts, encoding = rest.split("Encoding a batch")
    for name in ARMS:
        assert f" {name} " in steps
        assert f" {name} " in parts
        assert (f" {name} " in encoding) == (not name.endswith("/reference"))  # the saved SAE is the same
        assert f" {run.rows[name]['step_ms']:.1f} " in steps
        assert f" {run.rows[name]['encode_ms']:.1f} " in encoding or name.endswith("/reference")
    assert run.err == ""


def test_arms_take_turns(run):
    rounds = WARM_UP + REPEATS
    assert run.steps[: rounds * len(ARMS)] == ARMS * rounds


def test_arms_take_the_path_that_they_name(run):
    fast = [name for name in ARMS if name.endswith("/fast")]
    assert set(run.fast) == set(fast)
    for name in fast:
        assert run.fast.count(name) == run.steps.count(name)
    assert run.arms["saelens_topk_sparse"].sae.cfg.use_sparse_activations
    assert run.precisions == {"highest"}


def test_only_fast_arms_use_the_fused_optimizer(run):
    for name, arm in run.arms.items():
        assert bool(arm.trainer.optimizer.param_groups[0]["fused"]) == name.endswith("/fast"), name
        assert arm.trainer.n_training_steps == run.steps.count(name)


def test_figures_are_medians_without_the_warm_up(monkeypatch):
    # a clock that reads 1000 while warming up, then 1, 2 and 6 for the arm and ten times that for the floor's parts
    arm, calls = "cosine_topk/fast", iter(range(1000))

    def time(clock, run):
        run()
        i = next(calls)
        step, what = divmod(i, 4) if i < 4 * (WARM_UP + 3) else divmod(i - 4 * (WARM_UP + 3), 2)
        return (
            1000 if step < WARM_UP else [1, 2, 6][step - WARM_UP] * (1 if i >= 4 * (WARM_UP + 3) or what == 0 else 10)
        )

    monkeypatch.setattr(benchmark.Clock, "time", time)
    seen = []
    settings = BenchmarkSettings(arms=(arm,), d_in=16, d_sae=128, batch=32, k=2, repeats=3)
    result = benchmark.benchmark(settings, lambda *progress: seen.append(progress))
    (row,) = result.rows
    assert row.step_ms == 2
    assert row.step_spread_ms == (1.5, 4)  # halfway between 1 and 2, and between 2 and 6
    assert (result.product_ms, result.optimizer_ms, result.floor_ms) == (20, 20, 40)
    assert row.ratio_to_floor == 2 / 40
    assert row.ratio_to_saelens is None
    assert (row.encode_ms, row.encode_sparse_ms) == (2, 2)
    # the copy reads and writes 4 * 2**18 bytes in 20 ms
    assert result.bandwidth_gb_s == pytest.approx(2 * 4 * 2**18 / 20e-3 / 1e9)
    for what in {what for what, _, _ in seen}:
        done, total = zip(*((done, total) for name, done, total in seen if name == what), strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == total[-1]


def rows(**step_ms):
    return [Row(name.replace("__", "/"), 16, 128, 32, 2, "cpu", "float32", ms) for name, ms in step_ms.items()]


@pytest.mark.parametrize(
    ("step_ms", "expected"),
    [
        # each selector has its own class to compare with
        ({"saelens_topk": 2, "saelens_batchtopk": 8, "cosine_topk__fast": 1, "cosine_batchtopk__fast": 2}, [1, 1, 0.5, 0.25]),
        ({"saelens_topk": 2, "cosine_topk__fast": 1, "cosine_batchtopk__fast": 4}, [1, 0.5, 2]),  # or the other
        ({"saelens_topk_sparse": 4, "cosine_topk__fast": 1}, [1, 0.25]),
        ({"cosine_topk__fast": 1, "cosine_batchtopk__fast": 4}, [None, None]),
    ],
    ids=["both", "one", "sparse", "none"],
)  # fmt: skip
def test_what_ratios_are_taken_to(step_ms, expected):
    measured = rows(**step_ms)
    benchmark._compare(measured, 4.0)
    assert [row.ratio_to_saelens for row in measured] == expected
    assert [row.ratio_to_floor for row in measured] == [ms / 4 for ms in step_ms.values()]


def test_what_was_not_measured_is_left_out_of_the_tables():
    (row,) = measured = rows(saelens_topk=2)
    row.encode_ms, row.parts_ms = 3.0, {"scores": 1.0}
    benchmark._compare(measured, 4.0)
    steps, parts, encoding = Benchmark(measured, 1.5, 2.5, 10.0, 0.1).tables()
    cells = [[next(iter(column.cells)) for column in table.columns] for table in (steps, parts, encoding)]
    assert cells == [["saelens_topk", "2.0", "nan to nan", "1.000", "0.50", ""], ["saelens_topk", "1.0"], ["saelens_topk", "3.0", "", "2.00"]]  # fmt: skip


@pytest.mark.parametrize(("dtype", "during"), [("tf32", "high"), ("bfloat16", "highest")])
def test_precisions(dtype, during, monkeypatch):
    before, seen = torch.get_float32_matmul_precision(), set()
    step = benchmark.Arm.step

    def spy(arm, batch):
        step(arm, batch)
        seen.add((torch.get_float32_matmul_precision(), arm.trainer.cfg.autocast, arm.sae.W_enc.dtype))

    monkeypatch.setattr(benchmark.Arm, "step", spy)
    settings = BenchmarkSettings(("saelens_topk", "cosine_topk/fast"), 16, 128, 32, 2, dtype=dtype, repeats=1)
    result = benchmark.benchmark(settings)
    assert seen == {(during, dtype == "bfloat16", torch.float32)}
    assert torch.get_float32_matmul_precision() == before
    assert all(math.isfinite(row.ratio_to_floor) for row in result.rows)


def test_parts_and_encoding_are_measured_in_the_precision_that_is_named(monkeypatch):
    """SAELens' scores, which are timed on their own beside a step, and the saved SAEs."""
    seen, init, saved = [], benchmark.Arm.__init__, benchmark.Arm.saved

    def watched(owner, name, what):
        method = getattr(owner, name)

        def run(*args):
            seen.append((what, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")))
            return method(*args)

        setattr(owner, name, run)

    def spy_init(arm, *args):
        init(arm, *args)
        watched(arm.sae, "process_sae_in", "scores")

    def spy_saved(arm):
        sae = saved(arm)
        for method in ("encode", "encode_sparse"):
            if hasattr(sae, method):
                watched(sae, method, method)
        return sae

    monkeypatch.setattr(benchmark.Arm, "__init__", spy_init)
    monkeypatch.setattr(benchmark.Arm, "saved", spy_saved)
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", False)):
        seen.clear()
        benchmark.benchmark(
            BenchmarkSettings(("saelens_topk", "cosine_topk/fast"), 16, 128, 32, 2, dtype=dtype, repeats=1)
        )
        assert set(seen) == {(what, expected) for what in ("scores", "encode", "encode_sparse")}


class FakeGPU:
    """A device that works at its own pace: what the host's clock says of it counts for nothing."""

    def __init__(self, patch):
        self.queue, self.work = [], {"copy": 0.5, "run": 3.0}
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream of cuda:1"
                gpu.queue.append("event")
                self.time = sum(gpu.work.get(what, 0.0) for what in gpu.queue)

            def elapsed_time(self, end):
                return end.time - self.time

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        patch.setattr(torch.cuda, "synchronize", lambda device: gpu.queue.append(f"wait for {device}"))


def test_what_the_device_itself_takes_is_read_off_its_own_clock_behind_queued_work(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    clock = benchmark.Clock("cuda:1")
    assert clock.on_device(lambda: gpu.queue.append("run"), lambda: gpu.queue.append("copy")) == 3.0
    copies = ["copy"] * clock_module.QUEUED
    assert gpu.queue == ["wait for cuda:1", *copies, "event", "run", "event", "wait for cuda:1"]


def test_floor_and_bandwidth_are_the_devices_own_time(monkeypatch):
    def on_device(clock, run, before):
        run()
        return {"product": 2.0, "copy": 0.25}.get(getattr(run, "func", run).__name__, 3.0)

    monkeypatch.setattr(benchmark.Clock, "on_device", on_device)
    result = benchmark.benchmark(BenchmarkSettings(("cosine_topk/fast",), 16, 128, 32, 2, repeats=2))
    assert (result.product_ms, result.optimizer_ms, result.floor_ms) == (2, 3, 5)
    assert result.bandwidth_gb_s == pytest.approx(2 * 4 * 2**18 / 0.25e-3 / 1e9)


@pytest.mark.gpu
def test_a_gpus_own_time_is_below_the_hosts():
    clock, source = benchmark.Clock("cuda"), torch.zeros(2**26, device="cuda")
    copy = partial(torch.empty_like(source).copy_, source)
    device, host = (
        sorted(measure() for _ in range(9))[4]
        for measure in (partial(clock.on_device, copy, copy), partial(clock.time, copy))
    )
    assert 0 < device <= host


def test_a_failure_restores_the_precision(monkeypatch):
    monkeypatch.setattr(benchmark.Arm, "step", lambda arm, batch: 1 / 0)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError):
        benchmark.benchmark(BenchmarkSettings(("saelens_topk",), 16, 128, 32, 2, dtype="tf32"))
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--arms", "cosine_magic/fast"], "Unknown architecture 'cosine_magic'"),
        (["--arms", "saelens_magic"], "Unknown architecture 'saelens_magic'"),
        (["--arms", "cosine_topk"], "Unknown arm 'cosine_topk'"),
        (["--arms", "saelens_topk", "cosine_topk/quick"], "Unknown arm 'cosine_topk/quick'"),
        (["--arms", "topk/fast"], "Unknown arm 'topk/fast'"),  # SAELens' own has one path
        (["--repeats", "0"], "repeats=0 must be positive"),
        (["--arms", "cosine_topk/fast", "--k", "129"], "k=129 features cannot be active out of d_sae=128"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(flags, reason, tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    try:
        status = main(["benchmark", *SIZE, "--json", str(path), "--quiet", *flags])
    except SystemExit as stopped:  # argparse's own way
        status = stopped.code
    assert status == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_settings_refuse_an_unknown_dtype():
    with pytest.raises(ValueError, match="dtype='float16' is none of float32, tf32, bfloat16"):
        BenchmarkSettings(dtype="float16")


def test_defaults_measure_every_fast_architecture_on_both_paths():
    arms = BenchmarkSettings().arms
    assert set(SAELENS_ARMS) < set(arms)
    ours = [
        *(f"{score}_{k}" for score in ("inner_product", "cosine", "per_feature_cosine") for k in ("topk", "batchtopk")),
        "cosine_abstopk",
        "cosine_matryoshka_batchtopk",
        "magnitude_bypass_batchtopk",
    ]
    assert {f"{name}/{path}" for name in ours for path in ("reference", "fast")} == set(arms) - set(SAELENS_ARMS)
