"""Encoded pictures for tests, each with something to tell its corners apart."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

RED, GREEN, BLUE, WHITE = (220, 20, 20), (20, 180, 20), (20, 20, 220), (255, 255, 255)


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Red, green / blue, white."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return encode(image or quarters(), "JPEG", quality=95, **options)


def png(image: Image.Image | None = None, **options: Any) -> bytes:
    return encode(image or quarters(), "PNG", **options)


def corners(image: Image.Image) -> list[str]:
    """The nearest named colour in each corner, row by row."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    width, height = image.size
    points = [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3)]

    def name(pixel: tuple[int, ...]) -> str:
        return min(names, key=lambda n: sum((a - b) ** 2 for a, b in zip(names[n], pixel, strict=True)))

    return [name(image.getpixel(point)) for point in points]
