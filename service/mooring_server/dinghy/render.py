"""Draws samples of the world, whole batches at a time, on the CPU or a GPU.

Every object is sampled from its sprite at twice the picture's resolution and averaged down, so edges are
smooth whatever its size and turn, then recoloured and laid on the scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import nouns, scenes
from .sources import Sprites
from .world import SCENE_KEYS, VARIANTS, Picture, Piece, Sample

SUPERSAMPLE = 2
UNITS = 64.0
"""Lengths of a placement are 64ths of the picture's side."""


@dataclass(frozen=True)
class Layout:
    """A batch of samples as arrays: B pictures, P objects.

    ``ground`` ``[B, 3]`` int64: background, variant, mirrored. ``corner`` ``[B, 2]``: the crop's corner as
    shares of the margin. Objects, in drawing order: ``owner`` ``[P]`` the picture, ``depth`` ``[P]`` how many
    lie under it, ``sprite`` ``[P]``, ``tint`` ``[P]`` (0 for none), ``inverse`` ``[P, 2, 3]`` from picture to
    sprite coordinates, ``colour`` ``[P, 3, 3]``, ``warp`` ``[P, 6]``.
    """

    ground: Tensor
    corner: Tensor
    owner: Tensor
    depth: Tensor
    sprite: Tensor
    tint: Tensor
    inverse: Tensor
    colour: Tensor
    warp: Tensor

    def objects(self, rows: Tensor) -> Layout:
        """The same pictures with only the objects ``rows``."""
        kept = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("ground", "corner")
        }
        return replace(self, **kept)

    def to(self, device: torch.device) -> Layout:
        """The same on ``device``."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)
        }
        return Layout(**moved)


def lay_out(samples: Sequence[Sample]) -> Layout:
    """The arrays of a batch of samples."""
    tints = {name: k for k, name in enumerate(("", *nouns.TINTS))}
    keys = {name: k for k, name in enumerate(SCENE_KEYS)}
    grounds = [(keys[s.ground.scene], s.ground.variant, int(s.ground.flip)) for s in samples]
    pieces = [(b, k, piece) for b, s in enumerate(samples) for k, piece in enumerate(s.pieces)]
    return Layout(
        ground=torch.tensor(grounds),
        corner=torch.tensor([(s.ground.x, s.ground.y) for s in samples], dtype=torch.float32),
        owner=torch.tensor([b for b, _, _ in pieces]),
        depth=torch.tensor([k for _, k, _ in pieces]),
        sprite=torch.tensor([p.sprite for _, _, p in pieces]),
        tint=torch.tensor([tints[p.tint] for _, _, p in pieces]),
        inverse=torch.tensor([_inverse(p) for _, _, p in pieces]).view(-1, 2, 3),
        colour=torch.tensor([p.colour for _, _, p in pieces], dtype=torch.float32).view(-1, 3, 3),
        warp=torch.tensor([p.warp for _, _, p in pieces], dtype=torch.float32),
    )


def _inverse(piece: Piece) -> tuple[float, ...]:
    """Picture coordinates (64ths, from the centre) to the sprite's own, -1..1 over its square."""
    place = piece.place
    half_w = place.size * min(1.0, place.aspect) / 2 * (-1 if place.flip else 1)
    half_h = place.size / max(1.0, place.aspect) / 2
    rad = math.radians(place.angle)
    cos, sin = math.cos(rad), math.sin(rad)
    # forward: turn · shear · stretch
    a, b = cos * half_w, (cos * place.shear - sin) * half_h
    c, d = sin * half_w, (sin * place.shear + cos) * half_h
    det = a * d - b * c
    ia, ib, ic, id_ = d / det, -b / det, -c / det, a / det
    return (ia, ib, -(ia * place.dx + ib * place.dy), ic, id_, -(ic * place.dx + id_ * place.dy))


class Renderer:
    """Pictures of samples at ``px`` pixels on ``device``.

    Sprites and the backgrounds asked for so far are kept on the device.
    """

    def __init__(self, sprites: Sprites, px: int = 128, device: torch.device | str = "cpu") -> None:
        self.px, self.device = px, torch.device(device)
        rgba = torch.from_numpy(sprites.pixels).permute(0, 3, 1, 2)
        self._levels = _levels(sprites.pixels).to(self.device)
        # premultiplied, so that interpolation mixes no colour from outside the outline
        self._atlas = torch.empty(rgba.shape, dtype=torch.uint8, device=self.device)
        for at in range(0, len(rgba), 256):
            part = rgba[at : at + 256].to(self.device)
            self._atlas[at : at + 256, 3:] = part[:, 3:]
            self._atlas[at : at + 256, :3] = ((part[:, :3].int() * part[:, 3:].int() + 127) // 255).byte()
        self._tints = torch.tensor([(0, 0, 0), *nouns.TINTS.values()], device=self.device) / 255
        side = torch.arange(px * SUPERSAMPLE, device=self.device, dtype=torch.float32)
        line = ((side + 0.5) / (px * SUPERSAMPLE) - 0.5) * UNITS
        self._grid = torch.stack([line.expand(len(line), -1), line[:, None].expand(-1, len(line))])  # x, y
        self.margin = px // 8
        self._banks: dict[int, Tensor] = {}

    def _bank(self, scene: int) -> Tensor:
        """All drawings of a background: uint8 ``[variants, 3, px + margin, px + margin]``."""
        if scene not in self._banks:
            name = SCENE_KEYS[scene]
            rng = np.random.default_rng((nouns.WORLD_VERSION, scene))
            side = self.px + self.margin
            drawn = [
                scenes.draw_plain(name.removeprefix("plain-"), side, rng)
                if name.startswith("plain-")
                else scenes.draw_scene(name, side, rng)
                for _ in range(VARIANTS)
            ]
            self._banks[scene] = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).to(self.device)
        return self._banks[scene]

    def _grounds(self, layout: Layout) -> Tensor:
        """Cropped backgrounds in [0, 1]: ``[B, 3, px, px]``."""
        count, px = len(layout.ground), self.px
        out = torch.empty(count, 3, px, px, device=self.device)
        at = (layout.corner * self.margin).round().long().clamp(0, self.margin)
        steps = torch.arange(px)
        columns = torch.where(layout.ground[:, 2:] == 1, steps.flip(0)[None], steps[None]) + at[:, :1]
        lines = steps[None] + at[:, 1:]
        # The index arrays are made where the layout is: on a GPU no step here waits for the device.
        for scene in torch.unique(layout.ground[:, 0]).tolist():
            rows = (layout.ground[:, 0] == scene).nonzero()[:, 0]
            variant, y, x = (
                t.to(self.device, non_blocking=True)
                for t in (
                    layout.ground[rows, 1][:, None, None],
                    lines[rows][:, :, None],
                    columns[rows][:, None],
                )
            )
            picked = self._bank(int(scene))[variant, :, y, x]
            out[rows.to(self.device)] = picked.permute(0, 3, 1, 2).float() / 255
        return out

    def draw(self, layout: Layout) -> Tensor:
        """Pictures in [0, 1]: ``[B, 3, px, px]`` float32 on the renderer's device."""
        return self.draw_covered(layout)[0]

    @torch.no_grad()
    def draw_covered(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """As :meth:`draw`, and how much of each pixel objects cover: ``[B, 1, px, px]`` in [0, 1]."""
        canvas = self._grounds(layout)
        bare = torch.ones(len(canvas), 1, self.px, self.px, device=self.device)
        if not len(layout.depth):
            return canvas, 1 - bare
        layers = int(layout.depth.max()) + 1
        for depth in range(layers):
            mask = (layout.depth == depth).nonzero()[:, 0]
            part = layout.objects(mask)
            tinted = bool((part.tint > 0).any())
            part = part.to(self.device)
            colour, alpha = self._objects(part, tinted)
            canvas[part.owner] = canvas[part.owner] * (1 - alpha) + colour
            bare[part.owner] *= 1 - alpha
        return canvas.clamp_(0, 1), 1 - bare

    def _objects(self, part: Layout, tinted: bool) -> tuple[Tensor, Tensor]:
        """Premultiplied colour ``[P, 3, px, px]`` and coverage ``[P, 1, px, px]`` of a layout's objects."""
        inverse, warp = part.inverse, part.warp
        x, y = self._grid
        u = inverse[:, 0, 0, None, None] * x + inverse[:, 0, 1, None, None] * y + inverse[:, 0, 2, None, None]
        v = inverse[:, 1, 0, None, None] * x + inverse[:, 1, 1, None, None] * y + inverse[:, 1, 2, None, None]
        w = [warp[:, k, None, None] for k in range(6)]
        bent_u, bent_v = u + w[0] * torch.sin(w[1] * v + w[2]), v + w[3] * torch.sin(w[4] * u + w[5])
        source = self._atlas[part.sprite].float() / 255
        taken = nn.functional.grid_sample(
            source,
            torch.stack([bent_u, bent_v], -1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        # averaged down before anything is recoloured: premultiplied colours average as they should
        taken = nn.functional.avg_pool2d(taken, SUPERSAMPLE)
        alpha = taken[:, 3:]
        rgb = taken[:, :3] / alpha.clamp_min(1e-3)
        rgb = torch.einsum("pij,pjhw->pihw", part.colour, rgb).clamp(0, 1)
        if tinted:
            asked = (part.tint > 0)[:, None, None, None]
            rgb = torch.where(asked, self._tinted(rgb, part.tint, part.sprite), rgb)
        return rgb * alpha, alpha

    def _tinted(self, rgb: Tensor, tint: Tensor, sprite: Tensor) -> Tensor:
        """``rgb`` in one hue, its shading and lines kept."""
        lum = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
        low, span = (self._levels[sprite, k, None, None, None] for k in range(2))
        t = ((lum - low) / span).clamp(0, 1)
        colour = self._tints[tint][:, :, None, None]
        dark, light = colour * 0.35, colour + (1 - colour) * 0.3
        return torch.where(
            t < 0.6, dark + (colour - dark) * (t / 0.6), colour + (light - colour) * ((t - 0.6) / 0.4)
        )

    def pictures(self, samples: Sequence[Sample], chunk: int = 64) -> Picture:
        """Pictures uint8 ``[N, px, px, 3]`` of samples, for people and figures."""
        out = [to_uint8(self.draw(lay_out(samples[at : at + chunk]))) for at in range(0, len(samples), chunk)]
        return np.concatenate(out)


def to_uint8(pixels: Tensor) -> Picture:
    """``[N, 3, H, W]`` in [0, 1] to uint8 ``[N, H, W, 3]``."""
    scaled = (pixels.float().clamp(0, 1) * 255).round().byte()
    array: Picture = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return array


def from_uint8(pictures: Picture, device: torch.device | str = "cpu") -> Tensor:
    """uint8 ``[N, H, W, 3]`` to ``[N, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255


def _levels(pixels: Picture) -> Tensor:
    """Each sprite's darkest luminance and its span (3rd to 97th percentile inside): ``[n, 2]``."""
    found = np.empty((len(pixels), 2), np.float32)
    for i, sprite in enumerate(pixels):
        small = sprite[::2, ::2].astype(np.float32) / 255
        lum = (small[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32))[small[..., 3] > 0.5]
        low, high = np.percentile(lum, (3, 97)) if len(lum) else (0.0, 1.0)
        found[i] = low, max(float(high - low), 0.25)
    return torch.from_numpy(found)
