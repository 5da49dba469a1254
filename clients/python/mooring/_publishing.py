"""The clients' part that decides what is live: publish, roll back, aliases, the gate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

from mooring import _requests
from mooring._requests import resource_name
from mooring.v1 import adapter_pb2, adapter_pb2_grpc, gate_pb2

Response = TypeVar("Response")


class Publishing:
    """Methods of `mooring.Client`."""

    _adapters: adapter_pb2_grpc.AdapterServiceStub

    def _unary(self, method: Callable[..., Response], request: Any) -> Response:
        raise NotImplementedError

    def _pages(self, method: Any, request: Any, field: str) -> Iterator[Any]:
        raise NotImplementedError

    def publish_adapter(
        self, adapter: Any, *, alias: str = "", validate_only: bool = False, request_id: str = ""
    ) -> adapter_pb2.PublishAdapterResponse:
        """Let an alias point to a version, if the tenant's gate passes it.

        Args:
            adapter: the version: "rex@3", name or message; "rex" is the newest one now.
            alias: which alias; "" is "live". From then on "rex@live" stands for the version.
            validate_only: only ask what the gate would decide.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.

        Returns:
            The alias as it is now, and the gate's decision.

        Raises:
            FailedPreconditionError: the gate refused it (reason "GATE_REFUSED" or "GATE_NEEDS_EVALUATION");
                `fields` has one entry per failing figure.
        """
        request = _requests.publish_adapter(
            adapter, alias=alias, validate_only=validate_only, request_id=request_id
        )
        return self._unary(self._adapters.PublishAdapter, request)

    def roll_back_adapter(
        self, adapter: Any, *, alias: str = "", request_id: str = ""
    ) -> gate_pb2.AdapterAlias:
        """Let an alias point again to the version before; called again, it goes further back.

        Args:
            adapter: id or name of the adapter, without a version.
            alias: which alias; "" is "live".
            request_id: UUID that makes the call safe to repeat; "" makes a new one.

        Raises:
            FailedPreconditionError: there is no earlier version (reason "NOTHING_TO_ROLL_BACK").
        """
        request = _requests.roll_back_adapter(adapter, alias=alias, request_id=request_id)
        return self._unary(self._adapters.RollBackAdapter, request).alias

    def delete_alias(self, alias: Any) -> None:
        """Delete an alias ("rex@live"); the version that it points to stays, and so does the history."""
        request = adapter_pb2.DeleteAliasRequest(name=resource_name("adapters", alias))
        self._unary(self._adapters.DeleteAlias, request)

    def list_aliases(self, adapter: Any = "") -> Iterator[gate_pb2.AdapterAlias]:
        """The aliases of an adapter ("rex"), or of all, by name."""
        request = adapter_pb2.ListAliasesRequest(adapter=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListAliases, request, "aliases")

    def list_alias_moves(self, adapter: Any) -> Iterator[gate_pb2.AliasMove]:
        """What happened to an adapter's aliases ("rex"), or to one of them ("rex@live"), newest first."""
        request = adapter_pb2.ListAliasMovesRequest(name=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListAliasMoves, request, "moves")

    def list_gate_decisions(self, adapter: Any = "") -> Iterator[gate_pb2.GateDecision]:
        """What the gate decided about an adapter ("rex"), a version ("rex@2") or all, newest first."""
        request = adapter_pb2.ListGateDecisionsRequest(adapter=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListGateDecisions, request, "decisions")

    def gate_policy(self) -> gate_pb2.GatePolicy:
        """What the tenant's gate asks for."""
        return self._unary(self._adapters.GetGatePolicy, adapter_pb2.GetGatePolicyRequest()).policy

    def update_gate_policy(
        self,
        *,
        preset: str = "",
        mode: str = "",
        allowed_rights: Iterable[str] | None = None,
        **thresholds: Any,
    ) -> gate_pb2.GatePolicy:
        """Change what the tenant's gate asks for; what is left out stays.

        Args:
            preset: start from "strict", "balanced" or "lenient"; "" from the policy in force.
            mode: "enforce", "warn" or "off".
            allowed_rights: the only bases of rights that pass; an empty list for any.
            thresholds: fields of `GatePolicy`, such as `min_dino=0.6`; None no longer checks.
        """
        request = _requests.update_gate_policy(
            preset=preset, mode=mode, allowed_rights=allowed_rights, **thresholds
        )
        return self._unary(self._adapters.UpdateGatePolicy, request).policy


class AsyncPublishing:
    """Methods of `mooring.aio.Client`; each takes what its namesake above takes."""

    _adapters: adapter_pb2_grpc.AdapterServiceAsyncStub

    async def _unary(self, method: Callable[..., Awaitable[Response]], request: Any) -> Response:
        raise NotImplementedError

    def _pages(self, method: Any, request: Any, field: str) -> AsyncIterator[Any]:
        raise NotImplementedError

    async def publish_adapter(self, adapter: Any, **arguments: Any) -> adapter_pb2.PublishAdapterResponse:
        """Let an alias point to a version, if the tenant's gate passes it."""
        request = _requests.publish_adapter(adapter, **arguments)
        return await self._unary(self._adapters.PublishAdapter, request)

    async def roll_back_adapter(self, adapter: Any, **arguments: Any) -> gate_pb2.AdapterAlias:
        """Let an alias point again to the version before; called again, it goes further back."""
        request = _requests.roll_back_adapter(adapter, **arguments)
        return (await self._unary(self._adapters.RollBackAdapter, request)).alias

    async def delete_alias(self, alias: Any) -> None:
        """Delete an alias ("rex@live"); the version that it points to stays, and so does the history."""
        request = adapter_pb2.DeleteAliasRequest(name=resource_name("adapters", alias))
        await self._unary(self._adapters.DeleteAlias, request)

    def list_aliases(self, adapter: Any = "") -> AsyncIterator[gate_pb2.AdapterAlias]:
        """The aliases of an adapter ("rex"), or of all, by name."""
        request = adapter_pb2.ListAliasesRequest(adapter=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListAliases, request, "aliases")

    def list_alias_moves(self, adapter: Any) -> AsyncIterator[gate_pb2.AliasMove]:
        """What happened to an adapter's aliases ("rex"), or to one of them ("rex@live"), newest first."""
        request = adapter_pb2.ListAliasMovesRequest(name=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListAliasMoves, request, "moves")

    def list_gate_decisions(self, adapter: Any = "") -> AsyncIterator[gate_pb2.GateDecision]:
        """What the gate decided about an adapter ("rex"), a version ("rex@2") or all, newest first."""
        request = adapter_pb2.ListGateDecisionsRequest(adapter=resource_name("adapters", adapter))
        return self._pages(self._adapters.ListGateDecisions, request, "decisions")

    async def gate_policy(self) -> gate_pb2.GatePolicy:
        """What the tenant's gate asks for."""
        return (await self._unary(self._adapters.GetGatePolicy, adapter_pb2.GetGatePolicyRequest())).policy

    async def update_gate_policy(self, **changes: Any) -> gate_pb2.GatePolicy:
        """Change what the tenant's gate asks for; what is left out stays."""
        request = _requests.update_gate_policy(**changes)
        return (await self._unary(self._adapters.UpdateGatePolicy, request)).policy
