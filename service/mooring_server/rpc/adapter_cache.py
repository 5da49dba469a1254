"""Decoded adapters in host memory, between the object store and the engine's slots."""

from __future__ import annotations

import threading
from collections import OrderedDict

from mooring_server.engine.adapters import AdapterWeights, from_safetensors
from mooring_server.engine.base import BaseModel
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.models import Adapter
from mooring_server.storage.objects import ObjectStore
from mooring_server.telemetry.metrics import Metrics


class AdapterCache:
    """Least recently used adapters, by object key (a key never gets other contents). Thread-safe; blocking.

    Args:
        objects: where the files are.
        base: what they must fit.
        metrics: counts queries and hits of the tier "host".
        capacity: adapters kept.
        max_bytes: larger files are refused.
        max_rank: larger ranks are refused.
    """

    def __init__(
        self,
        objects: ObjectStore,
        base: BaseModel,
        metrics: Metrics,
        *,
        capacity: int,
        max_bytes: int,
        max_rank: int,
    ) -> None:
        self._objects = objects
        self._base = base
        self._metrics = metrics
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._max_rank = max_rank
        self._kept: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def get(self, adapter: Adapter) -> AdapterWeights:
        """The adapter's weights.

        Raises:
            MooringError: BASE_DIGEST_MISMATCH for another base's adapter; ADAPTER_NOT_FOUND when its file is
                gone (it was deleted a moment ago); what `from_safetensors` raises.
        """
        self._metrics.cache_queries.labels("host").inc()
        found = self._find(adapter.object_key)
        if found is not None:
            self._metrics.cache_hits.labels("host").inc()
            return found
        require_base(adapter, self._base.digest)
        with self._loading:  # one at a time: a burst for one adapter must not decode it many times over
            found = self._find(adapter.object_key)
            if found is not None:
                return found
            try:
                data = self._objects.get(adapter.object_key)
            except KeyError:
                raise MooringError(
                    Reason.ADAPTER_NOT_FOUND,
                    f"The file of adapter {adapter.name!r} is gone.",
                    remedy="It was deleted just now; list the adapters.",
                ) from None
            weights = from_safetensors(data, self._base, max_bytes=self._max_bytes, max_rank=self._max_rank)
            with self._lock:
                self._kept[adapter.object_key] = weights
                while len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            return weights

    def _find(self, key: str) -> AdapterWeights | None:
        with self._lock:
            weights = self._kept.get(key)
            if weights is not None:
                self._kept.move_to_end(key)
            return weights


def require_base(adapter: Adapter, base_digest: str) -> None:
    """Refuse an adapter that belongs to another base. Raises BASE_DIGEST_MISMATCH."""
    if adapter.base_digest != base_digest:
        raise MooringError(
            Reason.BASE_DIGEST_MISMATCH,
            f"{adapter.name!r} belongs to base {adapter.base_digest}, this server runs {base_digest}.",
            remedy="Train it again on this base, or serve the base it belongs to.",
            metadata={"expected": base_digest, "found": adapter.base_digest},
        )
