"""What each call needs, and what each role may do: two tables, and nothing is allowed that they do not name.

They are a table here rather than options in the contract because a reviewer then sees the whole policy on
one screen, and because health and reflection, whose contracts are not ours, stand in the same table. A call
that is not in `RULES` is refused; `tests/rpc/test_permissions.py` walks every descriptor that the server
registers against every role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mooring_server.config import Role
from mooring_server.errors import MooringError, Reason


class Permission(StrEnum):
    """Kinds of calls, by what they do to a tenant's things."""

    OPEN = "open"
    """Needs no credential: probes."""
    READ = "read"
    """Look at descriptions, figures and previews."""
    GENERATE = "generate"
    """Use device time for images."""
    CREATE = "create"
    """Upload, start and stop work."""
    EXPORT = "export"
    """Take weights away."""
    MANAGE = "manage"
    """Bring in foreign weights, delete, decide what is live."""


@dataclass(frozen=True)
class Rule:
    """What a call needs.

    Attributes:
        permission: that the caller's role must have.
        operators_anywhere: an operator may name another tenant's resource.
    """

    permission: Permission
    operators_anywhere: bool = False


GRANTS: Mapping[Role, frozenset[Permission]] = {
    Role.READ_ONLY: frozenset({Permission.READ}),
    Role.USER: frozenset({Permission.READ, Permission.GENERATE, Permission.CREATE, Permission.EXPORT}),
    Role.ADMIN: frozenset(Permission) - {Permission.OPEN},
    # Whoever runs the service sees and stops work, and touches no customer's pictures or weights.
    Role.OPERATOR: frozenset({Permission.READ}),
}

_READ, _CREATE, _MANAGE = Rule(Permission.READ), Rule(Permission.CREATE), Rule(Permission.MANAGE)

RULES: Mapping[str, Rule] = {
    "mooring.v1.PersonalizationService/GetServerInfo": _READ,
    "mooring.v1.PersonalizationService/Train": _CREATE,
    "mooring.v1.PersonalizationService/Evaluate": _CREATE,
    "mooring.v1.PersonalizationService/Generate": Rule(Permission.GENERATE),
    "mooring.v1.PersonalizationService/GenerateBatch": Rule(Permission.GENERATE),
    "mooring.v1.PersonalizationService/RunBatch": Rule(Permission.GENERATE),
    "mooring.v1.SubjectService/CreateSubject": _CREATE,
    "mooring.v1.SubjectService/GetSubject": _READ,
    "mooring.v1.SubjectService/ListSubjects": _READ,
    "mooring.v1.SubjectService/DeleteSubject": _MANAGE,
    "mooring.v1.SubjectService/UploadPhotos": _CREATE,
    "mooring.v1.AdapterService/GetAdapter": _READ,
    "mooring.v1.AdapterService/ListAdapters": _READ,
    "mooring.v1.AdapterService/DeleteAdapter": _MANAGE,
    "mooring.v1.AdapterService/ExportAdapter": Rule(Permission.EXPORT),
    "mooring.v1.AdapterService/ImportAdapter": _MANAGE,
    "mooring.v1.AdapterService/PublishAdapter": _MANAGE,
    "mooring.v1.AdapterService/RollBackAdapter": _MANAGE,
    "mooring.v1.AdapterService/DeleteAlias": _MANAGE,
    "mooring.v1.AdapterService/ListAliases": _READ,
    "mooring.v1.AdapterService/ListAliasMoves": _READ,
    "mooring.v1.AdapterService/GetGatePolicy": _READ,
    "mooring.v1.AdapterService/UpdateGatePolicy": _MANAGE,
    "mooring.v1.AdapterService/ListGateDecisions": _READ,
    "mooring.v1.JobService/GetJob": Rule(Permission.READ, operators_anywhere=True),
    "mooring.v1.JobService/ListJobs": Rule(Permission.READ, operators_anywhere=True),
    "mooring.v1.JobService/CancelJob": Rule(Permission.CREATE, operators_anywhere=True),
    "mooring.v1.JobService/WatchJob": _READ,  # shows previews, which are the customer's
    "mooring.v1.JobService/GetEvaluation": _READ,
    "mooring.v1.JobService/DownloadArtifact": _READ,
    "mooring.v1.JobService/DownloadBatch": _READ,
    "grpc.health.v1.Health/Check": Rule(Permission.OPEN),
    "grpc.health.v1.Health/List": Rule(Permission.OPEN),
    "grpc.health.v1.Health/Watch": Rule(Permission.OPEN),
}

REFLECTION = "grpc.reflection."
"""The contract is public, but a closed server need not hand it out: see the setting `reflection`."""


def rule_of(method: str, *, reflection: Permission = Permission.READ) -> Rule | None:
    """The rule of "package.Service/Method"; None when it was never declared, which means refused."""
    return Rule(reflection) if method.startswith(REFLECTION) else RULES.get(method)


def may(role: Role, rule: Rule) -> bool:
    """Whether a role has what a rule asks for."""
    if role is Role.OPERATOR and rule.operators_anywhere:
        return True
    return rule.permission is Permission.OPEN or rule.permission in GRANTS[role]


def require(role: Role, rule: Rule | None) -> Rule:
    """The rule, if the role may. Looks at no resource, so it tells nothing of any. Raises NOT_ALLOWED."""
    if rule is not None and may(role, rule):
        return rule
    needed = "nobody" if rule is None else rule.permission.value
    raise MooringError(
        Reason.NOT_ALLOWED,
        f"The role {role.value!r} may not make this call.",
        remedy="Use a credential of a role that may; docs/security.md lists them.",
        metadata={"role": role.value, "permission": needed},
    )
