"""Engine: what the device does, what waits for it, and how adapters reach it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from tools.dashboards.parts import HERE, RATE, graph, new_board, quantile, rate, row


def board() -> dashboard.Dashboard:
    """One device, or many."""
    made = new_board("engine", "Mooring / Engine", "Ticks, batches, stages, adapter tiers, memory.")
    return (
        made.with_row(row("Device time"))
        .with_panel(
            graph(
                "Device time by class",
                "Share of the time; what is missing to 1 per device is idle.",
                "percentunit",
                {"{{class}}": rate("mooring_device_seconds_total", "class")},
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Queue",
                "Tasks of each class that wait or run.",
                "none",
                {"{{class}} {{state}}": f"sum by (class, state) (mooring_queue_depth{{{HERE}}})"},
            )
        )
        .with_panel(
            graph(
                "Tick, 95th percentile",
                "The smallest piece of work: nobody is served sooner than the running tick ends.",
                "s",
                {"{{class}}": quantile(0.95, "mooring_tick_seconds", "class")},
            )
        )
        .with_panel(
            graph(
                "Stages, mean",
                "text_encode, adapter_load, denoise, decode, encode.",
                "s",
                {
                    "{{stage}}": (
                        f"sum by (stage) (rate(mooring_stage_seconds_sum{{{HERE}}}[{RATE}])) / "
                        f"(sum by (stage) (rate(mooring_stage_seconds_count{{{HERE}}}[{RATE}])) > 0)"
                    )
                },
            )
        )
        .with_row(row("Batches"))
        .with_panel(
            graph(
                "Rows of a UNet pass",
                "Guided images take two rows.",
                "none",
                {
                    "median": quantile(0.5, "mooring_batch_rows"),
                    "95th": quantile(0.95, "mooring_batch_rows"),
                },
                span=8,
            )
        )
        .with_panel(
            graph(
                "Adapters of a UNet pass",
                "Different adapters in one pass.",
                "none",
                {
                    "median": quantile(0.5, "mooring_batch_adapters"),
                    "95th": quantile(0.95, "mooring_batch_adapters"),
                },
                span=8,
            )
        )
        .with_panel(
            graph(
                "Denoising steps and images",
                "Of callers.",
                "none",
                {"steps/s": rate("mooring_steps_total"), "images/s": rate("mooring_images_total")},
                span=8,
            )
        )
        .with_row(row("Adapters and prompts"))
        .with_panel(
            graph(
                "Adapter look-ups that hit, by tier",
                "device: in a slot; host: in memory; disk; object: the file was there.",
                "percentunit",
                {
                    "{{tier}}": (
                        f"sum by (tier) (rate(mooring_adapter_cache_hits_total{{{HERE}}}[{RATE}])) / "
                        f"(sum by (tier) (rate(mooring_adapter_cache_queries_total{{{HERE}}}[{RATE}])) > 0)"
                    )
                },
            )
        )
        .with_panel(
            graph(
                "Evictions and failed loads",
                "Per second. Steady evictions of the device tier: more adapters in use than slots.",
                "none",
                {
                    "evicted, {{tier}}": rate("mooring_adapter_cache_evictions_total", "tier"),
                    "failed, {{reason}}": rate("mooring_adapter_load_failures_total", "reason"),
                },
            )
        )
        .with_panel(
            graph(
                "Adapter load, 95th percentile",
                "Each tier's own part.",
                "s",
                {"{{tier}}": quantile(0.95, "mooring_adapter_load_seconds", "tier")},
            )
        )
        .with_panel(
            graph(
                "Prompt look-ups that hit",
                "Encoded prompts are kept.",
                "percentunit",
                {
                    "hits": (
                        f"{rate('mooring_prompt_cache_hits_total')} / "
                        f"({rate('mooring_prompt_cache_queries_total')} > 0)"
                    )
                },
            )
        )
        .with_row(row("Memory"))
        .with_panel(
            graph(
                "Device bytes by kind",
                "weights, arena and prompts are ours; allocated, reserved and total are torch's, on a GPU.",
                "bytes",
                {"{{instance}} {{kind}}": f"mooring_device_bytes{{{HERE}}}"},
            )
        )
        .with_panel(
            graph(
                "Adapter bytes by tier",
                "device counts slots in use.",
                "bytes",
                {"{{instance}} {{tier}}": f"mooring_adapter_cache_bytes{{{HERE}}}"},
            )
        )
    )
