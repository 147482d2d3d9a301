"""What torch says of a device, in the words of the engine contract."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.engine.contract import DeviceLost, DeviceOutOfMemory

OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # the runtime's, the graphs' and cuBLAS's words for it


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises what torch says of the device in the contract's words; the rest passes."""
    try:
        yield
    except RuntimeError as error:
        # A recording that fails for want of memory may end in a second error, which says only that there was a first.
        for cause in (error, error.__context__):
            if isinstance(cause, RuntimeError) and any(words in str(cause) for words in OUT_OF_MEMORY):
                traceback.clear_frames(cause.__traceback__)  # where the activations still are
                torch.cuda.empty_cache()
                raise DeviceOutOfMemory(_first_line(cause)) from None
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceLost(_first_line(error)) from error
        raise


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
