"""LitServe with dynamic batching: decoded and run in its worker processes, HTTP in another."""

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body
from numpy.typing import NDArray

from benchmarks.peer_apps.classifier import Classifier, Options


class Api(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, options: Options) -> None:
        super().__init__(
            max_batch_size=options.max_batch, batch_timeout=options.batch_wait_ms / 1000, api_path="/classify"
        )
        self._options = options

    def setup(self, device: str) -> None:
        self._classifier = Classifier(self._options)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> NDArray[np.uint8]:
        return self._classifier.decode(request)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return inputs

    def predict(self, x: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self._classifier.run(x)

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        return self._classifier.answer(output)


if __name__ == "__main__":
    options = Options.parse()
    server = litserve.LitServer(
        Api(options), accelerator="cpu", workers_per_device=options.workers, fast_queue=options.form == "zmq"
    )
    server.run(host="127.0.0.1", port=options.port, log_level="warning", access_log=False, generate_client_file=False)
