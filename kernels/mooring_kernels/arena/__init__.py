"""The arena: where every low-rank factor of an adapter lies in one flat buffer."""

from __future__ import annotations

from mooring_kernels.arena.layout import ArenaLayout, LayerShape, ShapeGroup

__all__ = ["ArenaLayout", "LayerShape", "ShapeGroup"]
