"""Learning curves from the runs' JSON-lines logs, drawn with Pillow alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

_COLOURS = ((37, 99, 235), (220, 38, 38), (22, 163, 74), (147, 51, 234), (217, 119, 6))


def read_log(path: Path, key: str = "loss") -> list[tuple[float, float]]:
    """(samples, value) pairs of a run's ``log.jsonl``."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [(float(line["samples"]), float(line[key])) for line in lines]


def draw(series: dict[str, list[tuple[float, float]]], out: Path, title: str) -> None:
    """Write a PNG with one line per series: samples across, loss upwards on a logarithmic axis."""
    width, height, left, bottom, top = 640, 320, 56, 34, 28
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    points = [p for line in series.values() for p in line]
    x_max = max(x for x, _ in points)
    low, high = math.log(min(y for _, y in points) * 0.95), math.log(max(y for _, y in points) * 1.05)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - 12) * x / x_max
        up = height - bottom - (height - bottom - top) * (math.log(y) - low) / (high - low)
        return across, up

    for k in range(5):
        value = math.exp(low + (high - low) * k / 4)
        y = place(0, value)[1]
        pen.line([(left, y), (width - 12, y)], fill=(225, 225, 225))
        pen.text((6, y - 6), f"{value:.3g}", fill=(70, 70, 70))
        pen.text(
            (place(x_max * k / 4, value)[0] - 10, height - bottom + 8),
            f"{x_max * k / 4000:.0f}k",
            fill=(70, 70, 70),
        )
    for i, (name, line) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        pen.line([place(x, y) for x, y in line], fill=colour, width=2)
        pen.text((width - 170, top + 4 + 14 * i), name, fill=colour)
    pen.text((left, 8), title, fill=(20, 20, 20))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, optimize=True)
