"""WebP images, decoded without stopping other threads.

Pillow copies the whole canvas, of 4 bytes a pixel, while it keeps the interpreter's lock: of 49 million pixels, which
fit into 38 bytes, nobody else ran for 150 to 370 ms. So its own libwebp is called here, and it frees the lock.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from PIL import Image, WebPImagePlugin, _webp

_DEMUX_ABI = 0x0107  # of libwebp's demux.h; only its upper half must agree
_PYBUF_READ = 0x100
_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class _Data(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char_p), ("size", ctypes.c_size_t))


def decoded(image: WebPImagePlugin.WebPImageFile, body: bytes) -> Image.Image:
    """The first frame of ``body``, which was opened as ``image``, with the same metadata.

    The opened image itself, not decoded yet, where Pillow was built without a libwebp that can be called. Raises
    ``ValueError`` for what libwebp cannot decode.
    """
    if (library := _library()) is None:
        return image
    data, canvas, timestamp = _Data(body, len(body)), ctypes.c_void_p(), ctypes.c_int()
    decoder = library.WebPAnimDecoderNewInternal(ctypes.byref(data), None, _DEMUX_ABI)
    try:
        if not library.WebPAnimDecoderGetNext(decoder, ctypes.byref(canvas), ctypes.byref(timestamp)):
            raise ValueError("libwebp cannot decode it")
        # Not by an array of ctypes, which keeps a type for every size that it ever saw.
        pixels = _memory(canvas, 4 * image.width * image.height, _PYBUF_READ)
        frame = Image.frombytes(image.mode, image.size, pixels, "raw", image.rawmode)
    finally:
        library.WebPAnimDecoderDelete(decoder)
    frame.info = image.info
    return frame


@cache
def _library() -> Any:
    library = ctypes.CDLL(_webp.__file__)
    try:
        library.WebPAnimDecoderNewInternal.restype = ctypes.c_void_p
        library.WebPAnimDecoderNewInternal.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
        library.WebPAnimDecoderGetNext.argtypes = (ctypes.c_void_p,) * 3
        library.WebPAnimDecoderDelete.argtypes = (ctypes.c_void_p,)
        library.WebPAnimDecoderDelete.restype = None
    except AttributeError:
        return None
    return library
