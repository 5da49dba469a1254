"""Prometheus metrics of one server, in a registry of its own so that several servers fit into a process.

The gRPC trio keeps the names that dashboards know (`grpc_server_*`); ours begin with `mooring_`, in base
units. Labels are bounded: no tenant, prompt or adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LOADS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_JOBS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 10)

JobCounts = Mapping[tuple[str, Any], int]
TrainingFigures = Iterable[Mapping[str, Any]]
JobAges = Iterable[tuple[str, float, float | None]]
"""(kind, seconds since its last progress, seconds since its last checkpoint) of each job run here."""


class Metrics:
    """All metrics of one server.

    Args:
        version: of the software, for build_info.
    """

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        rpc = ["grpc_type", "grpc_service", "grpc_method"]
        self.started = self._counter("grpc_server_started", "Calls that began.", rpc)
        self.handled = self._counter(
            "grpc_server_handled", "Calls that ended, by status.", [*rpc, "grpc_code"]
        )
        self.handling = self._histogram(
            "grpc_server_handling_seconds", "From a call's begin to its end.", _CALLS, rpc
        )
        self.in_flight = self._gauge("mooring_rpcs_in_flight", "Calls being handled.", [])
        self.queue_depth = self._gauge(
            "mooring_queue_depth", "Engine tasks that wait or run.", ["class", "state"]
        )
        self.errors = self._counter("mooring_errors", "Calls that failed, by ErrorInfo reason.", ["reason"])
        self.queue_wait = self._histogram(
            "mooring_queue_wait_seconds",
            "From a request's arrival to the end of its first step.",
            _CALLS,
            ["class"],
        )
        self.tick_seconds = self._histogram(
            "mooring_tick_seconds", "One tick of the engine.", _FAST, ["class"]
        )
        self.stage_seconds = self._histogram(
            "mooring_stage_seconds", "One stage of device work.", _FAST, ["stage"]
        )
        self.batch_size = self._histogram("mooring_batch_rows", "Rows of a UNet call.", _COUNTS, [])
        self.batch_adapters = self._histogram(
            "mooring_batch_adapters", "Different adapters in a UNet call.", _COUNTS, []
        )
        self.device_seconds = self._counter(
            "mooring_device_seconds",
            "Device time used, by class; a common pass is divided by rows.",
            ["class"],
        )
        self.prompt_queries = self._counter(
            "mooring_prompt_cache_queries", "Look-ups of an encoded prompt.", []
        )
        self.prompt_hits = self._counter("mooring_prompt_cache_hits", "Look-ups that found it.", [])
        self.images = self._counter("mooring_images", "Images drawn and sent, or stored by a batch job.", [])
        self.mark_seconds = self._histogram(
            "mooring_mark_seconds", "Signing the provenance mark of one image.", _FAST, []
        )
        self.mark_expiry = self._gauge(
            "mooring_mark_certificate_expiry_timestamp_seconds",
            "When the certificate of the provenance marks ends; 0 without marks.",
            [],
        )
        self.steps = self._counter("mooring_steps", "Denoising steps done for callers.", [])
        self.jobs_claimed = self._counter(
            "mooring_jobs_claimed", "Jobs taken up by this process.", ["kind", "attempt"]
        )
        self.jobs_ended = self._counter(
            "mooring_jobs_ended", "Jobs this process was done with.", ["kind", "outcome"]
        )
        self.job_seconds = self._histogram("mooring_job_seconds", "Work on a job.", _JOBS, ["kind"])
        self.cache_queries = self._counter(
            "mooring_adapter_cache_queries", "Look-ups of an adapter.", ["tier"]
        )
        self.cache_hits = self._counter("mooring_adapter_cache_hits", "Look-ups that found it.", ["tier"])
        self.cache_evictions = self._counter(
            "mooring_adapter_cache_evictions", "Adapters dropped to make room.", ["tier"]
        )
        self.cache_bytes = self._gauge(
            "mooring_adapter_cache_bytes",
            "Bytes of adapters kept; host exceeds its budget by what requests hold, if that alone does.",
            ["tier"],
        )
        self.load_seconds = self._histogram(
            "mooring_adapter_load_seconds", "A tier's own part of loading an adapter.", _LOADS, ["tier"]
        )
        self.load_failures = self._counter(
            "mooring_adapter_load_failures", "Loads of an adapter that failed, by reason.", ["reason"]
        )
        self.step_seconds = self._histogram(
            "mooring_job_step_seconds", "Wall time of one optimiser step of a training.", _FAST, ["kind"]
        )
        self.trained_drift = self._histogram(
            "mooring_trained_drift_ratio",
            "Measured drift of a finished training as a share of its drift budget.",
            _RATIOS,
            [],
        )
        self.photos = self._counter("mooring_photos", "Uploaded photos, by outcome.", ["outcome"])
        self.gate_decisions = self._counter(
            "mooring_gate_decisions", "Decisions of the gate on versions to be published.", ["verdict"]
        )
        self.device_bytes = self._gauge(
            "mooring_device_bytes", "Bytes on the device that are known, by kind.", ["kind"]
        )
        self.audit_entries = self._gauge("mooring_audit_entries", "Entries of the audit log.", [])
        self.audit_intact = self._gauge(
            "mooring_audit_chain_intact", "1 while the audit log's chain holds, 0 once it did not.", []
        )
        self.audit_intact.set(1)
        self.audit_verified = self._gauge(
            "mooring_audit_verified_timestamp_seconds", "When the audit log was last verified.", []
        )
        self.audit_verified.set_to_current_time()
        self.ready = self._gauge(
            "mooring_ready", "1 while the base model is resident and calls are taken.", []
        )
        info = self._gauge("mooring_build_info", "Always 1; the labels tell the build.", ["version"])
        info.labels(version).set(1)

    def watch_jobs(
        self,
        counts: Callable[[], JobCounts],
        running_training: Callable[[], TrainingFigures],
        oldest_pending: Callable[[], Mapping[str, float]],
        ages: Callable[[], JobAges],
    ) -> None:
        """Export jobs by kind and state, and the figures of running trainings, read at each scrape.

        Args:
            counts: jobs by (kind, state) over all tenants.
            running_training: newest progress of each running training job.
            oldest_pending: seconds that the oldest waiting job of a kind has waited.
            ages: of the jobs that this process runs.
        """
        self.registry.register(_JobCollector(counts, running_training, oldest_pending, ages))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class _JobCollector(Collector):
    """Reads the store when it is scraped: right after a restart too, and free while nobody looks."""

    _FIGURES: Mapping[str, str] = {
        "loss": "Denoising loss of the running training, the latest step.",
        "drift": "Drift of the running training as a share of the base's guidance energy.",
        "budget": "Drift budget of the running training.",
        "strength": "Penalty strength λ of the running training.",
        "sigma_max": "Largest spectral norm over the layers of the running training.",
        "step": "Steps that the running training has done.",
    }

    def __init__(
        self,
        counts: Callable[[], JobCounts],
        running_training: Callable[[], TrainingFigures],
        oldest_pending: Callable[[], Mapping[str, float]],
        ages: Callable[[], JobAges],
    ) -> None:
        self._counts = counts
        self._running = running_training
        self._oldest_pending = oldest_pending
        self._ages = ages

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only, so that registering does not read the store."""
        yield GaugeMetricFamily("mooring_jobs", "Jobs by kind and state.", labels=["kind", "state"])
        for name, text in self._FIGURES.items():
            yield GaugeMetricFamily(f"mooring_training_{name}", text)
        yield self._layer_sigma([])
        yield from self._age_families([], {})

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample per kind and state; training figures while a training runs (the largest of several)."""
        jobs = GaugeMetricFamily("mooring_jobs", "Jobs by kind and state.", labels=["kind", "state"])
        for (kind, state), count in sorted(self._counts().items()):
            jobs.add_metric([kind, state], count)
        yield jobs
        running = list(self._running())
        for name, text in self._FIGURES.items():
            family = GaugeMetricFamily(f"mooring_training_{name}", text)
            values = [float(job[name]) for job in running if job.get(name) is not None]
            if values:
                family.add_metric([], max(values))
            yield family
        yield self._layer_sigma(running)
        yield from self._age_families(self._ages(), self._oldest_pending())

    @staticmethod
    def _age_families(ages: JobAges, pending: Mapping[str, float]) -> Iterator[GaugeMetricFamily]:
        """The worst of each kind."""
        found: dict[str, dict[str, float]] = {"pending": dict(pending), "progress": {}, "checkpoint": {}}
        for kind, progress, checkpoint in ages:
            for name, age in (("progress", progress), ("checkpoint", checkpoint)):
                if age is not None:
                    found[name][kind] = max(age, found[name].get(kind, 0.0))
        for name, metric, text in (
            ("pending", "oldest_pending", "How long the oldest job has waited to be taken up."),
            ("progress", "progress_age", "Since a job run by this process last told its progress."),
            ("checkpoint", "checkpoint_age", "Since a training run by this process was last saved."),
        ):
            family = GaugeMetricFamily(f"mooring_job_{metric}_seconds", text, labels=["kind"])
            for kind, age in sorted(found[name].items()):
                family.add_metric([kind], age)
            yield family

    @staticmethod
    def _layer_sigma(running: Sequence[Mapping[str, Any]]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "mooring_training_layer_sigma",
            "Spectral norm of each layer's update in the running training.",
            labels=["layer"],
        )
        largest: dict[str, float] = {}
        for job in running:
            for layer, sigma in (job.get("layer_sigma") or {}).items():
                largest[layer] = max(float(sigma), largest.get(layer, 0.0))
        for layer, sigma in sorted(largest.items()):
            family.add_metric([layer], sigma)
        return family
