"""Tenants: the largest by what they do, from the canonical log lines in Loki.

From logs, because a tenant as a metric's label has no bound. Every call writes one JSON line (`event: rpc`);
a collector that ships standard error to Loki under a stream label `app="mooring"` is all it needs.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from tools.dashboards.parts import lines, new_board, row, top

CALLS = '{app="mooring"} | json | event=`rpc`'


def _most(condition: str = "", *, by: str = "tenant", added_up: str = "") -> str:
    """The ten largest by number of calls, or by a field of them added up."""
    wanted = CALLS + (f" | {condition}" if condition else "")
    counted = f"sum_over_time({wanted} | unwrap {added_up} [$__range])" if added_up else ""
    return f"topk(10, sum by ({by}) ({counted or f'count_over_time({wanted} [$__range])'}))"


def board() -> dashboard.Dashboard:
    """Who uses it, who is refused, who waits."""
    made = new_board("tenants", "Mooring / Tenants", "The largest tenants, from the canonical log lines.")
    made = made.with_variable(dashboard.DatasourceVariable("logs").label("Logs").type("loki"))
    return (
        made.with_row(row("Largest tenants of the time shown"))
        .with_panel(top("Calls", "Of every method.", "none", _most()))
        .with_panel(top("Images", "Drawn and sent.", "none", _most("images > 0", added_up="images")))
        .with_panel(
            top(
                "Seconds waited",
                "Sum over requests, from arrival to the first step.",
                "s",
                _most("queue_seconds > 0", added_up="queue_seconds"),
            )
        )
        .with_panel(
            top(
                "Seconds in calls",
                "Streams last as long as their work.",
                "s",
                _most("seconds > 0", added_up="seconds"),
            )
        )
        .with_panel(
            top(
                "Refused or failed",
                "By tenant and reason.",
                "none",
                _most("reason != ``", by="tenant, reason"),
            )
        )
        .with_panel(
            top(
                "Adapters in use",
                "By digest.",
                "none",
                _most("adapter_digest != ``", by="tenant, adapter_digest"),
            )
        )
        .with_row(row("Lines"))
        .with_panel(
            lines(
                "Calls that failed",
                "Newest first; the request id is in the caller's error too.",
                CALLS + " | code != `OK`",
            )
        )
    )
