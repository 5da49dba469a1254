"""Resource names: parsed, made, and never a way to another tenant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import names

ids = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
tenants = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
versions = st.integers(1, 999_999_999)


@given(tenants, ids, versions)
def test_what_is_made_is_parsed_again(tenant, name, version):
    assert names.resolve_subject(tenant, names.subject(tenant, name)) == names.Resolved(tenant, name)
    assert names.resolve_job(tenant, names.job(tenant, name)) == names.Resolved(tenant, name)
    full = names.adapter(tenant, f"{name}@{version}")
    assert names.resolve_adapter(tenant, full) == names.Resolved(tenant, name, version)
    assert names.resolve_adapter(tenant, names.adapter("-", name)) == names.Resolved(tenant, name, None)
    assert (
        names.check_parent(tenant, names.parent(tenant)) == names.check_parent(tenant, "tenants/-") == tenant
    )
    assert names.check_parent(tenant, "") == tenant


@given(tenants, tenants, ids)
def test_another_tenants_names_resolve_to_nobody(caller, other, name):
    resolved = names.resolve_subject(caller, names.subject(other, name))
    assert resolved.tenant == (caller if caller == other else names.NOBODY)


@given(st.text(max_size=80))
def test_any_other_text_is_refused_whole(text):
    for resolve in (names.resolve_subject, names.resolve_job, names.resolve_adapter):
        with pytest.raises(MooringError) as caught:
            resolve("local", text)
        assert caught.value.reason is Reason.BAD_RESOURCE_NAME
        assert caught.value.fields[0].field == "name"


@pytest.mark.parametrize(
    "text",
    [
        "tenants/local/subjects/a\n",
        "tenants/local/subjects/a/..",
        "tenants//subjects/a",
        "/tenants/local/subjects/a",
        "tenants/local/subjects/A",
        "tenants/local/subjects/ä",
        "tenants/../subjects/a",
        "tenants/local/subjects/1a",
    ],
)
def test_near_misses_are_refused(text):
    with pytest.raises(MooringError):
        names.resolve_subject("local", text)


def test_acting_for_another_tenant_is_forbidden_whether_or_not_it_exists():
    with pytest.raises(MooringError) as caught:
        names.check_parent("local", "tenants/rival")
    assert caught.value.reason is Reason.NOT_ALLOWED
