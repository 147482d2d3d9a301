"""Engines: what turns a batch of pixels into probabilities. ``contract.py`` says what the server needs of one."""

from __future__ import annotations

from scala_model.checkpoint import Checkpoint
from server.cgroup import num_threads_for
from server.engine.contract import Engine
from server.settings import Settings, SettingsError


def engine_of(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
    """The engine that the settings name, not loaded yet.

    Raises SettingsError when torch is missing or the device does not exist.
    """
    try:
        import torch
    except ImportError:
        raise SettingsError("the torch engine needs torch: pip install 'scala-serve[torch]'") from None
    from server.engine.torch_engine import TorchEngine

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu' or 'auto'")
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return TorchEngine(
        checkpoint,
        device="cuda" if cuda else "cpu",
        threads=settings.num_threads or num_threads_for(cpus),
        max_batch=settings.max_batch or (256 if cuda else 16),
    )
