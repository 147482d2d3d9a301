"""Which engine serves: what the settings name, or the fastest that is installed and has a device."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scala_model.checkpoint import Checkpoint, read_checkpoint
from scala_model.config import variant
from server import engine as choice
from server.engine import engine_of, num_threads_for
from server.engine.openvino_engine import OpenVinoEngine
from server.engine.torch_engine import TorchEngine
from server.settings import Settings, SettingsError
from tests.unit.toy import write_toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy"))


@pytest.fixture(autouse=True)
def _without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_has_cuda", lambda: False)


def uninstall(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name in packages else find_spec(name))


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_cpu_is_served_by_openvino(checkpoint: Checkpoint, device: Any) -> None:
    engine = engine_of(Settings(device=device), checkpoint, 4.0)
    assert isinstance(engine, OpenVinoEngine)
    assert (engine.threads, engine.max_batch) == (3, 16)


@pytest.mark.parametrize(
    ("cpus", "light", "heavy"), [(0.1, 1, 1), (1, 1, 1), (1.9, 1, 1), (2, 1, 2), (3.5, 2, 3), (64.0, 63, 64)]
)
def test_a_light_network_leaves_a_core_to_http(cpus: float, light: int, heavy: int, checkpoint: Checkpoint) -> None:
    deit_s = variant("deit-s", image_size=64, patch_size=8, num_classes=200)
    assert num_threads_for(cpus, checkpoint.config) == light
    assert num_threads_for(cpus, deit_s) == heavy


def test_threads_and_batch_may_be_set(checkpoint: Checkpoint) -> None:
    engine = engine_of(Settings(num_threads=2, max_batch=5), checkpoint, 4.0)
    assert (engine.threads, engine.max_batch) == (2, 5)


def test_the_specification_may_be_asked_for(checkpoint: Checkpoint) -> None:
    assert isinstance(engine_of(Settings(engine="torch"), checkpoint, 1.0), TorchEngine)


def test_without_openvino_torch_serves_and_it_is_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninstall(monkeypatch, "openvino")
    with caplog.at_level(logging.WARNING):
        assert isinstance(engine_of(Settings(), checkpoint, 1.0), TorchEngine)
    assert "OpenVINO is not installed" in caplog.text
    assert "pip install 'scala-serve[cpu]'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "missing", "sentence"),
    [
        ({"engine": "openvino"}, ["openvino"], "engine 'openvino' needs OpenVINO: pip install 'scala-serve[cpu]'"),
        ({"engine": "torch"}, ["torch"], "engine 'torch' needs torch: pip install 'scala-serve[torch]'"),
        ({"engine": "cuda_graphs"}, ["torch"], "engine 'cuda_graphs' needs torch: pip install 'scala-serve[torch]'"),
        ({}, ["openvino", "torch"], "no engine is installed: pip install 'scala-serve[cpu]'"),
        ({"device": "cuda"}, [], "torch finds no CUDA device; use device 'cpu' or 'auto'"),
        ({"engine": "cuda_graphs"}, [], "torch finds no CUDA device; use device 'cpu' or 'auto'"),
        ({"engine": "cuda_graphs", "device": "cpu"}, [], "engine 'cuda_graphs' runs on a GPU"),
        ({"engine": "openvino", "device": "cuda"}, [], "engine 'openvino' runs on the CPU"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_the_remedy(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: Any, missing: list[str], sentence: str
) -> None:
    uninstall(monkeypatch, *missing)
    with pytest.raises(SettingsError) as refusal:
        engine_of(Settings(**settings), checkpoint, 1.0)
    assert sentence in str(refusal.value)


def test_a_machine_without_a_driver_has_no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert not choice._has_cuda()


@pytest.mark.parametrize(
    ("with_torch", "sentence"),
    [(False, "torch is not: the CPU serves; pip install 'scala-serve[torch]'"), (True, "finds no CUDA device with it")],
)
def test_a_driver_without_a_device_for_torch_leaves_the_cpu_to_serve_and_it_is_said(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    with_torch: bool,
    sentence: str,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    if with_torch:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    else:
        uninstall(monkeypatch, "torch")
    assert not choice._has_cuda()
    assert sentence in caplog.text
    assert isinstance(engine_of(Settings(), checkpoint, 1.0), OpenVinoEngine)
