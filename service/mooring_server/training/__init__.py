"""Teach the base a subject within a drift budget: data, objectives, budget controller, checkpoints."""

from __future__ import annotations

from mooring_server.training.budget import BudgetController
from mooring_server.training.checkpoint import CheckpointStore
from mooring_server.training.config import PRESETS, Method, TrainConfig
from mooring_server.training.trainer import TrainProgress, TrainResult, train

__all__ = [
    "PRESETS",
    "BudgetController",
    "CheckpointStore",
    "Method",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "train",
]
