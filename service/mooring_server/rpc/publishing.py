"""AdapterService's part that decides what is live: publish, roll back, aliases, the gate."""

from __future__ import annotations

import asyncio

from mooring.v1 import adapter_pb2 as pb

from mooring_server.engine.tiers.host import require_base
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation import gate
from mooring_server.rpc import caller, convert_gate, names
from mooring_server.rpc.edge import Context
from mooring_server.rpc.runtime import Provide, Runtime
from mooring_server.storage.models import (
    Adapter,
    Document,
    Job,
    Judgement,
    Verdict,
)

LIVE = "live"
"""The alias where a request names none."""


class Publishing:
    """Handlers over the store's aliases; `AdapterServicer` inherits them.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        self._runtime = runtime

    async def PublishAdapter(
        self, request: pb.PublishAdapterRequest, context: Context
    ) -> pb.PublishAdapterResponse:
        """See the contract."""
        del context
        return await asyncio.to_thread(_publish, self._runtime(), request, caller.tenant(), caller.actor())

    async def RollBackAdapter(
        self, request: pb.RollBackAdapterRequest, context: Context
    ) -> pb.RollBackAdapterResponse:
        """See the contract."""
        del context
        where = _adapter_alone(request.name, "name")
        moved = await asyncio.to_thread(
            self._runtime().store.roll_back_alias,
            where.tenant,
            where.id,
            _alias_id(request.alias),
            actor=caller.actor(),
            request_id=names.check_request_id(request.request_id),
        )
        return pb.RollBackAdapterResponse(alias=convert_gate.alias(moved))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """See the contract."""
        del context
        where = names.resolve_adapter(caller.tenant(), request.name)
        if not where.alias:
            raise _bad_name("name", request.name, "tenants/{tenant}/adapters/{adapter}@{alias}")
        await asyncio.to_thread(
            self._runtime().store.delete_alias, where.tenant, where.id, where.alias, actor=caller.actor()
        )
        return pb.DeleteAliasResponse()

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent)
        adapter_id = ""
        if request.adapter:
            where = _adapter_alone(request.adapter, "adapter")
            tenant, adapter_id = where.tenant, where.id
        found, token = await asyncio.to_thread(
            self._runtime().store.list_aliases,
            tenant,
            adapter_id=adapter_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListAliasesResponse(
            aliases=[convert_gate.alias(item) for item in found], next_page_token=token
        )

    async def ListAliasMoves(
        self, request: pb.ListAliasMovesRequest, context: Context
    ) -> pb.ListAliasMovesResponse:
        """See the contract."""
        del context
        where = names.resolve_adapter(caller.tenant(), request.name)
        if where.version is not None:
            raise _bad_name("name", request.name, "tenants/{tenant}/adapters/{adapter}@{alias}")
        found, token = await asyncio.to_thread(
            self._runtime().store.list_alias_moves,
            where.tenant,
            where.id,
            alias=where.alias,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListAliasMovesResponse(
            moves=[convert_gate.move(item) for item in found], next_page_token=token
        )

    async def GetGatePolicy(
        self, request: pb.GetGatePolicyRequest, context: Context
    ) -> pb.GetGatePolicyResponse:
        """See the contract."""
        del context
        tenant = names.check_gate_policy(caller.tenant(), request.name, "name")
        row = await asyncio.to_thread(self._runtime().store.gate_policy, tenant)
        return pb.GetGatePolicyResponse(policy=convert_gate.policy_row(row))

    async def UpdateGatePolicy(
        self, request: pb.UpdateGatePolicyRequest, context: Context
    ) -> pb.UpdateGatePolicyResponse:
        """See the contract."""
        del context
        tenant = names.check_gate_policy(caller.tenant(), request.policy.name, "policy.name")
        row = await asyncio.to_thread(
            self._runtime().store.update_gate_policy,
            tenant,
            lambda policy: convert_gate.changed_policy(request, policy),
            actor=caller.actor(),
        )
        return pb.UpdateGatePolicyResponse(policy=convert_gate.policy_row(row))

    async def ListGateDecisions(
        self, request: pb.ListGateDecisionsRequest, context: Context
    ) -> pb.ListGateDecisionsResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent)
        adapter_id, version = "", None
        if request.adapter:
            where = names.resolve_adapter(caller.tenant(), request.adapter, "adapter")
            if where.alias:
                raise _bad_name("adapter", request.adapter, "tenants/{tenant}/adapters/{adapter}@{version}")
            tenant, adapter_id, version = where.tenant, where.id, where.version
        found, token = await asyncio.to_thread(
            self._runtime().store.list_gate_decisions,
            tenant,
            adapter_id=adapter_id,
            version=version,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListGateDecisionsResponse(
            decisions=[convert_gate.decision(item) for item in found], next_page_token=token
        )


def _publish(
    runtime: Runtime, request: pb.PublishAdapterRequest, tenant: str, actor: str
) -> pb.PublishAdapterResponse:
    """Blocking."""
    where = names.resolve_adapter(tenant, request.name)

    def judge(adapter: Adapter, evaluations: list[Job], policy: Document | None) -> Judgement:
        require_base(adapter, runtime.base.digest)
        return judgement(adapter, evaluations, policy)

    published, decision = runtime.store.publish_alias(
        where.tenant,
        where.id,
        where.version,
        _alias_id(request.alias),
        judge=judge,
        actor=actor,
        via_alias=where.alias,
        request_id=names.check_request_id(request.request_id),
        validate_only=request.validate_only,
    )
    kept = not request.validate_only
    if kept:
        runtime.metrics.gate_decisions.labels(decision.verdict.lower()).inc()
    if published is None:
        raise convert_gate.refusal(decision, kept=kept)
    return pb.PublishAdapterResponse(
        alias=convert_gate.alias(published), decision=convert_gate.decision(decision, kept=kept)
    )


def judgement(adapter: Adapter, evaluations: list[Job], document: Document | None) -> Judgement:
    """The gate's answer about a version.

    Args:
        adapter: the version.
        evaluations: succeeded ones of its digest on its base, newest first.
        document: the policy; None is the default.
    """
    policy = gate.GatePolicy.from_json(document)
    counting = next(
        (
            job
            for job in evaluations
            if job.result is not None and gate.counts(job.result["figures"], adapter.subject_id)
        ),
        None,
    )
    checks = gate.judge(
        policy,
        gate.Facts(
            rights=adapter.rights,
            certificate=adapter.certificate,
            budget=adapter.summary.get("budget"),
            evaluation=None if counting is None or counting.result is None else counting.result["figures"],
        ),
    )
    verdict = Verdict.PASSED
    if policy.mode is gate.Mode.OFF:
        verdict = Verdict.NOT_CHECKED
    elif gate.failing(checks):
        verdict = Verdict.WARNED if policy.mode is gate.Mode.WARN else Verdict.REFUSED
    return Judgement(
        verdict=verdict,
        checks=[check.to_json() for check in checks],
        policy=policy.to_json(),
        evaluation_job_id="" if counting is None else counting.job_id,
    )


def _alias_id(value: str) -> str:
    return names.check_id(value, "alias") if value else LIVE


def _adapter_alone(value: str, field: str) -> names.Resolved:
    """An adapter's name without version or alias. Raises BAD_RESOURCE_NAME."""
    where = names.resolve_adapter(caller.tenant(), value, field)
    if where.version is not None or where.alias:
        raise _bad_name(field, value, "tenants/{tenant}/adapters/{adapter}")
    return where


def _bad_name(field: str, value: str, form: str) -> MooringError:
    return MooringError(
        Reason.BAD_RESOURCE_NAME,
        f"{field} {value!r} does not fit here.",
        remedy=f"It has the form {form}.",
        fields=[FieldViolation(field, f"must match {form}")],
    )
