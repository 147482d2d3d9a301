"""What our engine is compared with: each width as a dense network of its own, in the runtimes that people would take.

All do the same work, mean and deviation of the preprocessing and the softmax included: from uint8 (B, S, S, 3) to
float32 probabilities (B, classes), both in the host's memory. Each gets the strongest form that it has:

* torch eager in float32, and in bfloat16;
* torch.compile of the whole network in bfloat16 for exactly this batch, with frozen weights on a CPU and
  ``max-autotune`` on a GPU. It takes 20 s for each width and batch on two cores, where all the rest takes five minutes:
  on a CPU it stands at the narrowest and the widest width only. One compiled block, used twelve times, takes a quarter
  of that, but then no weights can be frozen, and it was no faster than eager bfloat16;
* ONNX Runtime in float32 (on a CPU it has little in bfloat16), from an export whose batch may vary;
* OpenVINO in the precision that it chooses, from the same file, for exactly this batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._inductor import config as inductor

from scala_model.card import preprocessing_from_card
from scala_model.normalise import Normalise
from scala_model.preprocess import Preprocessing
from scala_model.subnet import DenseViT
from scala_model.vit import ScalaViT
from scala_model.width import Width
from server.engine.openvino_engine import core

Pixels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
Run = Callable[[Pixels], Probabilities]


class Classifier(nn.Module):
    """uint8 (B, S, S, 3) -> float32 probabilities (B, classes), the network in between in a data type of its own."""

    def __init__(self, spec: Preprocessing, network: DenseViT, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalise, self.network, self.dtype = Normalise(spec), network.to(dtype), dtype
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalise(pixels).to(self.dtype))
        return logits.float().softmax(-1)


@dataclass(frozen=True)
class Dense:
    """One width as a plain network, and the same with its preprocessing and softmax as an ONNX file in float32."""

    network: DenseViT
    spec: Preprocessing
    onnx: Path

    def classifier(self, dtype: torch.dtype) -> Classifier:
        return Classifier(self.spec, copy.deepcopy(self.network), dtype)


def export(model: ScalaViT, width: Width, folder: Path) -> Dense:
    """Cut a width out of ``model`` and write it into ``folder``, for batches of any size."""
    dense = Dense(model.subnet(width), preprocessing_from_card(model.card), folder / f"width-{width}.onnx")
    size = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # the exporter that replaces this one needs one package more
        torch.onnx.export(
            dense.classifier(torch.float32),
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            str(dense.onnx),
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_axes={"pixels": {0: "batch"}, "probabilities": {0: "batch"}},
            dynamo=False,
        )
    return dense


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    known = torch.cpu.get_capabilities()
    has_bf16 = known.get("avx512_bf16") or known.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def rivals_of(
    dense: Dense, batch: int, device: torch.device, threads: int, *, compiled: bool
) -> dict[str, Callable[[], Run]]:
    """The rivals by name, not prepared yet, for batches of exactly ``batch`` images."""
    half = half_precision(device)
    rivals: dict[str, Callable[[], Run]] = {}
    for dtype in dict.fromkeys((torch.float32, half)):
        rivals[f"torch eager {_short(dtype)}"] = partial(_eager, dense, device, dtype)
    if compiled:
        rivals[f"torch compile {_short(half)}"] = partial(_compiled, dense, batch, device, half)
    if device.type == "cpu":
        rivals["ONNX Runtime f32"] = partial(_onnxruntime, dense, threads)
        rivals[f"OpenVINO {_short(half)}"] = partial(_openvino, dense, batch, threads)
    return rivals


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def _eager(dense: Dense, device: torch.device, dtype: torch.dtype) -> Run:
    return _in_torch(dense.classifier(dtype).to(device), device)


def _compiled(dense: Dense, batch: int, device: torch.device, dtype: torch.dtype) -> Run:
    torch.compiler.reset()  # eight shapes of one network, and it would go on in eager mode
    network = dense.classifier(dtype).to(device)
    if device.type == "cuda":
        return _in_torch(torch.compile(network, dynamic=False, mode="max-autotune"), device)
    run = _in_torch(torch.compile(network, dynamic=False), device)
    # As an option of torch.compile, freezing would come too late to make constants of the weights.
    with inductor.patch(freezing=True):
        run(np.zeros((batch, dense.spec.image_size, dense.spec.image_size, 3), np.uint8))
    return run


def _in_torch(network: Callable[[Tensor], Tensor], device: torch.device) -> Run:
    @torch.inference_mode()
    def run(pixels: Pixels) -> Probabilities:
        probabilities: Probabilities = network(torch.from_numpy(pixels).to(device)).cpu().numpy()
        return probabilities

    return run


def _onnxruntime(dense: Dense, threads: int) -> Run:
    import onnxruntime  # of the extra bench, which the other rivals do without

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(dense.onnx, options, providers=["CPUExecutionProvider"])

    def run(pixels: Pixels) -> Probabilities:
        probabilities: Probabilities = session.run(None, {"pixels": pixels})[0]
        return probabilities

    return run


def _openvino(dense: Dense, batch: int, threads: int) -> Run:
    graph, size = core().read_model(dense.onnx), dense.spec.image_size
    graph.reshape([batch, size, size, 3])
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = core().compile_model(graph, "CPU", hints).create_infer_request()

    def run(pixels: Pixels) -> Probabilities:
        request.set_input_tensor(ov.Tensor(pixels, shared_memory=True))
        request.infer()
        probabilities: Probabilities = request.get_output_tensor().data
        return probabilities

    return run
