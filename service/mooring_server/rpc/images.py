"""Images as PNG: chunks of finished ones, with their mark, and whole previews. CPU work: off the event loop.

Previews have no mark: they are pictures that nobody finished drawing, at most 256 px, made to be shown for a
moment, and the mark would be larger than many of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from mooring.v1 import media_pb2
from numpy.typing import NDArray
from PIL import Image

from mooring_server.jobs.photos import encode_png
from mooring_server.provenance.marks import Marker, Origin

CHUNK_BYTES = 2**20
MAX_PREVIEW_SIDE = 256
PNG = "image/png"

Pixels = NDArray[np.uint8]  # [H, W, 3]


def image_chunks(
    index: int, seed: int, pixels: Pixels, marker: Marker, origin: Origin
) -> list[media_pb2.ImageChunk]:
    """A finished image as chunks of at most 1 MiB.

    Args:
        index: which image of the request.
        seed: that gives it again.
        pixels: `[H, W, 3]` uint8.
        marker: signs where it comes from.
        origin: base and adapters that made it.

    Raises:
        MooringError: INTERNAL when it cannot be marked.
    """
    data = marker.mark(encode_png(Image.fromarray(pixels)), origin)
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).hexdigest()
    return [
        media_pb2.ImageChunk(
            index=index,
            seed=seed,
            media_type=PNG,
            width=width,
            height=height,
            size_bytes=len(data),
            sha256=digest,
            offset=offset,
            data=piece,
            last=offset + len(piece) == len(data),
        )
        for offset, piece in pieces(data)
    ]


def preview(pixels: Pixels, index: int = 0) -> media_pb2.PreviewImage:
    """A preview, at most 256 px a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
    return media_pb2.PreviewImage(
        index=index, media_type=PNG, width=image.width, height=image.height, data=encode_png(image)
    )


def pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, at most 1 MiB) of some bytes; nothing for no bytes."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield offset, data[offset : offset + CHUNK_BYTES]
