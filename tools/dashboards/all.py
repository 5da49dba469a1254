"""Every dashboard, as the JSON that Grafana imports."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tools.dashboards import engine, overview, tenants, training

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"


def rendered() -> dict[str, str]:
    """File name → JSON; the same text at every run."""
    boards = {
        "overview": overview.board(),
        "engine": engine.board(),
        "training": training.board(),
        "tenants": tenants.board(),
    }
    encoder = JSONEncoder(sort_keys=True, indent=2)
    return {f"mooring-{name}.json": encoder.encode(board.build()) + "\n" for name, board in boards.items()}
