"""The engine benchmark's arithmetic, its taking turns, and that every rival computes what it claims to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import engine as benchmark
from benchmarks.agreement import Agreement, compare, in_batches
from benchmarks.agreement import as_json as agreement_as_json
from benchmarks.dated_file import Setting
from benchmarks.engine_report import Report, Row, as_json, markdown, row_of, summary, table
from benchmarks.engine_rivals import Dense, export, rivals_of
from benchmarks.engine_server import Served, every_width_runs
from benchmarks.engine_timing import MAX_RUNS, MIN_ROUNDS, in_turns, matmul_rate, switch_cost
from scala_model.checkpoint import build_model, read_checkpoint
from scala_model.cost import Cost
from scala_model.vit import ScalaViT
from scala_model.width import Width
from tests.unit.toy import CONFIG, SIZE, write_toy

CPU = torch.device("cpu")
HALF, FULL = Width(0.5), Width(1)


# -- numbers


def report() -> Report:
    return Report(
        device="A chip",
        engine="fast 1",
        threads=2,
        precision="bfloat16",
        rows=[
            Row(HALF, 1, 50_000_000, 2.0, {"eager": 8.0, "compiled": 4.0}),
            Row(FULL, 4, 100_000_000, 10.0, {"eager": 5.0}),
        ],
        ceiling_flops=4e11,
        switch_ms=0.25,
        served=Served(ready_s=1.5, all_widths_s=3.25, rss_mib=200.0, rss_batches_mib=250.0),
    )


def test_the_best_rival_is_the_fastest_of_the_cell() -> None:
    first, second = report().rows
    assert (first.best_rival, first.ratio) == ("compiled", 0.5)
    assert (second.best_rival, second.ratio) == ("eager", 2.0)
    assert report().geometric_mean_ratio == pytest.approx(1.0)  # (1/2 x 2) ^ (1/2)


def test_the_ceiling_counts_two_operations_a_multiply_add_of_every_image() -> None:
    first, second = report().rows
    assert first.ceiling_fraction(4e11) == pytest.approx(0.125)  # 1e8 in 2 ms is 5e10 a second
    assert second.ceiling_fraction(4e11) == pytest.approx(0.2)  # 4 x 2e8 in 10 ms is 8e10


def test_a_row_tells_ours_from_the_rivals_in_milliseconds() -> None:
    row = row_of(HALF, 4, Cost(parameters=1, macs=7), {"a": 0.002, "ours": 0.001, "b": 0.5}, "ours")
    assert row == Row(HALF, 4, 7, 1.0, {"a": 2.0, "b": 500.0})


def test_the_line_of_json_holds_what_was_measured() -> None:
    found = json.loads(json.dumps(as_json(report(), {"torch": "2"})))
    assert found["rows"][0] == {
        "width": 0.5,
        "batch": 1,
        "ours_ms": 2.0,
        "best_rival": "compiled",
        "best_rival_ms": 4.0,
        "ratio": 0.5,
        "ceiling_fraction": 0.125,
        "rivals_ms": {"eager": 8.0, "compiled": 4.0},
    }
    del found["rows"]
    assert found == {
        "device": "A chip",
        "engine": "fast 1",
        "threads": 2,
        "precision": "bfloat16",
        "versions": {"torch": "2"},
        "geometric_mean_ratio": 1.0,
        "ceiling_tflops": 0.4,
        "switch_ms": 0.25,
        "rss_mib": 200.0,
        "rss_batches_mib": 250.0,
        "ready_s": 1.5,
        "all_widths_s": 3.25,
    }


def test_a_rival_that_was_not_measured_is_a_dash() -> None:
    assert table(report()) == [
        ["width", "batch", "ours", "eager", "compiled", "ours / best", "of the ceiling"],
        ["0.5", "1", "2.00", "8.00", "4.00", "0.50", "12%"],
        ["1", "4", "10.00", "5.00", "–", "2.00", "20%"],
    ]


def test_the_dated_file_says_how_and_what_not() -> None:
    versions = {"Python": "3", "torch": "2"}
    setting = Setting("2030-01-02", "python -m benchmarks.engine", "abc123", "2 cores", versions, "8 px")
    text = markdown(report(), setting, minutes=3.0)
    assert text.startswith("# The engine beside other runtimes, A chip, 2030-01-02\n\n* Command: `python -m")
    for wanted in ("commit abc123, Python 3, torch 2", "2 CPU threads", "over 3 minutes", "Not measured: "):
        assert wanted in text
    assert "| 1 | 4 | 10.00 | 5.00 | – | 2.00 | 20% |" in text.splitlines()
    assert all(f"* {sentence}" in text.splitlines() for sentence in summary(report()))
    assert "ready 1.5 s after its start, at every width after 3.2 s, and holds 200 MiB" in text
    assert max(map(len, text.splitlines())) <= 160


# -- taking turns


class Machine:
    """A clock that only runs advance, and a record of them."""

    def __init__(self) -> None:
        self.now, self.done, self.rested_s = 0.0, list[str](), 0.0

    def clock(self) -> float:
        return self.now

    def rest(self, seconds: float) -> None:
        self.rested_s += seconds

    def run(self, name: str, *lasting_s: float) -> Callable[[], None]:
        """A run that lasts, from call to call, as long as given; the last time again and again."""
        remaining = list(lasting_s)

        def work() -> None:
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.done.append(name)

        return work


def test_all_take_turns_each_with_one_uncounted_run() -> None:
    machine = Machine()
    runs = {"a": machine.run("a", 0.03), "b": machine.run("b", 0.01)}
    found = in_turns(runs, 0.0, machine.clock, machine.rest)
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.01)}
    round_ = ["a"] * (1 + 3) + ["b"] * (1 + 3)  # 0.1 s hold three runs of the slowest
    assert machine.done == ["a", "b", *round_ * MIN_ROUNDS]
    assert machine.rested_s > 0


def test_the_run_that_warms_a_turn_is_not_counted() -> None:
    machine = Machine()
    cold_then_warm = [9.0, *[0.5, 0.2] * MIN_ROUNDS]  # one run a turn, for the first took 9 s
    found = in_turns({"a": machine.run("a", *cold_then_warm)}, 0.0, machine.clock, machine.rest)
    assert found == {"a": pytest.approx(0.2)}
    assert len(machine.done) == 1 + 2 * MIN_ROUNDS


def test_rounds_go_on_until_the_time_is_spent() -> None:
    machine = Machine()
    in_turns({"a": machine.run("a", 0.001)}, 1.0, machine.clock, machine.rest)
    assert 1.0 <= machine.now < 1.0 + 0.001 * (MAX_RUNS + 2)
    assert (len(machine.done) - 1) % (1 + MAX_RUNS) == 0


def test_a_median_does_not_follow_a_hiccup() -> None:
    machine = Machine()
    run = machine.run("a", 0.06, 0.06, 5.0, 0.06)  # the third is the first that counts
    assert in_turns({"a": run}, 0.0, machine.clock, machine.rest) == {"a": pytest.approx(0.06)}
    assert machine.now > 5


def test_a_switch_costs_what_a_run_takes_longer_after_another_width() -> None:
    machine, before = Machine(), list[str]()
    own = {"narrow": 1.0, "middle": 2.0, "wide": 4.0}
    penalty = {("narrow", "wide"): 0.8, ("wide", "narrow"): 0.4, ("narrow", "middle"): 0.2, ("middle", "narrow"): 0.2}

    def run(width: str) -> None:
        machine.now += own[width] + (penalty.get((before[-1], width), 0.0) if before else 0.0)
        before.append(width)

    pairs = [("narrow", "wide"), ("narrow", "middle")]
    assert switch_cost(run, pairs, 5, machine.clock) == pytest.approx((0.8 + 0.4 + 0.2 + 0.2) / 4)


def test_a_matrix_product_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.engine_timing.MATMUL_SIZE", {"cpu": 64})
    assert 1e6 < matmul_rate(CPU, torch.float32, 2) < 1e14


def test_widths_that_run_a_batch() -> None:
    widths: list[dict[str, Any]] = [{"latency_ms": {"1": {}, "16": {}}}, {"latency_ms": {"1": {}}}]
    assert every_width_runs(widths, 1)
    assert not every_width_runs(widths, 16)


# -- rivals


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ScalaViT:
    return build_model(read_checkpoint(write_toy(tmp_path_factory.mktemp("toy"))))


@pytest.fixture(scope="module")
def dense(model: ScalaViT, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    pytest.importorskip("onnxruntime", reason="the rivals come with the extra 'bench'")
    return export(model, HALF, tmp_path_factory.mktemp("onnx"))


PIXELS = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def test_every_rival_computes_the_network_from_pixels_to_probabilities(model: ScalaViT, dense: Dense) -> None:
    scaled = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (scaled - mean[:, None, None]) / std[:, None, None]
    expected = F.softmax(model(images, HALF), -1).detach().numpy()
    for name, prepare in rivals_of(dense, 3, CPU, 1, compiled=False).items():
        run = prepare()
        answered = run(PIXELS).copy()
        assert answered.dtype == np.float32
        rtol, atol = (1e-4, 1e-7) if name.endswith("f32") else (0.05, 1e-3)
        np.testing.assert_allclose(answered, expected, rtol, atol, err_msg=name)
        np.testing.assert_allclose(run(PIXELS[::-1].copy()), expected[::-1], rtol, atol, err_msg=name)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "images that look alike would prove nothing"


def test_compiling_is_a_rival_only_where_it_is_asked_for(dense: Dense) -> None:
    with_it, without = (set(rivals_of(dense, 1, CPU, 1, compiled=compiled)) for compiled in (True, False))
    assert {name.rpartition(" ")[0] for name in with_it - without} == {"torch compile"}
    assert {"torch eager f32", "ONNX Runtime f32"} <= without


def test_an_engine_that_computes_something_else_is_found_out(dense: Dense) -> None:
    prepared = {name: prepare() for name, prepare in rivals_of(dense, 3, CPU, 1, compiled=False).items()}
    specification = dense.classifier(torch.float32)
    benchmark._check(prepared, PIXELS, specification)
    prepared["uniform"] = lambda pixels: np.full((len(pixels), CONFIG.num_classes), 1 / CONFIG.num_classes, np.float32)
    with pytest.raises(AssertionError, match="uniform answers something else"):
        benchmark._check(prepared, PIXELS, specification)


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--widths", "0.3"], "width 0.3 was not trained; trained widths: 0.25, 0.5, 0.75, 1"),
        (["--batches", "4", "0"], "--batches has 0: give numbers of images, at least 1"),
        (["--minutes", "0"], "--minutes is 0.0: give a number above 0"),
        (["--minutes", "nan"], "--minutes is nan: give a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--device", "cpu", "--checkpoint", str(write_toy(tmp_path)), *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].endswith(sentence)


# -- agreement


def test_agreement_counts_first_answers_and_the_largest_difference() -> None:
    expected = np.array([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.45, 0.55]], np.float32)
    answered = np.array([[0.6, 0.4], [0.3, 0.7], [0.7, 0.3], [0.51, 0.49]], np.float32)
    one = compare("fast", "bf16", HALF, answered, expected, np.array([0, 0, 0, 1]))
    assert (one.equal, one.accuracy, one.expected_accuracy) == (0.75, 0.5, 0.75)
    assert one.points == -25
    assert one.largest_difference == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("precision", "equal", "accuracy", "largest", "within"),
    [
        ("bf16", 0.99, 0.503, 0.5, True),
        ("bf16", 0.989, 0.5, 0.0, False),
        ("bf16", 1.0, 0.504, 0.0, False),
        ("bf16", 1.0, 0.496, 0.0, False),
        ("f32", 0.9, 0.4, 1e-4, True),
        ("f32", 1.0, 0.5, 2e-4, False),
    ],
)
def test_bounds_are_those_of_the_precision(
    precision: Any, equal: float, accuracy: float, largest: float, within: bool
) -> None:
    good = Agreement("torch", "f32", FULL, 1.0, 0.5, 0.5, 0.0)
    one = Agreement("fast", precision, HALF, equal, accuracy, 0.5, largest)
    assert one.within_bounds is within
    found = agreement_as_json([good, one], "toy", 7)
    assert [row["within_bounds"] for row in found["rows"]] == [True, within]
    assert found["within_bounds"] is within


def test_all_images_are_answered_in_order_the_last_batch_too() -> None:
    pixels = np.arange(37, dtype=np.uint8).reshape(37, 1, 1, 1)
    sizes = list[int]()

    def run(batch: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        sizes.append(len(batch))
        return batch.reshape(-1, 1).astype(np.float32)

    assert in_batches(run, pixels).flatten().tolist() == list(range(37))
    assert sizes == [16, 16, 5]
