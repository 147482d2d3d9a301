"""The record of decisions: what a file holds, how much of it there is, and what becomes of it when the disk fails."""

from __future__ import annotations

import errno
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server import decision_log
from server.decision_log import DecisionLog
from server.policies.threshold import Memory, Remembered
from server.replay_log import DecisionReader, log_files
from server.types import Decision, Load, QueueView
from tests.unit.decision_lines import CELLS, HEADER, NARROW, WIDE, make_profile, plan_inputs

LOAD = Load(12.5, 1.1, 0.002, 0.003, 0.25, 1.2)
BOTH = (NARROW, WIDE)
MIB = 2**20


def queue(*due: float) -> QueueView:
    return QueueView(due, [BOTH] * len(due), {BOTH: len(due)})


class Recorder:
    """A log of a profile, and what it dropped; ``note`` records a decision that takes the whole queue."""

    def __init__(self, folder: Path, max_bytes: int = MIB) -> None:
        self.profile, self.dropped = make_profile(), 0
        self.log = DecisionLog(
            folder, max_bytes, model="toy", policy="adaptive", profile=self.profile, dropped=self._drop
        )

    def note(self, *due: float, reason: str = "adaptive") -> None:
        self.log.decided(queue(*due), LOAD, 7.0, Decision(WIDE, range(len(due)), (), 0.1, reason))

    def _drop(self, count: int) -> None:
        self.dropped += count


@contextmanager
def recording(folder: Path, max_bytes: int = MIB) -> Iterator[Recorder]:
    recorder = Recorder(folder, max_bytes)
    recorder.log.start()
    yield recorder
    recorder.log.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(folder.iterdir()) for line in lines_of(path)]


def kinds(folder: Path) -> list[str]:
    return [next(iter(line)) for line in lines(folder)]


# -- what it holds


def test_a_file_begins_with_all_that_its_decisions_need(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder:
        recorder.log.planned(plan_inputs())
        recorder.log.decided(
            QueueView([8.0, 9.5], [(WIDE,), BOTH], {BOTH: 1, (WIDE,): 1}),
            LOAD,
            7.25,
            Decision(WIDE, [1], range(1), 0.1 + 0.2, "because"),
        )
    header, profile, plan, decision = lines(tmp_path)
    assert header["header"]["started"]
    assert header["header"] == HEADER | {"policy": "adaptive", "started": header["header"]["started"]}
    assert profile == {"profile": CELLS}
    inputs = plan_inputs()
    assert plan["plan"].keys() == asdict(inputs).keys()
    assert plan["plan"]["seconds"] == [[[1, 0.01], [2, 0.012]], [[1, 0.04], [2, 0.048]]]
    assert (plan["plan"]["budgets_s"], plan["plan"]["max_waiting"]) == ([*inputs.budgets_s], 8)
    assert decision["decision"] == {
        "now": 7.25,
        "load": {
            "arrival_rate": 12.5,
            "interference": 1.1,
            "hop_s": 0.002,
            "respond_s": 0.003,
            "busy": 0.25,
            "tail": 1.2,
        },
        "due": [8.0, 9.5],
        "kinds": [[0.25, 1.0], [1.0]],
        "kind_of": [1, 0],
        "width": 1.0,
        "batch": [1],
        "shed": [0],
        "predicted_s": 0.30000000000000004,
        "reason": "because",
    }


def test_what_a_policy_remembered_is_told_with_the_decision(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder:
        decision = Remembered(WIDE, (0,), (), 0.04, "threshold", Memory(1, 0.1 + 0.2))
        recorder.log.decided(queue(8.0), LOAD, 7.0, decision)
    assert lines(tmp_path)[-1]["decision"]["memory"] == [1, 0.30000000000000004]


def test_only_what_changed_is_told_again(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder:
        recorder.note(8.0)
        recorder.note(8.0)
        recorder.profile.record(NARROW, 2, [1 / 3] * 200)
        recorder.note(8.0)
        recorder.log.planned(plan_inputs())
        recorder.note(8.0)
        recorder.profile.withdraw(WIDE, 2)
        recorder.note(8.0)
    told = lines(tmp_path)[3:]
    assert [next(iter(line)) for line in told] == [
        *("decision", "decision"),
        *("cells", "decision"),
        *("profile", "plan", "decision"),
        *("profile", "plan", "decision"),
    ]
    assert told[2] == {"cells": [[0.25, 2, 0.3333333333333333, 0.3333333333333333]]}
    assert told[5]["plan"]["max_waiting"] == 8
    assert [cell[:2] for cell in told[7]["profile"]] == [[0.25, 1], [1.0, 1], [0.25, 2]]


def test_all_is_written_when_the_server_leaves(tmp_path: Path) -> None:
    with recording(tmp_path / "new" / "folder") as recorder:
        for _ in range(500):
            recorder.note(8.0)
    assert kinds(tmp_path / "new" / "folder").count("decision") == 500
    assert recorder.dropped == 0


def test_one_that_was_never_started_can_be_closed(tmp_path: Path) -> None:
    Recorder(tmp_path / "log").log.close()
    assert not (tmp_path / "log").exists()


# -- how much


def test_the_oldest_are_deleted_before_the_bytes_are_too_many(tmp_path: Path) -> None:
    strangers = tmp_path / "notes.txt"
    strangers.write_text("stay")
    for _ in range(2):  # what an earlier server wrote counts, too
        with recording(tmp_path) as recorder:
            for i in range(1500):
                recorder.note(*(0.1 * k + i for k in range(40)))  # about 700 bytes
    files = sorted(tmp_path.glob("decisions-*.jsonl"))
    sizes = [path.stat().st_size for path in files]
    assert 0.75 * MIB < sum(sizes) <= MIB
    assert max(sizes) <= MIB / 8
    assert recorder.dropped == 0
    for path in files:
        assert [next(iter(line)) for line in lines_of(path)[:4]] == ["header", "profile", "plan", "decision"]
    headers = [lines_of(path)[0]["header"] for path in files]
    assert headers[0]["started"] < headers[-1]["started"], "one file of the earlier server is left"
    assert [header["part"] for header in headers[1:]] == [*range(1, len(files))]
    assert lines_of(files[-1])[-1]["decision"]["due"][0] == 1499
    assert strangers.read_text() == "stay"


def test_what_no_file_can_hold_is_dropped(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder:
        recorder.note(8.0)
        recorder.note(8.0, reason="x" * (MIB // 8))
        recorder.note(8.0)
    assert recorder.dropped == 1
    assert kinds(tmp_path) == ["header", "profile", "plan", "decision", "gap", "profile", "plan", "decision"]


# -- when the disk does not keep up


def test_a_slow_disk_costs_decisions_and_the_record_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.note(8.0)
    with monkeypatch.context() as full:
        full.setattr(decision_log, "MAX_PENDING_BYTES", 0)
        recorder.note(9.0)
        recorder.profile.record(NARROW, 1, [0.5] * 200)
        recorder.note(10.0)
    recorder.note(11.0)
    assert recorder.dropped == 2
    recorder.log.start()
    recorder.log.close()
    *_, last, gap, profile, plan, next_one = lines(tmp_path)
    assert last["decision"]["due"] == [8.0]
    assert gap == {"gap": 2}
    assert profile["profile"][0] == [0.25, 1, 0.5, 0.5]
    assert plan == {"plan": None}
    assert next_one["decision"]["due"] == [11.0]


def test_a_gap_before_a_new_file_is_told_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording(tmp_path) as recorder:
        with monkeypatch.context() as full:
            full.setattr(decision_log, "MAX_PENDING_BYTES", 0)
            recorder.note(8.0)
        recorder.note(9.0)
    assert lines(tmp_path)[0]["header"]["part"] == 1
    assert kinds(tmp_path) == ["header", "gap", "profile", "plan", "decision"]


def test_a_folder_that_cannot_be_written_is_told_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING), recording(tmp_path / "file" / "log") as recorder:
        for _ in range(3):
            recorder.note(8.0)
    recorder.note(8.0)
    (warning,) = caplog.messages
    assert warning.startswith("decisions cannot be recorded: ")
    assert "file" in warning
    assert recorder.dropped == 4


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def room_for(file_bytes: int) -> Iterator[None]:
    """No file can grow larger: the last write fits in part, as on a disk that fills up."""
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))


def test_a_disk_that_fills_up_keeps_what_it_took_and_is_not_tried_again_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "WRITE_EVERY_S", 0.001)
    with caplog.at_level(logging.WARNING), room_for(5000), recording(tmp_path) as recorder:
        for _ in range(30):  # about 200 bytes each
            recorder.note(8.0)
        time.sleep(0.05)  # many rounds
        recorder.note(9.0)
    assert len(caplog.messages) == 1
    (path,) = tmp_path.iterdir()
    assert path.read_text().endswith("\n")
    written = sum("decision" in line for line in lines_of(path))
    assert 15 < written < 25
    assert written + recorder.dropped == 31


def test_once_the_disk_has_room_it_is_recorded_again_behind_a_gap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "WRITE_EVERY_S", 0.001)
    with caplog.at_level(logging.INFO), recording(tmp_path) as recorder:
        with room_for(5000):
            for _ in range(30):  # about 200 bytes each
                recorder.note(8.0)
            wait_until(lambda: recorder.dropped > 0)
            recorder.note(8.0)
            for _ in range(3):  # and it stays full
                monkeypatch.setattr(decision_log, "TRY_AGAIN_S", 0.0)
                dropped = recorder.dropped
                recorder.note(8.0, reason="x" * 5000)
                wait_until(lambda: recorder.dropped > dropped)  # noqa: B023
                monkeypatch.setattr(decision_log, "TRY_AGAIN_S", 1000.0)
                recorder.note(8.0)
        recorder.note(8.0)
        monkeypatch.setattr(decision_log, "TRY_AGAIN_S", 0.0)
        recorder.note(9.0)
    assert caplog.messages == [
        "decisions cannot be recorded: [Errno 27] File too large",
        "decisions can be recorded again",
    ]
    _, second = sorted(tmp_path.iterdir())
    header, gap, profile, plan, decision = lines_of(second)
    assert (header["header"]["part"], gap) == (2, {"gap": recorder.dropped})
    assert ("profile" in profile, plan, decision["decision"]["due"]) == (True, {"plan": None}, [9.0])
    reader = DecisionReader(log_files(tmp_path))
    assert sum(1 for _ in reader) + reader.missing == 30 + 1 + 3 * 2 + 2
    assert (reader.gaps, reader.cut_off) == (1, [])


def test_a_gap_that_was_written_in_part_of_a_decision_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "WRITE_EVERY_S", 0.001)
    monkeypatch.setattr(decision_log, "TRY_AGAIN_S", 0.0)
    with recording(tmp_path) as recorder:
        recorder.note(8.0)
        wait_until(lambda: kinds(tmp_path)[-1:] == ["decision"])
        with monkeypatch.context() as full:
            full.setattr(decision_log, "MAX_PENDING_BYTES", 0)
            recorder.note(8.0)
        (path,) = tmp_path.iterdir()
        with room_for(path.stat().st_size + len('{"gap":1}\n')):
            recorder.note(8.0)
            wait_until(lambda: recorder.dropped == 2)
        recorder.note(8.0)
    reader = DecisionReader(log_files(tmp_path))
    assert (sum(1 for _ in reader), reader.missing) == (2, 2)


def test_no_memory_to_write_costs_what_was_to_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "WRITE_EVERY_S", 0.001)
    monkeypatch.setattr(decision_log, "TRY_AGAIN_S", 0.0)
    with recording(tmp_path) as recorder:
        with monkeypatch.context() as poor:
            poor.setattr(decision_log, "accumulate", mock.Mock(side_effect=MemoryError))
            recorder.note(8.0)
            wait_until(lambda: recorder.dropped == 1)
        with monkeypatch.context() as poor:
            poor.setattr(decision_log, "_encode", mock.Mock(side_effect=MemoryError))
            recorder.note(8.0)
        recorder.note(9.0)
    assert recorder.dropped == 2
    assert kinds(tmp_path) == ["header", "gap", "profile", "plan", "decision"]
    assert lines(tmp_path)[1] == {"gap": 2}


def test_files_that_somebody_else_deletes_are_nothing_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decisions-0.jsonl").symlink_to(tmp_path / "gone")  # listed, and then not there
    with recording(tmp_path) as recorder:
        recorder.note(8.0)
    assert recorder.dropped == 0
    assert not caplog.messages


def test_a_full_disk_is_no_reason_to_stop_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def write(self, *_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        truncate = close = write

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: FullDisk())
    with caplog.at_level(logging.WARNING), recording(tmp_path) as recorder:
        recorder.note(8.0)
    recorder.note(9.0)
    (warning,) = caplog.messages
    assert warning.endswith("No space left on device")
    assert recorder.dropped == 2
