"""Overview: is it up, is it fast, is it right, what does it do."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from tools.dashboards.parts import HERE, graph, new_board, number, quantile, rate, row

OURS = ', grpc_service=~"mooring.*"'


def board() -> dashboard.Dashboard:
    """The dashboard to open first."""
    made = new_board("overview", "Mooring / Overview", "Whether Mooring is up, fast and right.")
    return (
        made.with_row(row("Now"))
        .with_panel(
            number("Servers ready", "Base resident, calls taken.", "none", f"sum(mooring_ready{{{HERE}}})")
        )
        .with_panel(number("Calls", "All services.", "reqps", rate("grpc_server_handled_total", more=OURS)))
        .with_panel(number("Images", "Drawn and sent.", "imps", rate("mooring_images_total"), decimals=2))
        .with_panel(
            number(
                "Failed by the server",
                "Share of calls over an hour; the objective is 0.5 %.",
                "percentunit",
                'max(job:mooring_rpc_errors:ratio_rate1h{job=~"$job"})',
            )
        )
        .with_panel(
            number(
                "Late first steps",
                "Share of interactive requests over 5 s, in an hour; the objective is 5 %.",
                "percentunit",
                'max(job:mooring_first_step_late:ratio_rate1h{job=~"$job"})',
            )
        )
        .with_panel(
            number(
                "Jobs not ended",
                "Waiting or running. Every replica tells of all jobs: the largest is taken.",
                "none",
                f'sum(max by (kind, state) (mooring_jobs{{{HERE}, state=~"PENDING|RUNNING"}})) or vector(0)',
            )
        )
        .with_row(row("Calls"))
        .with_panel(
            graph(
                "Calls by status",
                "Health and reflection are not counted.",
                "reqps",
                {"{{grpc_code}}": rate("grpc_server_handled_total", "grpc_code", more=OURS)},
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Errors by reason",
                "The reason of ErrorInfo: what callers are told.",
                "reqps",
                {"{{reason}}": rate("mooring_errors_total", "reason")},
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Call time, 95th percentile",
                "From begin to end; streams last as long as their work.",
                "s",
                {"{{grpc_method}}": quantile(0.95, "grpc_server_handling_seconds", "grpc_method", more=OURS)},
            )
        )
        .with_panel(
            graph(
                "Time to the first step",
                "From a request's arrival to the end of its first denoising step.",
                "s",
                {
                    "{{class}} median": quantile(0.5, "mooring_queue_wait_seconds", "class"),
                    "{{class}} 95th": quantile(0.95, "mooring_queue_wait_seconds", "class"),
                },
            )
        )
        .with_row(row("Servers"))
        .with_panel(
            graph(
                "Burn rate of the availability objective",
                "1 uses up the 30-day budget in 30 days; a page at 14.4 over an hour.",
                "none",
                {
                    "1 h": 'job:mooring_rpc_errors:ratio_rate1h{job=~"$job"} / 0.005',
                    "6 h": 'job:mooring_rpc_errors:ratio_rate6h{job=~"$job"} / 0.005',
                },
            )
        )
        .with_panel(
            graph(
                "Calls in flight",
                "Health and reflection are not counted.",
                "none",
                {"{{instance}}": f"mooring_rpcs_in_flight{{{HERE}}}"},
            )
        )
        .with_panel(
            graph(
                "Resident memory",
                "Of the server process.",
                "bytes",
                {"{{instance}}": f"process_resident_memory_bytes{{{HERE}}}"},
            )
        )
        .with_panel(
            graph(
                "Open file handles",
                "Of the server process.",
                "none",
                {"{{instance}}": f"process_open_fds{{{HERE}}}"},
            )
        )
        .with_panel(
            graph(
                "Builds",
                "Servers by version: a rollout shows as two lines.",
                "none",
                {"{{version}}": f"count by (version) (mooring_build_info{{{HERE}}})"},
            )
        )
        .with_panel(
            graph(
                "Uploaded photos by outcome",
                "Photos per second.",
                "none",
                {"{{outcome}}": rate("mooring_photos_total", "outcome")},
            )
        )
    )
