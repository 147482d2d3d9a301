"""The served network as the protocol sees it: one model of one version, its tensors, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.errors import BadRequest, UnknownModel
from server.oip.codec import Output, Request, Tensor, Wanted
from server.oip.schemas import ModelConfig, ModelMetadata, TensorConfig, TensorMetadata
from server.types import Answer, Encoded, Raster

VERSION, PLATFORM = "1", "scala_vit"
IMAGE = TensorMetadata(name="image", datatype="BYTES", shape=[-1, 1])
PIXELS = TensorMetadata(name="pixels", datatype="UINT8", shape=[-1, -1, -1, 3])
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32"}


@dataclass(frozen=True)
class Classifier:
    """``max_images``: of one request. ``labels`` by class."""

    name: str
    labels: Sequence[str]
    max_images: int

    def check_name(self, name: str, version: str = VERSION) -> None:
        """Raises UnknownModel."""
        if name != self.name:
            raise UnknownModel(f"There is no model {name[:100]!r}; the one served here is {self.name!r}.")
        if version != VERSION:
            raise UnknownModel(f"Model {self.name!r} has no version {version[:100]!r}; there is {VERSION!r}.")

    def metadata(self) -> ModelMetadata:
        return ModelMetadata(
            name=self.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[IMAGE, PIXELS],
            outputs=[
                TensorMetadata(name="probabilities", datatype="FP32", shape=[-1, len(self.labels)]),
                TensorMetadata(name="label", datatype="BYTES", shape=[-1, 1]),
                TensorMetadata(name="width", datatype="FP32", shape=[-1, 1]),
            ],
        )

    def config(self) -> ModelConfig:
        metadata = self.metadata()
        return ModelConfig(
            name=self.name,
            platform=PLATFORM,
            backend="",
            max_batch_size=self.max_images,
            input=[_config(tensor, optional=True) for tensor in metadata.inputs],
            output=[_config(tensor) for tensor in metadata.outputs],
            dynamic_batching={},
        )

    def outputs(self, request: Request, answers: Sequence[Answer]) -> list[Output]:
        """What was asked for, a row for each answer, once ``check_outputs`` has seen the request."""
        make = self._makers()
        wanted = request.outputs or [Wanted(name, request.binary) for name in make]
        return [make[each.name](answers, each) for each in wanted]

    def check_outputs(self, request: Request) -> None:
        """Raises BadRequest for an output that there is not, or that is no probabilities and shall be classified."""
        names = [wanted.name for wanted in request.outputs or ()]
        for wanted in request.outputs or ():
            if wanted.name not in self._makers():
                there_are = ", ".join(self._makers())
                raise BadRequest(f"There is no output {wanted.name[:50]!r}; there are {there_are}.")
            if names.count(wanted.name) > 1:
                raise BadRequest(f"The output {wanted.name} is named more than once.")
            if wanted.classes and wanted.name != "probabilities":
                raise BadRequest(f"The output {wanted.name} cannot be classified; probabilities can.")

    def _makers(self) -> Mapping[str, Callable[[Sequence[Answer], Wanted], Output]]:
        return {"probabilities": self._probabilities, "label": self._label, "width": self._width}

    def _probabilities(self, answers: Sequence[Answer], wanted: Wanted) -> Output:
        if wanted.classes:
            texts = [text for answer in answers for text in self._best(answer.probabilities, wanted.classes)]
            return Output(wanted.name, (len(answers), len(texts) // len(answers)), texts, wanted.binary)
        rows = np.stack([answer.probabilities for answer in answers])
        return Output(wanted.name, rows.shape, rows, wanted.binary)

    def _best(self, probabilities: NDArray[np.float32], count: int) -> list[str]:
        """By the extension "classification": the value, the class and its label."""
        best = np.argsort(-probabilities, kind="stable")[:count]
        return [f"{probabilities[i]:.6f}:{i}:{self.labels[i]}" for i in best]

    def _label(self, answers: Sequence[Answer], wanted: Wanted) -> Output:
        texts = [self.labels[int(answer.probabilities.argmax())] for answer in answers]
        return Output(wanted.name, (len(answers), 1), texts, wanted.binary)

    def _width(self, answers: Sequence[Answer], wanted: Wanted) -> Output:
        widths = np.array([[float(answer.width)] for answer in answers], np.float32)
        return Output(wanted.name, widths.shape, widths, wanted.binary)


def the_input(request: Request) -> Tensor:
    """The one tensor that holds the images; as many as its first dimension says. Raises BadRequest."""
    names = [tensor.name for tensor in request.inputs]
    if len(names) != 1 or names[0] not in (IMAGE.name, PIXELS.name):
        raise BadRequest(f"The inputs are {names!r:.200}; send exactly one of image and pixels.")
    (tensor,) = request.inputs
    expected = IMAGE if tensor.name == IMAGE.name else PIXELS
    if tensor.datatype != expected.datatype:
        raise BadRequest(f"{tensor.name} has datatype {tensor.datatype[:20]!r}; it must be {expected.datatype}.")
    if len(tensor.shape) != len(expected.shape) or any(
        size == 0 if fixed < 0 else size != fixed for size, fixed in zip(tensor.shape, expected.shape, strict=True)
    ):
        form = "[N, 1]" if expected is IMAGE else "[N, height, width, 3]"
        raise BadRequest(f"{tensor.name} has shape {list(tensor.shape)}; it must be {form}, none of them 0.")
    return tensor


def images_of(tensor: Tensor) -> Sequence[Encoded | Raster]:
    """The images of ``the_input``, those of JSON in base64. Raises BadRequest for data that is not as described."""
    return tensor.byte_strings() if tensor.datatype == IMAGE.datatype else list(tensor.uint8())


def _config(tensor: TensorMetadata, *, optional: bool = False) -> TensorConfig:
    data_type, dims = CONFIG_TYPES[tensor.datatype], tensor.shape[1:]
    return TensorConfig(name=tensor.name, data_type=data_type, dims=dims, optional=optional)
