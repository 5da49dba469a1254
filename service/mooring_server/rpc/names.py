"""Resource names: `tenants/{tenant}/subjects/{subject}` and its siblings.

A name of another tenant is not an error here: it resolves to nobody's tenant, so that the look-up that
follows fails exactly, in words and in time, as it does for a name that does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mooring_server.config import TENANT
from mooring_server.errors import FieldViolation, MooringError, Reason

NOBODY = ""
"""A tenant that owns nothing."""

OWN = "-"
"""In a name: the caller's own tenant."""

_TENANT = rf"(?P<tenant>-|{TENANT.pattern})"
_ID = r"[a-z](?:[a-z0-9-]{0,62})"
_ID_RE = re.compile(_ID)
_PARENT_RE = re.compile(rf"tenants/{_TENANT}")
_SUBJECT_RE = re.compile(rf"tenants/{_TENANT}/subjects/(?P<id>{_ID})")
_JOB_RE = re.compile(rf"tenants/{_TENANT}/jobs/(?P<id>[a-z0-9][a-z0-9-]{{0,62}})")
_ADAPTER_RE = re.compile(
    rf"tenants/{_TENANT}/adapters/(?P<id>{_ID})(?:@(?:(?P<version>[1-9][0-9]{{0,8}})|(?P<alias>{_ID})))?"
)
_REQUEST_ID_RE = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_GATE_POLICY_RE = re.compile(rf"tenants/{_TENANT}/gatePolicy")


@dataclass(frozen=True)
class Resolved:
    """Where to look.

    Attributes:
        tenant: whose it is; `NOBODY` for another's.
        id: of the thing.
        version: of an adapter; None for the newest, or where there is an alias.
        alias: of an adapter; "" for none.
    """

    tenant: str
    id: str
    version: int | None = None
    alias: str = ""


def parent(tenant: str) -> str:
    """`tenants/{tenant}`."""
    return f"tenants/{tenant}"


def subject(tenant: str, subject_id: str) -> str:
    """`tenants/{tenant}/subjects/{subject}`."""
    return f"tenants/{tenant}/subjects/{subject_id}"


def adapter(tenant: str, adapter_at_version: str) -> str:
    """`tenants/{tenant}/adapters/{adapter}@{version}`."""
    return f"tenants/{tenant}/adapters/{adapter_at_version}"


def job(tenant: str, job_id: str) -> str:
    """`tenants/{tenant}/jobs/{job}`."""
    return f"tenants/{tenant}/jobs/{job_id}"


def gate_policy(tenant: str) -> str:
    """`tenants/{tenant}/gatePolicy`."""
    return f"tenants/{tenant}/gatePolicy"


def gate_decision(tenant: str, decision_id: str) -> str:
    """`tenants/{tenant}/gateDecisions/{gate_decision}`."""
    return f"tenants/{tenant}/gateDecisions/{decision_id}"


def check_request_id(value: str, field: str = "request_id") -> str:
    """A request id of the caller: "" or a UUID (AIP-155), so that two callers never meet on one.

    Raises:
        MooringError: INVALID_FIELD.
    """
    if value and not _REQUEST_ID_RE.fullmatch(value):
        raise MooringError(
            Reason.INVALID_FIELD,
            f"{field} {value[:64]!r} is not a UUID.",
            remedy="Send a new UUID such as 2f1c0a9e-7b1d-4c6e-9a44-0d5a8f3b6c21, or leave it empty.",
            fields=[FieldViolation(field, "must be a UUID, or empty")],
        )
    return value


def check_parent(caller: str, value: str, field: str = "parent", *, anywhere: bool = False) -> str:
    """The caller's tenant when `value` is empty or names it.

    Args:
        caller: the calling tenant.
        value: the parent's name.
        field: what to call it in errors.
        anywhere: let any tenant be named; see `caller.anywhere`.

    Raises:
        MooringError: BAD_RESOURCE_NAME; NOT_ALLOWED for any other tenant, whether or not it exists.
    """
    if not value:
        return caller
    match = _match(_PARENT_RE, value, field, "tenants/{tenant}")
    if anywhere and match["tenant"] != OWN:
        return match["tenant"]
    if match["tenant"] not in {OWN, caller}:
        raise MooringError(
            Reason.NOT_ALLOWED,
            f"You may not act for {value}.",
            remedy=f"Use {parent(caller)}, or leave {field} empty.",
        )
    return caller


def check_gate_policy(caller: str, value: str, field: str) -> str:
    """The caller's tenant when `value` is empty or names its gate policy.

    Raises:
        MooringError: BAD_RESOURCE_NAME; NOT_ALLOWED for any other tenant, whether or not it exists.
    """
    if not value:
        return caller
    match = _match(_GATE_POLICY_RE, value, field, "tenants/{tenant}/gatePolicy")
    return check_parent(caller, parent(match["tenant"]), field)


def resolve_subject(caller: str, value: str, field: str = "name") -> Resolved:
    """Parse a subject's name. Raises BAD_RESOURCE_NAME."""
    match = _match(_SUBJECT_RE, value, field, "tenants/{tenant}/subjects/{subject}")
    return Resolved(_tenant(caller, match), match["id"])


def resolve_job(caller: str, value: str, field: str = "name", *, anywhere: bool = False) -> Resolved:
    """Parse a job's name; `anywhere` as in `check_parent`. Raises BAD_RESOURCE_NAME."""
    match = _match(_JOB_RE, value, field, "tenants/{tenant}/jobs/{job}")
    named = match["tenant"] if anywhere and match["tenant"] != OWN else _tenant(caller, match)
    return Resolved(named, match["id"])


def resolve_adapter(caller: str, value: str, field: str = "name") -> Resolved:
    """Parse an adapter's name, with its version, with an alias, or with neither. Raises BAD_RESOURCE_NAME."""
    match = _match(_ADAPTER_RE, value, field, "tenants/{tenant}/adapters/{adapter}@{version}")
    version = match["version"]
    return Resolved(
        _tenant(caller, match), match["id"], int(version) if version else None, match["alias"] or ""
    )


def check_id(value: str, field: str) -> str:
    """An id that a caller chose.

    Raises:
        MooringError: INVALID_FIELD.
    """
    if not _ID_RE.fullmatch(value):
        problem = "must be 1 to 63 lower-case letters, digits and hyphens, starting with a letter"
        raise MooringError(
            Reason.INVALID_FIELD,
            f"{field} {_clip(value)!r} {problem}.",
            remedy="For example “rex” or “red-mug-2”.",
            fields=[FieldViolation(field, problem)],
        )
    return value


def _tenant(caller: str, match: re.Match[str]) -> str:
    return caller if match["tenant"] in {OWN, caller} else NOBODY


def _match(pattern: re.Pattern[str], value: str, field: str, form: str) -> re.Match[str]:
    match = pattern.fullmatch(value)
    if match is None:
        raise MooringError(
            Reason.BAD_RESOURCE_NAME,
            f"{field} {_clip(value)!r} is not a resource name." if value else f"{field} is empty.",
            remedy=f"It has the form {form}; “tenants/-” stands for your own tenant.",
            fields=[FieldViolation(field, f"must match {form}")],
        )
    return match


def _clip(value: str) -> str:
    return value if len(value) <= 80 else value[:79] + "…"
