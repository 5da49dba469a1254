"""What the servicers work with: one object, complete before the first call is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mooring_server.config import Settings
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel
from mooring_server.engine.engine import Engine
from mooring_server.engine.tiers.host import AdapterTiers
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.prompts import PromptSets
from mooring_server.jobs.decoding.pool import DecoderPool
from mooring_server.provenance.marks import Marker
from mooring_server.rpc.edge import Gate
from mooring_server.rpc.held import HeldFiles
from mooring_server.rpc.names import Resolved
from mooring_server.rpc.quotas import DeviceTime, Quotas
from mooring_server.rpc.threads import LongWork
from mooring_server.safety.policy import SafetyPolicy
from mooring_server.storage.models import Adapter
from mooring_server.storage.objects import ObjectStore
from mooring_server.storage.store import Store
from mooring_server.telemetry.metrics import Metrics
from mooring_server.telemetry.traces import Tracing


@dataclass(frozen=True)
class Runtime:
    """The parts of a running server.

    Attributes:
        quotas: rates and queue depths of tenants.
        device_time: engine time of tenants.
        held: bounds what the files of calls take of memory.
        long: threads for what takes long.
        safety: what is checked of prompts and images.
        marker: signs into finished images where they come from.
        base_name: the base model's name to show.
        judges_available: whether evaluation jobs can run.
        prompts: what evaluations draw that name nothing.
        version: of the software.
    """

    settings: Settings
    metrics: Metrics
    tracing: Tracing
    gate: Gate
    store: Store
    objects: ObjectStore
    base: BaseModel
    bank: AdapterBank
    engine: Engine
    adapters: AdapterTiers
    decoders: DecoderPool
    safety: SafetyPolicy
    marker: Marker
    quotas: Quotas
    device_time: DeviceTime
    held: HeldFiles
    long: LongWork
    base_name: str
    judges_available: bool
    prompts: PromptSets
    version: str


Provide = Callable[[], Runtime]
"""Gives the runtime; only called once the gate lets calls through."""


def find_adapter(runtime: Runtime, where: Resolved) -> Adapter:
    """The version that a name means now. Blocking. Raises ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND."""
    return runtime.store.get_adapter(where.tenant, where.id, where.version, alias=where.alias)


def require_no_drain(gate: Gate) -> None:
    """End a long-lived stream when shutdown has begun. Raises DRAINING (UNAVAILABLE)."""
    if gate.draining.is_set():
        raise MooringError(
            Reason.DRAINING, "The server is shutting down.", remedy="Repeat the call; watching resumes."
        )
