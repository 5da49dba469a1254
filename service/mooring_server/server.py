"""The server put together: settings in, a listening process out.

`Server` is the thing itself; `serve` runs one until SIGTERM; `EmbeddedServer` runs one on a thread of its own
for tests and for commands that need no separate process.

Start: listen with health NOT_SERVING, load the base model and warm it up beside the event loop, then SERVING.
Stop: health NOT_SERVING, a pause for load balancers, running calls and the job's checkpoint, then everything
closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mooring.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    personalization_pb2,
    personalization_pb2_grpc,
    subject_pb2,
    subject_pb2_grpc,
)
from prometheus_client import start_http_server

from mooring_server import dinghy
from mooring_server.config import Settings
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel, load_base
from mooring_server.engine.engine import Engine
from mooring_server.engine.tiers.disk import DiskCache
from mooring_server.engine.tiers.host import AdapterTiers
from mooring_server.engine.warm_up import warm_up
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.config import NEW_SCENES
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.prompts import GENERIC_PROMPTS, PROBE_GENERIC, PromptSets, readable
from mooring_server.jobs.decoding.pool import DecoderPool
from mooring_server.jobs.runner import JobRunner, RunnerSettings
from mooring_server.jobs.sweeper import Sweeper
from mooring_server.provenance import identity
from mooring_server.provenance.marks import Marker
from mooring_server.rpc import permissions, threads, tls, tokens
from mooring_server.rpc.adapters import AdapterServicer
from mooring_server.rpc.edge import Access, EdgeInterceptor, Gate
from mooring_server.rpc.health import HealthServicer
from mooring_server.rpc.held import HeldFiles
from mooring_server.rpc.identity import Authenticator
from mooring_server.rpc.jobs import JobServicer
from mooring_server.rpc.permissions import Permission
from mooring_server.rpc.personalization import PersonalizationServicer
from mooring_server.rpc.probes import Probes
from mooring_server.rpc.quotas import MAX_CALLS, DeviceTime, Quotas
from mooring_server.rpc.runtime import Runtime
from mooring_server.rpc.subjects import SubjectServicer
from mooring_server.safety.images import ClassifierCheck
from mooring_server.safety.phrases import PACKAGED, PhraseCheck
from mooring_server.safety.policy import ImageCheck, PromptCheck, SafetyPolicy
from mooring_server.storage.buckets import open_objects
from mooring_server.storage.garbage import Retention
from mooring_server.storage.store import Store
from mooring_server.telemetry import logs, traces
from mooring_server.telemetry.audit_watch import AuditWatch
from mooring_server.telemetry.metrics import Metrics
from mooring_server.telemetry.observer import MetricsObserver

log = logs.get_logger("mooring.server")

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_CONCURRENT_CALLS = 2 * MAX_CALLS
"""With probes and callers that are not known yet; beyond it gRPC refuses without a word of ours."""
_CLOSING_GRACE_SECONDS = 0.5
_LEAST_FLUSH_SECONDS = 1.0
_MOST_FLUSH_SECONDS = 5.0
"""Bounds of the time that the last spans get, which is what the drain has left."""
_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (personalization_pb2, "PersonalizationService"),
        (subject_pb2, "SubjectService"),
        (adapter_pb2, "AdapterService"),
        (job_pb2, "JobService"),
    )
)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would each get a part of the calls, silently.
    ("grpc.so_reuseport", 0),
    # The client pings every 30 s while a call is open; gRPC's default takes one in 300 s and then hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class Server:
    """One server. Use `start`, then `stop`, on one event loop.

    Args:
        settings: what to run.

    Attributes:
        target: "host:port" that clients connect to; known once `start` listens.
        metrics_url: address of the metrics, empty when they are off.
        health_target: "host:port" of the health port, empty when there is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.target = ""
        self.metrics_url = ""
        self.health_target = ""
        self._version = version("mooring-server")
        self._metrics = Metrics(self._version)
        self._tracing = traces.Tracing()
        self._gate = Gate()
        self._runtime: Runtime | None = None
        self._store: Store | None = None
        self._authenticator: Authenticator | None = None
        self._device_time: DeviceTime | None = None
        self._quotas = Quotas(settings.quota_of, time.monotonic)
        self._runner: JobRunner | None = None
        self._sweeper: Sweeper | None = None
        self._audit_watch: AuditWatch | None = None
        self._health = HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._probes: Probes | None = None
        self._close_metrics: Callable[[], None] = lambda: None

    @property
    def runtime(self) -> Runtime:
        """The parts; complete after `start`."""
        assert self._runtime is not None, "the base model is not resident yet"
        return self._runtime

    async def start(self) -> None:
        """Listen, load the base model, take calls.

        Raises:
            MooringError: BASE_NOT_USABLE, JUDGES_NOT_AVAILABLE; INVALID_FIELD for an address in use, a
                certificate, of the server or of the marks on images, that cannot be used, or traces by a
                protocol that is not gRPC.
        """
        started = time.monotonic()
        asyncio.get_running_loop().set_default_executor(threads.for_calls())
        try:
            self._tracing = traces.from_environment(self._version)
            # the store first: whoever calls while the base is loaded is told so only when it may know
            store = await asyncio.to_thread(self._open_store)
            marker = await asyncio.to_thread(self._open_marker)
            await self._listen(store)
            await asyncio.to_thread(self._load, store, marker)
        except BaseException:
            await self.stop()
            raise
        self._gate.ready = True
        self._metrics.ready.set(1)
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        assert self._runner is not None
        self._runner.start()
        if self._sweeper is not None:
            self._sweeper.start()
        if self._audit_watch is not None:
            self._audit_watch.start()
        log.info(
            "serving",
            target=self.target,
            metrics=self.metrics_url,
            base=self.runtime.base_name,
            base_digest=self.runtime.base.digest,
            tracing=self._tracing.on,
            seconds=round(time.monotonic() - started, 2),
        )

    async def stop(self) -> None:
        """Drain and close; see the module. Safe after a failed start."""
        began = time.monotonic()
        log.info("draining", calls=self._gate.in_flight)
        self._metrics.ready.set(0)
        await self._health.enter_graceful_shutdown()
        if self._gate.ready:
            await asyncio.sleep(self.settings.drain_pause_seconds)
        self._gate.draining.set()
        handing_back = asyncio.create_task(asyncio.to_thread(self._stop_runner))
        with contextlib.suppress(TimeoutError):
            # Not `stop(grace)`: it would also wait for health watchers, which never end by themselves.
            await asyncio.wait_for(self._gate.idle.wait(), self.settings.drain_seconds)
        await handing_back
        if self._grpc is not None:
            await self._grpc.stop(_CLOSING_GRACE_SECONDS)
        if self._probes is not None:
            await self._probes.stop()
        if self._authenticator is not None:
            await self._authenticator.close()
        await asyncio.to_thread(self._close)
        left = self.settings.drain_pause_seconds + self.settings.drain_seconds - (time.monotonic() - began)
        patience = min(max(left, _LEAST_FLUSH_SECONDS), _MOST_FLUSH_SECONDS)  # with a collector that hangs
        await asyncio.to_thread(self._tracing.close, patience)
        log.info("stopped")

    # ------------------------------------------------------------------ listening

    def _open_store(self) -> Store:
        self.settings.state_dir.mkdir(parents=True, exist_ok=True)
        store = self._store = Store(self.settings.storage_url)
        store.quota_of = self.settings.quota_of
        return store

    def _open_marker(self) -> Marker:
        settings, metrics = self.settings, self._metrics
        if not settings.provenance:
            return Marker()
        cert, key = settings.provenance_cert, settings.provenance_key
        if cert is None or key is None:
            cert, key = identity.self_issued(settings.state_dir / identity.FOLDER).names
            # a tool on one's own machine need not complain of it at every start
            tell = log.warning if settings.auth else log.info
            tell("images are marked by a certificate that nobody vouches for", authority=str(cert.parent))
        marker = Marker(cert, key, self._version, observe=metrics.mark_seconds.observe)
        metrics.mark_expiry.set_function(marker.expiry)
        return marker

    async def _listen(self, store: Store) -> None:
        # The servicer starts as SERVING: say otherwise before anybody can ask.
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        settings = self.settings
        credentials = tls.server_credentials(settings)
        authenticator = self._authenticator = Authenticator(
            settings.auth,
            find_key=store.find_key,
            tokens=tokens.verifier_of(settings),
            trust_domain=settings.mtls_trust_domain,
        )
        await authenticator.start()
        reflecting = Permission.READ if settings.reflection == "authenticated" else Permission.OPEN

        async def denied(tenant: str, method: str) -> None:
            if self._runtime is not None:  # a server that is not ready has nothing to protect yet
                record = partial(self._runtime.store.record, tenant, method, "", decision="denied")
                await asyncio.to_thread(record)

        access = Access(
            authenticator, self._quotas, partial(permissions.rule_of, reflection=reflecting), denied
        )
        server = grpc.aio.server(
            interceptors=[EdgeInterceptor(self._metrics, self._gate, access, self._tracing)],
            options=[*_OPTIONS, *tls.connection_options(settings)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )

        def provide() -> Runtime:
            return self.runtime

        personalization_pb2_grpc.add_PersonalizationServiceServicer_to_server(
            PersonalizationServicer(provide), server
        )
        subject_pb2_grpc.add_SubjectServiceServicer_to_server(SubjectServicer(provide), server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(provide), server)
        job_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(provide), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection != "off":
            reflection.enable_server_reflection(
                [*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server
            )
        host = settings.listen.rpartition(":")[0]
        try:
            port = (
                server.add_insecure_port(settings.listen)
                if credentials is None
                else server.add_secure_port(settings.listen, credentials)
            )
        except RuntimeError as error:
            raise _address_in_use("listen", self.settings.listen) from error
        self.target = f"{host}:{port}"
        self._start_metrics()
        await self._start_probes()
        self._grpc = server
        await server.start()

    async def _start_probes(self) -> None:
        address = self.settings.health_listen
        if not address:
            return
        probes = self._probes = Probes(self._health)
        try:
            self.health_target = await probes.start(address)
        except RuntimeError as error:
            raise _address_in_use("health_listen", address) from error

    def _start_metrics(self) -> None:
        if not self.settings.metrics_listen:
            return
        host, _, port = self.settings.metrics_listen.rpartition(":")
        address = host.removeprefix("[").removesuffix("]")
        try:
            http, thread = start_http_server(int(port), address, self._metrics.registry)
        except OSError as error:
            raise _address_in_use("metrics_listen", self.settings.metrics_listen) from error
        self.metrics_url = f"http://{host}:{http.server_port}/metrics"

        def close() -> None:
            http.shutdown()
            http.server_close()
            thread.join()

        self._close_metrics = close

    # ------------------------------------------------------------------ the parts, off the event loop

    def _load(self, store: Store, marker: Marker) -> None:
        settings = self.settings
        objects = open_objects(settings.objects_location)
        packaged = dinghy.packaged(settings.base)
        base = load_base(
            dinghy.base_dir(packaged.version) if packaged else settings.base,
            device=settings.device,
            dtype=getattr(torch, settings.dtype),
            threads=settings.threads,
            autocast=settings.autocast,
            attention=settings.attention,
        )
        device_time = self._device_time = DeviceTime(store.add_device_seconds, store.device_seconds)
        device_time.start()
        observer = MetricsObserver(self._metrics, device_time.used)
        bank = AdapterBank(
            base, slots=settings.slots, rank=settings.rank, targets=settings.targets, observer=observer
        )
        ready = warm_up(
            base,
            bank,
            deterministic=settings.keeps_bits,
            compiled=settings.compile,
            cuda_graphs=settings.cuda_graphs,
            max_step_seconds=settings.max_step_seconds,
            costs_file=settings.costs_file,
        )
        engine = Engine(
            base,
            bank,
            threads=settings.threads,
            training_share=settings.training_share,
            max_queue=settings.max_queue,
            max_running=settings.max_running,
            costs=ready.costs,
            deterministic=settings.keeps_bits,
            prepared=ready.prepared,
            observer=observer,
        )
        log.info(
            "warm",
            rows=ready.costs.limit(ready.costs.native),
            max_running=engine.max_running,
            deterministic=engine.deterministic,
            prepared=[] if ready.prepared is None else list(ready.prepared.row_counts),
        )
        judges = _judges(settings, packaged=packaged is not None)
        scenes = dinghy.new_scene_prompts("{}") if packaged else NEW_SCENES
        generic = dinghy.generic_prompts(2 * PROBE_GENERIC, packaged) if packaged else GENERIC_PROMPTS
        prompts = PromptSets.of(readable(base, scenes), readable(base, generic, least=4))
        disk = None
        if settings.disk_cache_bytes:
            disk = DiskCache(settings.adapter_cache_dir, settings.disk_cache_bytes, observer)
        adapters = AdapterTiers(
            objects.get,
            bank,
            host_bytes=settings.host_cache_bytes,
            disk=disk,
            max_bytes=settings.max_adapter_bytes,
            observer=observer,
        )
        safety = _safety(settings)
        self._runner = JobRunner(
            store,
            objects,
            engine,
            base,
            bank,
            judges,
            RunnerSettings(
                lease_seconds=settings.lease_seconds,
                prompts=prompts,
            ),
            observer=observer,
            drawer=engine,
            adapters=adapters,
            safety=safety,
            marker=marker,
            tracing=self._tracing,
        )
        if settings.gc_interval_seconds:
            retention = Retention(
                orphans=settings.gc_orphan_hours * 3600,
                results=settings.gc_result_days * 86400,
                deleted_adapters=settings.gc_deleted_adapter_days * 86400,
            )
            worker = RunnerSettings().worker
            interval = settings.gc_interval_seconds
            self._sweeper = Sweeper(store, objects, retention, interval=interval, worker=worker)
        self._audit_watch = AuditWatch(store.verify_audit, self._metrics)
        self._metrics.watch_jobs(
            store.count_jobs,
            lambda: store.running_progress("train"),
            store.oldest_pending,
            self._runner.ages,
        )
        self._metrics.device_bytes.labels("weights").set(_weight_bytes(base))
        self._metrics.device_bytes.labels("arena").set(bank.arena.nbytes)
        if base.device.type == "cuda":
            _watch_device(self._metrics, base.device)
        self._runtime = Runtime(
            settings=settings,
            metrics=self._metrics,
            tracing=self._tracing,
            gate=self._gate,
            store=store,
            objects=objects,
            base=base,
            bank=bank,
            engine=engine,
            adapters=adapters,
            decoders=DecoderPool(settings.decoders),
            safety=safety,
            marker=marker,
            quotas=self._quotas,
            device_time=device_time,
            held=HeldFiles.of(settings),
            long=threads.LongWork(),
            base_name=packaged.version if packaged else Path(settings.base).name,
            judges_available=judges is not None,
            prompts=prompts,
            version=self._version,
        )

    def _stop_runner(self) -> None:
        if self._runner is not None:
            self._runner.stop(self.settings.drain_seconds)

    def _close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.stop()
        if self._audit_watch is not None:
            self._audit_watch.stop()
        if self._runtime is not None:
            self._runtime.long.close()
            self._runtime.engine.close()
            self._runtime.adapters.close()
            self._runtime.decoders.close()
        if self._device_time is not None:
            self._device_time.close()
        if self._store is not None:
            self._store.close()
        self._close_metrics()


async def serve(settings: Settings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it. A second signal ends it at once.

    Args:
        settings: what to run.
        on_ready: called with "host:port" once calls are taken.

    Raises:
        MooringError: it could not start.
    """
    logs.configure(settings.log_level, settings.log_format)
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop_at(name: signal.Signals) -> None:
        if stopping.is_set():
            signal.signal(name, signal.SIG_DFL)
            signal.raise_signal(name)
        stopping.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop_at, name)
    server = Server(settings)
    starting = asyncio.create_task(server.start())
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
    # A signal during the load takes effect right after it: the loading thread cannot be interrupted.
    await starting
    if on_ready is not None and not stopping.is_set():
        on_ready(server.target)
    await waiting
    await server.stop()


class EmbeddedServer:
    """A server on its own thread and event loop, on a free port; a context manager.

    Logs only warnings unless the program has set up structlog. Metrics are off unless `metrics` is true.

    Args:
        settings: what to run; its addresses are replaced.
        metrics: serve /metrics, on a free port too.

    Attributes:
        server: the server inside.
    """

    def __init__(self, settings: Settings | None = None, *, metrics: bool = False) -> None:
        settings = settings or Settings()
        addresses = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0" if metrics else ""}
        self.settings = settings.model_copy(update=addresses)
        self.server = Server(self.settings)
        self._thread = threading.Thread(target=self._run, name="mooring-server", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def target(self) -> str:
        """Where to connect to, as host:port."""
        return self.server.target

    @property
    def metrics_url(self) -> str:
        """Address of the metrics."""
        return self.server.metrics_url

    def __enter__(self) -> Self:
        """Start, and wait until calls are taken. Raises what `Server.start` raises."""
        logs.ensure_configured()
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain and stop; nothing when that was done before."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.server.start()
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that waits
            self._failure = error
            return
        finally:
            self._started.set()
        await self._stop.wait()
        await self.server.stop()


def _safety(settings: Settings) -> SafetyPolicy:
    def listed(text: str) -> frozenset[str]:
        return frozenset(part.strip() for part in text.split(",") if part.strip())

    prompts: list[PromptCheck] = []
    if settings.prompt_policy not in {"", "off"}:
        packaged = settings.prompt_policy == "packaged"
        prompts.append(PhraseCheck.load(PACKAGED if packaged else settings.prompt_policy))
    images: list[ImageCheck] = []
    if settings.image_check:
        images.append(
            ClassifierCheck.load(
                settings.image_check, listed(settings.image_check_refuse), settings.image_check_threshold
            )
        )
    return SafetyPolicy(prompts, images, listed(settings.safety_exempt_tenants))


def _judges(settings: Settings, *, packaged: bool) -> Judges | None:
    """The named judges, or the packaged base's own: dinghy's judges would mislead about another base."""
    clip, dino = settings.clip_judge, settings.dino_judge
    if packaged and dinghy.clip_dir().is_dir() and dinghy.dino_dir().is_dir():
        clip, dino = clip or str(dinghy.clip_dir()), dino or str(dinghy.dino_dir())
    if not clip and not dino:
        return None
    if not (clip and dino):
        raise MooringError(
            Reason.JUDGES_NOT_AVAILABLE,
            "Only one of the two judges is configured.",
            remedy="Set both MOORING_CLIP_JUDGE and MOORING_DINO_JUDGE, or neither.",
        )
    return Judges.load(clip, dino, device=settings.device)


def _watch_device(metrics: Metrics, device: torch.device) -> None:
    """What torch holds of the device, and how large it is, read at each scrape."""
    kinds: dict[str, Callable[[], float]] = {
        "allocated": lambda: torch.cuda.memory_allocated(device),
        "reserved": lambda: torch.cuda.memory_reserved(device),
        "total": lambda: torch.cuda.get_device_properties(device).total_memory,
    }
    for kind, read in kinds.items():
        metrics.device_bytes.labels(kind).set_function(read)


def _weight_bytes(base: BaseModel) -> int:
    return sum(parameter.nbytes for module in base.modules().values() for parameter in module.parameters())


def _address_in_use(field: str, address: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD,
        f"Cannot listen on {address}: it is in use, or not an address of this machine.",
        remedy=f"Stop what listens there, or set MOORING_{field.upper()} to another (port 0: a free one).",
    )
