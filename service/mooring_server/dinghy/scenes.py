"""Drawn backgrounds: sixteen scenes and the plain colours.

Every scene is drawn from a random generator with Pillow at twice the asked size and then
reduced, so that edges are smooth; positions are fractions of the side, so one recipe serves
64 and 128 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from . import nouns

RGB = tuple[int, int, int]
Rng = np.random.Generator


class Pen:
    """Draws on a unit square: coordinates in 0..1 (x right, y down), colours in sRGB 0..255."""

    def __init__(self, px: int, rng: Rng) -> None:
        self.px, self.rng = px, rng
        self.image = Image.new("RGB", (px, px))
        self.draw = ImageDraw.Draw(self.image)

    def shade(self, colour: RGB, spread: float = 10.0) -> RGB:
        """``colour`` moved in brightness and a little per channel, by at most ``spread`` levels."""
        common = self.rng.uniform(-spread, spread)
        r, g, b = (int(np.clip(c + common + self.rng.uniform(-spread, spread) / 3, 0, 255)) for c in colour)
        return r, g, b

    def gradient(self, top: RGB, bottom: RGB, y0: float = 0.0, y1: float = 1.0) -> None:
        """Vertical gradient over the full width between two heights."""
        a, b = round(y0 * self.px), max(round(y0 * self.px) + 1, round(y1 * self.px))
        t = np.linspace(0, 1, b - a)[:, None, None]
        band = np.asarray(top) * (1 - t) + np.asarray(bottom) * t
        band = np.repeat(band, self.px, axis=1).astype(np.uint8)
        self.image.paste(Image.fromarray(band), (0, a))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        """A filled rectangle between two corners."""
        p = self.px
        self.draw.rectangle((round(x0 * p), round(y0 * p), round(x1 * p) - 1, round(y1 * p) - 1), fill=colour)

    def dot(self, x: float, y: float, rx: float, colour: RGB, ry: float | None = None) -> None:
        """A filled ellipse around (x, y) with the given half axes."""
        p, ry = self.px, rx if ry is None else ry
        self.draw.ellipse(((x - rx) * p, (y - ry) * p, (x + rx) * p, (y + ry) * p), fill=colour)

    def poly(self, points: list[tuple[float, float]], colour: RGB) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.px, y * self.px) for x, y in points], fill=colour)

    def line(self, points: list[tuple[float, float]], colour: RGB, width: float) -> None:
        """An open line of the given width."""
        scaled = [(x * self.px, y * self.px) for x, y in points]
        self.draw.line(scaled, fill=colour, width=max(1, round(width * self.px)))

    def waves(self, y: float, height: float, count: float, colour: RGB, phase: float) -> None:
        """A filled wavy ground from height ``y`` down to the bottom edge."""
        xs = np.linspace(0, 1, 33)
        top = [(float(x), y + height * math.sin(2 * math.pi * (count * x + phase))) for x in xs]
        self.poly([*top, (1, 1), (0, 1)], colour)


def _u(p: Pen, low: float, high: float) -> float:
    return float(p.rng.uniform(low, high))


def _cloud(p: Pen, x: float, y: float, r: float, colour: RGB) -> None:
    for dx, dy, s in ((-1.1, 0.2, 0.7), (0, 0, 1.0), (1.1, 0.2, 0.75), (0.2, 0.35, 0.9)):
        p.dot(x + dx * r, y + dy * r, r * s, colour, r * s * 0.7)


def _beach(p: Pen) -> None:
    h = _u(p, 0.32, 0.42)
    p.gradient(p.shade((96, 190, 250)), p.shade((186, 230, 252)), 0, h)
    p.dot(_u(p, 0.1, 0.9), _u(p, 0.08, 0.18), _u(p, 0.06, 0.09), (255, 240, 150))
    p.gradient(p.shade((24, 128, 206)), p.shade((60, 184, 212)), h, h + 0.24)
    p.waves(h + 0.2, 0.02, _u(p, 1.0, 2.0), (242, 250, 250), _u(p, 0, 1))
    p.waves(h + 0.24, 0.02, _u(p, 1.0, 2.0), p.shade((240, 214, 156), 6), _u(p, 0, 1))


def _snow(p: Pen) -> None:
    h = _u(p, 0.45, 0.55)
    p.gradient(p.shade((128, 160, 208)), p.shade((204, 222, 240)), 0, h + 0.1)
    for _ in range(3):
        x, s = _u(p, 0, 1), _u(p, 0.14, 0.24)
        for k in range(3):
            y = h - s * 0.35 * k
            p.poly(
                [(x - s * (0.5 - 0.12 * k), y), (x, y - s * 0.7), (x + s * (0.5 - 0.12 * k), y)],
                (64, 112, 112),
            )
    p.waves(h, 0.03, _u(p, 0.6, 1.4), p.shade((244, 248, 255), 4), _u(p, 0, 1))
    for _ in range(26):
        p.dot(_u(p, 0, 1), _u(p, 0, 1), _u(p, 0.008, 0.016), (255, 255, 255))


def _jungle(p: Pen) -> None:
    p.gradient(p.shade((20, 78, 44)), p.shade((46, 116, 50)))
    for k in range(14):
        x, y = _u(p, 0, 1), (k % 7) / 7 + _u(p, 0, 0.1)
        angle, length = _u(p, 0, 2 * math.pi), _u(p, 0.2, 0.34)
        dx, dy = math.cos(angle) * length, math.sin(angle) * length
        c = p.shade(((30, 120, 52), (64, 150, 60), (22, 96, 60))[k % 3], 14)
        p.poly([(x, y), (x + dx / 2 - dy / 4, y + dy / 2 + dx / 4), (x + dx, y + dy),
                (x + dx / 2 + dy / 4, y + dy / 2 - dx / 4)], c)  # fmt: skip
    p.waves(0.86, 0.02, 2.0, p.shade((44, 74, 30)), _u(p, 0, 1))


def _city(p: Pen) -> None:
    p.gradient(p.shade((150, 190, 222)), p.shade((224, 226, 220)))
    x = -_u(p, 0, 0.1)
    while x < 1:
        w, top = _u(p, 0.14, 0.22), _u(p, 0.08, 0.4)
        p.box(
            x, top, x + w, 0.84, p.shade(((122, 130, 150), (150, 128, 120), (98, 112, 138))[int(_u(p, 0, 3))])
        )
        y = top + 0.05
        while y < 0.78:
            for k in range(3):
                wx = x + w * (0.16 + 0.27 * k)
                p.box(wx, y, wx + w * 0.15, y + 0.045, (246, 226, 146))
            y += 0.1
        x += w + 0.01
    p.box(0, 0.84, 1, 1, p.shade((98, 98, 104), 6))
    for k in range(4):
        p.box(0.08 + k * 0.26, 0.91, 0.2 + k * 0.26, 0.93, (230, 230, 220))


def _desert(p: Pen) -> None:
    p.gradient(p.shade((250, 176, 92)), p.shade((254, 226, 160)), 0, 0.6)
    p.dot(_u(p, 0.15, 0.85), _u(p, 0.14, 0.26), _u(p, 0.08, 0.11), (255, 250, 220))
    p.waves(_u(p, 0.42, 0.5), 0.06, _u(p, 0.6, 1.2), p.shade((226, 166, 88)), _u(p, 0, 1))
    p.waves(_u(p, 0.6, 0.68), 0.06, _u(p, 0.6, 1.2), p.shade((210, 140, 66)), _u(p, 0, 1))
    p.waves(_u(p, 0.82, 0.88), 0.04, _u(p, 0.6, 1.2), p.shade((190, 118, 54)), _u(p, 0, 1))


def _night(p: Pen) -> None:
    p.gradient(p.shade((10, 14, 48), 6), p.shade((40, 48, 104), 6))
    for _ in range(30):
        p.dot(_u(p, 0, 1), _u(p, 0, 0.75), _u(p, 0.005, 0.012), (250, 250, 220))
    x, y = _u(p, 0.1, 0.9), _u(p, 0.1, 0.2)
    p.dot(x, y, 0.085, (250, 244, 204))
    p.dot(x + 0.04, y - 0.015, 0.07, (16, 20, 58))
    p.waves(0.82, 0.04, _u(p, 0.6, 1.2), p.shade((16, 30, 46), 4), _u(p, 0, 1))


def _underwater(p: Pen) -> None:
    p.gradient(p.shade((60, 190, 226)), p.shade((8, 62, 132)))
    for _ in range(3):
        x = _u(p, 0, 1)
        p.poly([(x, 0), (x + 0.08, 0), (x + 0.3, 0.8), (x + 0.12, 0.8)], p.shade((78, 196, 228), 6))
    for _ in range(5):
        x, s = _u(p, 0, 1), _u(p, 0.2, 0.4)
        p.line([(x, 1), (x + 0.03, 1 - s / 2), (x - 0.02, 1 - s)], p.shade((22, 130, 96)), 0.035)
    for _ in range(10):
        p.dot(_u(p, 0, 1), _u(p, 0, 1), _u(p, 0.012, 0.028), (186, 234, 248))
    p.waves(0.9, 0.025, 1.5, p.shade((196, 176, 128)), _u(p, 0, 1))


def _grass(p: Pen) -> None:
    h = _u(p, 0.3, 0.4)
    p.gradient(p.shade((110, 186, 250)), p.shade((206, 236, 254)), 0, h + 0.05)
    _cloud(p, _u(p, 0.1, 0.9), _u(p, 0.1, 0.2), 0.08, (255, 255, 255))
    p.waves(h, 0.02, _u(p, 0.5, 1.2), p.shade((122, 200, 82)), _u(p, 0, 1))
    p.waves(h + 0.22, 0.03, _u(p, 0.5, 1.2), p.shade((96, 180, 66)), _u(p, 0, 1))
    for _ in range(36):
        x, y = _u(p, 0, 1), _u(p, h + 0.08, 1)
        p.line([(x, y), (x + _u(p, -0.015, 0.015), y - 0.045)], p.shade((66, 146, 50)), 0.012)


def _wood(p: Pen) -> None:
    n = 6
    base = p.shade((190, 134, 80), 14)
    for k in range(n):
        y0, y1 = k / n, (k + 1) / n
        p.box(0, y0, 1, y1, p.shade(base, 12))
        p.box(0, y1 - 0.014, 1, y1, (116, 74, 38))
        x = _u(p, 0, 1)
        p.box(x, y0, x + 0.014, y1, (116, 74, 38))
        for _ in range(2):
            y, x = _u(p, y0 + 0.03, y1 - 0.03), _u(p, -0.2, 0.8)
            p.line([(x, y), (x + _u(p, 0.2, 0.5), y)], (164, 108, 62), 0.01)


def _mountains(p: Pen) -> None:
    p.gradient(p.shade((120, 170, 226)), p.shade((222, 234, 246)))
    for k in range(4):
        x, s = (k + _u(p, 0, 0.8)) / 3.6, _u(p, 0.26, 0.4)
        top = 0.72 - s * 1.4
        p.poly([(x - s, 0.76), (x, top), (x + s, 0.76)], p.shade((98, 108, 136), 14))
        p.poly(
            [(x - s * 0.26, top + 0.18), (x, top), (x + s * 0.26, top + 0.18), (x, top + 0.13)],
            (246, 250, 255),
        )
    p.waves(0.74, 0.03, _u(p, 0.6, 1.4), p.shade((104, 146, 92)), _u(p, 0, 1))


def _bricks(p: Pen) -> None:
    p.box(0, 0, 1, 1, p.shade((214, 196, 180), 6))
    base, oy = p.shade((178, 78, 60), 12), _u(p, 0, 0.1)
    for r in range(-1, 9):
        for c in range(-1, 5):
            x, y = c * 0.25 + (0.125 if r % 2 else 0) - oy, r * 0.125 - oy + 0.05
            p.box(x + 0.012, y + 0.012, x + 0.238, y + 0.113, p.shade(base, 16))


def _sky(p: Pen) -> None:
    p.gradient(p.shade((70, 150, 240)), p.shade((160, 212, 252)))
    for k in range(5):
        _cloud(p, _u(p, 0, 1), k / 5 + _u(p, 0, 0.2), _u(p, 0.08, 0.14), p.shade((246, 250, 255), 5))


def _forest(p: Pen) -> None:
    p.gradient(p.shade((250, 214, 150)), p.shade((244, 190, 120)))
    for k in range(6):
        x = (k + _u(p, 0, 0.8)) / 6
        p.box(x - 0.025, 0.2, x + 0.025, 0.84, p.shade((106, 66, 42)))
        for _ in range(4):
            c = ((226, 110, 36), (240, 160, 40), (196, 66, 34))[int(_u(p, 0, 3))]
            p.dot(x + _u(p, -0.1, 0.1), _u(p, 0.02, 0.34), _u(p, 0.07, 0.12), p.shade(c))
    p.waves(0.8, 0.02, 1.5, p.shade((174, 96, 42)), _u(p, 0, 1))
    for _ in range(20):
        p.dot(_u(p, 0, 1), _u(p, 0.83, 1), 0.018, p.shade((230, 140, 44), 24), 0.011)


def _stage(p: Pen) -> None:
    n = int(_u(p, 8, 11))
    for k in range(n):
        dark = (118, 12, 28) if k % 2 else (176, 22, 40)
        p.box(k / n, 0, (k + 1) / n, 0.8, p.shade(dark, 8))
    p.poly([(0, 0), (1, 0), (1, 0.08), (0, 0.08)], (214, 166, 60))
    for k in range(n):
        p.dot((k + 0.5) / n, 0.08, 0.5 / n, (214, 166, 60))
    p.box(0, 0.8, 1, 1, p.shade((148, 96, 54), 8))
    p.dot(0.5 + _u(p, -0.08, 0.08), 0.88, 0.34, (226, 180, 110), 0.08)


def _road(p: Pen) -> None:
    h = _u(p, 0.34, 0.42)
    p.gradient(p.shade((140, 204, 250)), p.shade((220, 240, 252)), 0, h)
    p.box(0, h, 1, 1, p.shade((126, 178, 84)))
    v = _u(p, 0.42, 0.58)
    p.poly([(v - 0.06, h), (v + 0.06, h), (1.1, 1), (-0.1, 1)], p.shade((84, 86, 94), 8))
    for k in range(5):
        a, b = h + (1 - h) * (k / 5) ** 1.4, h + (1 - h) * ((k + 0.55) / 5) ** 1.4
        wa, wb = 0.008 + 0.035 * k / 5, 0.008 + 0.035 * (k + 0.55) / 5
        ca, cb = v + (0.5 - v) * (a - h) / (1 - h), v + (0.5 - v) * (b - h) / (1 - h)
        p.poly([(ca - wa, a), (ca + wa, a), (cb + wb, b), (cb - wb, b)], (250, 232, 120))


def _kitchen(p: Pen) -> None:
    p.box(0, 0, 1, 1, p.shade((190, 222, 216), 8))
    n = 6
    for r in range(4):
        for c in range(n):
            light = p.shade((236, 246, 242), 6)
            p.box(c / n + 0.008, r * 0.165 + 0.008, (c + 1) / n - 0.008, (r + 1) * 0.165 - 0.008, light)
    m, oy = 7, _u(p, 0, 0.3)
    for r in range(4):
        for c in range(-1, m + 1):
            dark = (r + c) % 2 == 0
            colour = (60, 66, 84) if dark else (238, 238, 236)
            p.box((c + oy) / m, 0.66 + r * 0.09, (c + 1 + oy) / m, 0.66 + (r + 1) * 0.09, colour)
    p.box(0, 0.64, 1, 0.67, (134, 152, 156))


_DRAW: dict[str, Callable[[Pen], None]] = {
    "beach": _beach, "snow": _snow, "jungle": _jungle, "city": _city, "desert": _desert, "night": _night,
    "underwater": _underwater, "grass": _grass, "wood": _wood, "mountains": _mountains, "bricks": _bricks,
    "sky": _sky, "forest": _forest, "stage": _stage, "road": _road, "kitchen": _kitchen,
}  # fmt: skip
assert set(_DRAW) == set(nouns.SCENES)


def draw_scene(name: str, px: int, rng: Rng) -> NDArray[np.uint8]:
    """One drawing of the scene ``name``: uint8 ``[px, px, 3]``."""
    pen = Pen(px * 2, rng)
    _DRAW[name](pen)
    return np.asarray(pen.image.resize((px, px), Image.Resampling.BOX))


def draw_plain(colour: str, px: int, rng: Rng) -> NDArray[np.uint8]:
    """A plain background with a slight vertical gradient: uint8 ``[px, px, 3]``."""
    pen = Pen(px, rng)
    base = pen.shade(nouns.PLAIN[colour], 6)
    lower: RGB = (int(base[0] * 0.93), int(base[1] * 0.93), int(base[2] * 0.93))
    pen.gradient(base, lower)
    return np.asarray(pen.image)
