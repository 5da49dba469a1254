"""Training and drift: whether jobs move, and whether adapters stay moored."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from tools.dashboards.parts import HERE, graph, new_board, quantile, rate, row


def board() -> dashboard.Dashboard:
    """Jobs of every kind; the figures of the training that runs."""
    made = new_board("training", "Mooring / Training and drift", "Jobs, drift against its budget, λ and σ.")
    return (
        made.with_row(row("Jobs"))
        .with_panel(
            graph(
                "Jobs by kind and state",
                "Of all tenants; every replica tells the same, the largest is shown.",
                "none",
                {"{{kind}} {{state}}": f"max by (kind, state) (mooring_jobs{{{HERE}}})"},
            )
        )
        .with_panel(
            graph(
                "Jobs ended, by outcome",
                "Per second.",
                "none",
                {"{{kind}} {{outcome}}": rate("mooring_jobs_ended_total", "kind", "outcome")},
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Jobs taken up",
                "Per second; resumed ones had a runner before.",
                "none",
                {"{{kind}} {{attempt}}": rate("mooring_jobs_claimed_total", "kind", "attempt")},
            )
        )
        .with_panel(
            graph(
                "Work on a job, median",
                "By one runner, to its end or hand-back.",
                "s",
                {"{{kind}}": quantile(0.5, "mooring_job_seconds", "kind")},
            )
        )
        .with_panel(
            graph(
                "Ages",
                "Oldest waiting job; silence of running ones; work that a crash would lose.",
                "s",
                {
                    "{{kind}}: waits": f"max by (kind) (mooring_job_oldest_pending_seconds{{{HERE}}})",
                    "{{kind}}: since progress": f"max by (kind) (mooring_job_progress_age_seconds{{{HERE}}})",
                    "{{kind}}: since checkpoint": (
                        f"max by (kind) (mooring_job_checkpoint_age_seconds{{{HERE}}})"
                    ),
                },
            )
        )
        .with_panel(
            graph(
                "Training step",
                "Wall time, waiting for other classes included.",
                "s",
                {
                    "median": quantile(0.5, "mooring_job_step_seconds"),
                    "95th": quantile(0.95, "mooring_job_step_seconds"),
                },
            )
        )
        .with_row(row("Drift"))
        .with_panel(
            graph(
                "Drift against its budget",
                "Of the running training, as shares of the base's guidance energy.",
                "percentunit",
                {
                    "drift": f"max(mooring_training_drift{{{HERE}}})",
                    "budget": f"max(mooring_training_budget{{{HERE}}})",
                },
            )
        )
        .with_panel(
            graph(
                "Drift of finished trainings, as a share of their budget",
                "1 is the budget.",
                "none",
                {
                    "median": quantile(0.5, "mooring_trained_drift_ratio"),
                    "95th": quantile(0.95, "mooring_trained_drift_ratio"),
                },
            )
        )
        .with_panel(
            graph(
                "Decisions of the gate",
                "On versions to be published, per second.",
                "none",
                {"{{verdict}}": rate("mooring_gate_decisions_total", "verdict")},
                span=24,
                stacked=True,
            )
        )
        .with_panel(
            graph(
                "Penalty λ",
                "What the controller chose to meet the budget.",
                "none",
                {"λ": f"max(mooring_training_strength{{{HERE}}})"},
                span=8,
            )
        )
        .with_panel(
            graph(
                "Loss",
                "Denoising loss of the running training.",
                "none",
                {"loss": f"max(mooring_training_loss{{{HERE}}})"},
                span=8,
            )
        )
        .with_panel(
            graph(
                "Steps done",
                "By the running training.",
                "none",
                {"steps": f"max(mooring_training_step{{{HERE}}})"},
                span=8,
            )
        )
        .with_panel(
            graph(
                "σ of the five largest layers",
                "Spectral norms of the layers' updates.",
                "none",
                {"{{layer}}": f"topk(5, max by (layer) (mooring_training_layer_sigma{{{HERE}}}))"},
            )
        )
        .with_panel(
            graph(
                "Largest σ",
                "Over the layers of the running training.",
                "none",
                {"σ max": f"max(mooring_training_sigma_max{{{HERE}}})"},
            )
        )
    )
