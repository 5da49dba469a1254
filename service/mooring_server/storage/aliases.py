"""Aliases of adapter versions, and the gate in front of them.

One transaction reads the policy, the version and its evaluation, judges, writes the decision down and moves
the alias; a refusal writes the decision alone. `lock_adapter` makes publications, rollbacks and deletions of
one adapter come one after the other, and the policy's row is locked against a change in between.

The history is a list that only grows. Each entry knows the entry that a rollback goes back to, so that
rolling back twice goes two publications back rather than to and fro.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.adapters import Adapters, adapter_of, alias_not_found
from mooring_server.storage.database import insert_row, new_id, size_of
from mooring_server.storage.jobs import job_of
from mooring_server.storage.models import (
    Adapter,
    Alias,
    AliasMove,
    Document,
    GateDecision,
    GatePolicyRow,
    Job,
    JobState,
    Judgement,
    MoveKind,
    Verdict,
)

Judge = Callable[[Adapter, list[Job], Document | None], Judgement]
"""From a version, the succeeded evaluations of its digest on its base (newest first), and the policy (None:
the default)."""


class Aliases(Adapters):
    """Alias rows, their history, gate policies and decisions."""

    # -- aliases -------------------------------------------------------------------------------------------

    def publish_alias(
        self,
        tenant: str,
        adapter_id: str,
        version: int | None,
        alias: str,
        *,
        judge: Judge,
        actor: str,
        via_alias: str = "",
        request_id: str = "",
        validate_only: bool = False,
    ) -> tuple[Alias | None, GateDecision]:
        """Let an alias point to a version if the gate lets it, and keep the decision.

        Args:
            tenant: whose adapter.
            adapter_id: its id.
            version: which version; None for the newest.
            alias: which alias; made when it does not exist.
            judge: the gate. Called inside the transaction; must not touch the store.
            actor: who asks, for the record.
            via_alias: publish the version that this alias points to.
            request_id: makes the call idempotent; a refusal is not remembered.
            validate_only: judge and say what would be, and keep nothing.

        Returns:
            The alias as it is now (None: refused) and the decision.

        Raises:
            MooringError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND, REQUEST_ID_REUSED, or what `judge` raises.
        """
        decision_id = new_id()
        with self.writing() as connection:
            made_before = None
            if not validate_only:
                payload = [adapter_id, version, via_alias, alias]
                made_before = self.replayed(
                    connection, tenant, "PublishAdapter", request_id, payload=payload, resource=decision_id
                )
            if made_before:
                decision = _decision(self._decision_row(connection, tenant, made_before))
                return self._after(connection, self._move_row(connection, tenant, made_before)), decision
            self.lock_adapter(connection, tenant, adapter_id)
            row = self._version_row(connection, tenant, adapter_id, version, alias=via_alias)
            target, policy = adapter_of(row), self._policy(connection, tenant, lock=True)
            found = judge(target, self._evaluations(connection, target), policy.policy)
            decision = GateDecision(
                tenant=tenant,
                decision_id=decision_id,
                adapter_id=adapter_id,
                version=target.version,
                digest=target.digest,
                base_digest=target.base_digest,
                alias=alias,
                verdict=found.verdict,
                checks=found.checks,
                policy=found.policy,
                policy_revision=policy.revision,
                evaluation_job_id=found.evaluation_job_id,
                actor=actor,
                create_time=self.now(connection),
            )
            insert_row(connection, schema.gate_decisions, vars(decision))
            published = None
            if found.verdict is Verdict.REFUSED:
                self._forget_request(connection, tenant, "PublishAdapter", request_id)
                name = f"adapters/{adapter_id}@{target.version}"
                self.audit(
                    connection,
                    tenant,
                    f"{MoveKind.PUBLISH}/{alias}",
                    name,
                    decision="refused",
                    digests=[target.digest],
                )
            else:
                now = self._pointer(connection, tenant, adapter_id, alias)
                again = now is not None and now.version == target.version
                move = self._move(
                    connection,
                    (tenant, adapter_id, alias),
                    MoveKind.PUBLISH,
                    before=now,
                    version=target.version,
                    came_from=None if now is None else now.came_from if again else now.number,
                    decision_id=decision_id,
                    actor=actor,
                )
                published = self._after(connection, move)
            if validate_only:
                connection.rollback()
            return published, decision

    def roll_back_alias(
        self, tenant: str, adapter_id: str, alias: str, *, actor: str, request_id: str = ""
    ) -> Alias:
        """Let an alias point to the version before, and next time to the one before that.

        Versions that were deleted since, and those for another base than the present one's, are passed over.

        Args:
            tenant: whose adapter.
            adapter_id: its id.
            alias: which alias.
            actor: who asks, for the record.
            request_id: makes the call idempotent.

        Raises:
            MooringError: ALIAS_NOT_FOUND, NOTHING_TO_ROLL_BACK, REQUEST_ID_REUSED.
        """
        move_id = new_id()
        with self.writing() as connection:
            made_before = self.replayed(
                connection,
                tenant,
                "RollBackAdapter",
                request_id,
                payload=[adapter_id, alias],
                resource=move_id,
            )
            if made_before:
                return self._after(connection, self._move_row(connection, tenant, made_before))
            self.lock_adapter(connection, tenant, adapter_id)
            now = self._pointer(connection, tenant, adapter_id, alias)
            if now is None:
                raise alias_not_found(adapter_id, alias)
            target = self._before(connection, now)
            if target is None:
                raise MooringError(
                    Reason.NOTHING_TO_ROLL_BACK,
                    f"Alias {alias!r} of adapter {adapter_id!r} has no earlier version to go back to.",
                    remedy="Publish another version, or delete the alias.",
                    metadata={"version": str(now.version)},
                )
            move = self._move(
                connection,
                (tenant, adapter_id, alias),
                MoveKind.ROLL_BACK,
                before=now,
                version=target.version,
                came_from=target.came_from,
                move_id=move_id,
                actor=actor,
            )
            return self._after(connection, move)

    def delete_alias(self, tenant: str, adapter_id: str, alias: str, *, actor: str) -> None:
        """Let an alias point nowhere; its history stays. Raises ALIAS_NOT_FOUND."""
        with self.writing() as connection:
            self.lock_adapter(connection, tenant, adapter_id)
            now = self._pointer(connection, tenant, adapter_id, alias)
            if now is None:
                raise alias_not_found(adapter_id, alias)
            self._move(
                connection,
                (tenant, adapter_id, alias),
                MoveKind.DELETE,
                before=now,
                version=None,
                came_from=None,
                actor=actor,
            )

    def list_aliases(
        self, tenant: str, *, adapter_id: str = "", page_size: int = 0, page_token: str = ""
    ) -> tuple[list[Alias], str]:
        """Aliases of one adapter ("": of all) by name, and the next page's token. Raises BAD_PAGE_TOKEN."""
        table, moves = schema.adapter_aliases, schema.alias_moves
        limit, cursor, close = self.page(page_size, page_token, ["aliases", tenant, adapter_id])
        key = table.c.adapter_id, table.c.alias
        query = select(moves).join(table, table.c.move == moves.c.number).where(table.c.tenant == tenant)
        query = query.order_by(*key).limit(limit)
        if adapter_id:
            query = query.where(table.c.adapter_id == adapter_id)
        if cursor is not None:
            query = query.where(tuple_(*key) > tuple_(*(literal(part) for part in cursor)))
        with self.reading() as connection:
            rows = connection.execute(query).all()
            page, token = close(rows, lambda row: [row.adapter_id, row.alias])
            return [self._after(connection, row) for row in page], token

    def list_alias_moves(
        self, tenant: str, adapter_id: str, *, alias: str = "", page_size: int = 0, page_token: str = ""
    ) -> tuple[list[AliasMove], str]:
        """What happened to an adapter's aliases (or one of them), newest first. Raises BAD_PAGE_TOKEN."""
        table = schema.alias_moves
        signature = ["alias_moves", tenant, adapter_id, alias]
        limit, cursor, close = self.page(page_size, page_token, signature)
        query = select(table).filter_by(tenant=tenant, adapter_id=adapter_id)
        if alias:
            query = query.filter_by(alias=alias)
        if cursor is not None:
            query = query.where(table.c.number < cursor[0])
        with self.reading() as connection:
            rows = connection.execute(query.order_by(table.c.number.desc()).limit(limit)).all()
        page, token = close(rows, lambda row: [row.number])
        return [_alias_move(row) for row in page], token

    # -- the gate ------------------------------------------------------------------------------------------

    def gate_policy(self, tenant: str) -> GatePolicyRow:
        """The tenant's policy."""
        with self.reading() as connection:
            return self._policy(connection, tenant)

    def update_gate_policy(
        self, tenant: str, change: Callable[[Document | None], Document], *, actor: str
    ) -> GatePolicyRow:
        """Replace the policy by what `change` makes of it; one that stays the same gets no new revision.

        Args:
            tenant: whose policy.
            change: from the policy in force (None: the default) to the new one; called in the transaction.
            actor: who asks, for the record.
        """
        table = schema.gate_policies
        with self.writing() as connection:
            row = self._policy(connection, tenant, lock=True, exclusive=True)
            policy = change(row.policy)
            if policy != row.policy:
                connection.execute(
                    update(table)
                    .filter_by(tenant=tenant)
                    .values(
                        policy=policy,
                        revision=table.c.revision + 1,
                        actor=actor,
                        update_time=self.now(connection),
                    )
                )
            changed = self._policy(connection, tenant)
            if changed.revision != row.revision:
                name = f"gatePolicy@{changed.revision}"
                self.audit(connection, tenant, "UpdateGatePolicy", name)
            return changed

    def list_gate_decisions(
        self,
        tenant: str,
        *,
        adapter_id: str = "",
        version: int | None = None,
        page_size: int = 0,
        page_token: str = "",
    ) -> tuple[list[GateDecision], str]:
        """Decisions, newest first, and the next page's token.

        Args:
            tenant: whose decisions.
            adapter_id: only about this adapter; about all when "".
            version: only about this version of it.
            page_size: 0 for the default.
            page_token: from the page before, with the same other arguments.

        Raises:
            MooringError: BAD_PAGE_TOKEN.
        """
        table = schema.gate_decisions
        signature = ["gate_decisions", tenant, adapter_id, version]
        limit, cursor, close = self.page(page_size, page_token, signature)
        query = select(table).filter_by(tenant=tenant).order_by(table.c.number.desc()).limit(limit)
        if adapter_id:
            query = query.filter_by(adapter_id=adapter_id)
        if version is not None:
            query = query.filter_by(version=version)
        if cursor is not None:
            query = query.where(table.c.number < cursor[0])
        with self.reading() as connection:
            rows = connection.execute(query).all()
        page, token = close(rows, lambda row: [row.number], lambda row: size_of(row.checks, row.policy))
        return [_decision(row) for row in page], token

    def standing(
        self, tenant: str, adapters: Collection[Adapter]
    ) -> dict[str, tuple[list[str], GateDecision | None]]:
        """Of some versions, by ``id@version``: the aliases that point to it, and its newest decision."""
        versions = sorted({(adapter.adapter_id, adapter.version) for adapter in adapters})
        if not versions:
            return {}
        aliases, decisions = schema.adapter_aliases, schema.gate_decisions

        def about(table: Table) -> ColumnElement[bool]:
            return (table.c.tenant == tenant) & tuple_(table.c.adapter_id, table.c.version).in_(versions)

        newest = (
            select(func.max(decisions.c.number))
            .where(about(decisions))
            .group_by(decisions.c.adapter_id, decisions.c.version)
        )
        found: dict[str, tuple[list[str], GateDecision | None]] = {
            f"{adapter_id}@{version}": ([], None) for adapter_id, version in versions
        }
        with self.reading() as connection:
            for row in connection.execute(select(decisions).where(decisions.c.number.in_(newest))):
                found[f"{row.adapter_id}@{row.version}"] = ([], _decision(row))
            for row in connection.execute(select(aliases).where(about(aliases)).order_by(aliases.c.alias)):
                found[f"{row.adapter_id}@{row.version}"][0].append(row.alias)
        return found

    # -- inside a transaction ------------------------------------------------------------------------------

    def _pointer(self, connection: Connection, tenant: str, adapter_id: str, alias: str) -> Row[Any] | None:
        """The history's entry that put the alias where it points; None when there is no such alias."""
        table, moves = schema.adapter_aliases, schema.alias_moves
        key = (table.c.tenant == tenant) & (table.c.adapter_id == adapter_id) & (table.c.alias == alias)
        query = select(moves).join(table, table.c.move == moves.c.number).where(key)
        return connection.execute(query).one_or_none()

    def _move(
        self,
        connection: Connection,
        key: tuple[str, str, str],
        kind: MoveKind,
        *,
        before: Row[Any] | None,
        version: int | None,
        came_from: int | None,
        actor: str,
        move_id: str = "",
        decision_id: str = "",
    ) -> Row[Any]:
        """Write an entry of the history and let the alias follow it."""
        tenant, adapter_id, alias = key
        moves, aliases = schema.alias_moves, schema.adapter_aliases
        values = {
            "tenant": tenant,
            "adapter_id": adapter_id,
            "alias": alias,
            "kind": kind,
            "version": version,
            "previous_version": None if before is None else before.version,
            "came_from": came_from,
            "move_id": move_id or decision_id or new_id(),
            "decision_id": decision_id,
            "actor": actor,
            "create_time": self.now(connection),
        }
        move = connection.execute(insert(moves).values(**values).returning(moves)).one()
        pointed = f"adapters/{adapter_id}@{version}" if version is not None else f"adapters/{adapter_id}"
        self.audit(connection, tenant, f"{kind}/{alias}", pointed)
        if version is None:
            connection.execute(delete(aliases).filter_by(tenant=tenant, adapter_id=adapter_id, alias=alias))
            return move
        pointer = self.upsert(aliases).values(
            tenant=tenant, adapter_id=adapter_id, alias=alias, version=version, move=move.number
        )
        connection.execute(
            pointer.on_conflict_do_update(
                index_elements=[aliases.c.tenant, aliases.c.adapter_id, aliases.c.alias],
                set_={"version": version, "move": move.number},
            )
        )
        return move

    def _before(self, connection: Connection, now: Row[Any]) -> Row[Any] | None:
        """The entry that a rollback from `now` goes back to; None when there is none."""
        moves, adapters = schema.alias_moves, schema.adapters

        def version_of(move: Row[Any]) -> Row[Any]:
            key = {"tenant": move.tenant, "adapter_id": move.adapter_id, "version": move.version}
            return connection.execute(select(adapters).filter_by(**key)).one()

        base_digest, earlier = version_of(now).base_digest, now.came_from
        while earlier is not None:
            move = connection.execute(select(moves).filter_by(number=earlier)).one()
            found = version_of(move)
            usable = found.delete_time is None and found.base_digest == base_digest
            if usable and move.version != now.version:
                return move
            earlier = move.came_from
        return None

    def _after(self, connection: Connection, move: Row[Any]) -> Alias:
        """The alias as an entry of its history left it."""
        key = {"tenant": move.tenant, "adapter_id": move.adapter_id, "version": move.version}
        before = self._before(connection, move)
        return Alias(
            tenant=move.tenant,
            adapter_id=move.adapter_id,
            alias=move.alias,
            version=move.version,
            digest=str(connection.scalar(select(schema.adapters.c.digest).filter_by(**key))),
            previous_version=None if before is None else before.version,
            update_time=move.create_time,
            actor=move.actor,
        )

    def _move_row(self, connection: Connection, tenant: str, move_id: str) -> Row[Any]:
        return connection.execute(select(schema.alias_moves).filter_by(tenant=tenant, move_id=move_id)).one()

    def _decision_row(self, connection: Connection, tenant: str, decision_id: str) -> Row[Any]:
        query = select(schema.gate_decisions).filter_by(tenant=tenant, decision_id=decision_id)
        return connection.execute(query).one()

    def _policy(
        self, connection: Connection, tenant: str, *, lock: bool = False, exclusive: bool = False
    ) -> GatePolicyRow:
        """The policy's row; locking it makes one for the default, because only a row can be locked."""
        table = schema.gate_policies
        query = select(table).filter_by(tenant=tenant)
        if lock:
            blank = self.upsert(table).values(tenant=tenant, revision=0, policy=None, actor="")
            connection.execute(blank.on_conflict_do_nothing())
            query = query.with_for_update(read=not exclusive)
        row = connection.execute(query).one_or_none()
        if row is None:
            return GatePolicyRow(tenant, 0, None, "", None)
        return GatePolicyRow(**row._mapping)  # noqa: SLF001

    def _evaluations(self, connection: Connection, adapter: Adapter) -> list[Job]:
        """Succeeded evaluations of exactly this adapter digest on its base, newest first."""
        table = schema.jobs
        query = (
            select(table)
            .filter_by(tenant=adapter.tenant, kind="evaluate", state=JobState.SUCCEEDED)
            .where(table.c.result[("figures", "adapter_digest")].as_string() == adapter.digest)
            .where(table.c.result[("figures", "base_digest")].as_string() == adapter.base_digest)
            .order_by(table.c.end_time.desc(), table.c.number.desc())
        )
        return [job_of(row) for row in connection.execute(query)]

    def _forget_request(self, connection: Connection, tenant: str, rpc: str, request_id: str) -> None:
        """Let a request that made nothing be repeated."""
        connection.execute(delete(schema.requests).filter_by(tenant=tenant, rpc=rpc, request_id=request_id))


def _decision(row: Row[Any]) -> GateDecision:
    values = dict(row._mapping)  # noqa: SLF001
    del values["number"]
    values["verdict"] = Verdict(values["verdict"])
    return GateDecision(**values)


def _alias_move(row: Row[Any]) -> AliasMove:
    values = dict(row._mapping)  # noqa: SLF001
    for name in ("number", "came_from", "move_id"):
        del values[name]
    values["kind"] = MoveKind(values["kind"])
    return AliasMove(**values)
