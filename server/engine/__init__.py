"""Engines: what turns a batch of pixels into probabilities. ``contract.py`` says what the server needs of one."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from importlib.util import find_spec

from scala_model.checkpoint import Checkpoint
from scala_model.config import ScalaConfig
from scala_model.cost import cost_of
from server.engine.contract import Engine
from server.settings import Settings, SettingsError

CPU_BATCH, GPU_BATCH = 16, 256  # by default, at most
HEAVY_MACS = 150e6  # of one image at full width: about 1.5 ms on one core, as long as its HTTP request takes
log = logging.getLogger("scala.serve")
# OpenVINO tells a web address of every import (2026.4, ``openvino/tools/ovc``), unless this package is not to be had.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def engine_of(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
    """The engine that the settings name, with no width loaded yet; ``auto`` is the fastest that is installed.

    Raises SettingsError when what was asked for is not installed, or has no device here.
    """
    name = settings.engine if settings.engine != "auto" else _fastest(settings.device)
    if name == "openvino":
        return _openvino(settings, checkpoint, cpus)
    device = _torch_device(settings, name)
    if name == "cuda_graphs":
        from server.engine.cuda_graphs import CudaGraphsEngine

        return CudaGraphsEngine(checkpoint, device="cuda", max_batch=settings.max_batch or GPU_BATCH)
    from server.engine.torch_engine import TorchEngine

    return TorchEngine(
        checkpoint,
        device=device,
        threads=settings.num_threads or num_threads_for(cpus, checkpoint.config),
        max_batch=settings.max_batch or (GPU_BATCH if device == "cuda" else CPU_BATCH),
    )


def num_threads_for(cpus: float, config: ScalaConfig) -> int:
    """Threads for an engine on the CPU: whole cores of the container's quota.

    A light network leaves one to HTTP, which is the greater part of the work then. A heavy one was faster with all,
    even beside HTTP: see docs/log.md.
    """
    cores = math.floor(cpus)
    heavy = cost_of(config, config.widths[-1]).macs > HEAVY_MACS
    return max(1, cores if heavy else cores - 1)


def _fastest(device: str) -> str:
    if device == "cuda" or (device == "auto" and _has_cuda()):
        return "cuda_graphs"
    if find_spec("openvino"):
        return "openvino"
    log.warning("OpenVINO is not installed: torch serves, several times slower; pip install 'scala-serve[cpu]'")
    return "torch"


def _openvino(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
    if settings.device == "cuda":
        raise SettingsError("engine 'openvino' runs on the CPU: use engine 'cuda_graphs' or device 'cpu'")
    if find_spec("openvino") is None:
        raise SettingsError("engine 'openvino' needs OpenVINO: pip install 'scala-serve[cpu]'")
    try:
        from server.engine.openvino_engine import OpenVinoEngine
    except ImportError as error:
        raise SettingsError(f"OpenVINO is installed but cannot be loaded ({error}); use engine 'torch'") from error
    return OpenVinoEngine(
        checkpoint,
        threads=settings.num_threads or num_threads_for(cpus, checkpoint.config),
        max_batch=settings.max_batch or CPU_BATCH,
    )


def _torch_device(settings: Settings, engine: str) -> str:
    """``cpu`` or ``cuda``, which is then there."""
    if find_spec("torch") is None:
        remedy = "pip install 'scala-serve[torch]'"
        if settings.engine == "auto" and settings.device != "cuda":
            raise SettingsError(f"no engine is installed: pip install 'scala-serve[cpu]', or for a GPU {remedy}")
        raise SettingsError(f"engine '{engine}' needs torch: {remedy}")
    if engine == "cuda_graphs" and settings.device == "cpu":
        raise SettingsError("engine 'cuda_graphs' runs on a GPU: use engine 'openvino' or device 'cuda'")
    has_cuda = _has_cuda()
    if not has_cuda and (settings.device == "cuda" or engine == "cuda_graphs"):
        asked = "device 'cuda'" if settings.device == "cuda" else f"engine '{engine}'"
        raise SettingsError(f"{asked} was asked for, but torch finds no CUDA device; use device 'cpu' or 'auto'")
    return "cuda" if has_cuda and settings.device != "cpu" else "cpu"


def _has_cuda() -> bool:
    """Asks torch, which takes seconds to import, only where NVIDIA's driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    if find_spec("torch") is None:
        log.warning("NVIDIA's driver is there, but torch is not: the CPU serves; pip install 'scala-serve[torch]'")
        return False
    import torch

    if not (available := torch.cuda.is_available()):
        log.warning("NVIDIA's driver is there, but torch %s finds no CUDA device with it", torch.__version__)
    return available
