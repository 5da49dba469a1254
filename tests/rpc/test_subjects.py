"""SubjectService on a real server."""

from __future__ import annotations

import uuid

import pytest
from mooring.v1 import subject_pb2 as pb
from rpc_calls import DEADLINE, failure_of, file_messages, make_subject, png, upload

OWNED = pb.RightsDeclaration(basis=pb.RightsDeclaration.BASIS_OWNED, statement="taken by us")
LONG_RIGHTS = pb.RightsDeclaration(basis=pb.RightsDeclaration.BASIS_OWNED, statement="x" * 1001)


def create(stubs, subject_id="bo", request_id="", parent="", **values):
    subject = pb.Subject(**{"class_noun": "dog", "rights": OWNED, **values})
    request = pb.CreateSubjectRequest(
        subject_id=subject_id, subject=subject, request_id=request_id, parent=parent
    )
    return stubs.subjects.CreateSubject(request, timeout=DEADLINE).subject


def get(stubs, name):
    return stubs.subjects.GetSubject(pb.GetSubjectRequest(name=name), timeout=DEADLINE).subject


def test_a_subject_is_created_with_defaults_and_found_again(stubs):
    made = create(stubs, "fido", parent="tenants/-")
    assert made.name == "tenants/local/subjects/fido"
    assert (made.display_name, made.class_noun, made.placeholder) == ("fido", "dog", "<fido>")
    assert made.rights == OWNED
    assert made.photo_count == 0
    assert made.create_time.seconds > 0
    assert get(stubs, made.name) == made
    assert get(stubs, "tenants/-/subjects/fido") == made


@pytest.mark.parametrize(
    ("subject_id", "values", "code", "reason"),
    [
        ("Fido", {}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("", {}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("a" * 64, {}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("../etc", {}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ok", {"class_noun": " "}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ok", {"class_noun": "x" * 65}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ok", {"placeholder": "two words"}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ok", {"placeholder": "x" * 33}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ok", {"rights": pb.RightsDeclaration()}, "INVALID_ARGUMENT", "RIGHTS_REQUIRED"),
        ("ok", {"rights": LONG_RIGHTS}, "INVALID_ARGUMENT", "INVALID_FIELD"),
    ],
)  # fmt: skip
def test_bad_subjects_are_refused_with_the_field(stubs, subject_id, values, code, reason):
    failure = failure_of(lambda: create(stubs, subject_id, **values))
    assert (failure.code.name, failure.reason) == (code, reason)
    assert len(failure.fields) == 1


def test_a_taken_id_is_said(stubs):
    create(stubs, "taken")
    failure = failure_of(lambda: create(stubs, "taken"))
    assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")


def test_a_repeated_request_returns_the_first_answer_and_another_one_is_refused(stubs):
    request_id = str(uuid.uuid4())
    first = create(stubs, "once", request_id=request_id)
    assert create(stubs, "once", request_id=request_id) == first
    failure = failure_of(lambda: create(stubs, "once", request_id=request_id, class_noun="cat"))
    assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


def test_pages_hold_everything_once_newest_first(stubs):
    made = [create(stubs, f"page-{i}").name for i in range(5)]
    listed, token = [], ""
    while True:
        page = stubs.subjects.ListSubjects(
            pb.ListSubjectsRequest(page_size=2, page_token=token), timeout=DEADLINE
        )
        assert len(page.subjects) <= 2
        listed += [subject.name for subject in page.subjects]
        token = page.next_page_token
        if not token:
            break
    assert len(listed) == len(set(listed))
    assert [name for name in listed if name in made] == made[::-1]


@pytest.mark.parametrize("token", ["x", "AAAA", "ü"])
def test_a_foreign_page_token_is_refused(stubs, token):
    failure = failure_of(lambda: stubs.subjects.ListSubjects(pb.ListSubjectsRequest(page_token=token)))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "BAD_PAGE_TOKEN")


def test_a_negative_page_size_is_refused(stubs):
    failure = failure_of(lambda: stubs.subjects.ListSubjects(pb.ListSubjectsRequest(page_size=-1)))
    assert list(failure.fields) == ["page_size"]


@pytest.mark.parametrize(
    "name", ["", "bo", "tenants/local/subjects/", "tenants/local/subjects/a/b", "tenants/local/jobs/a"]
)
def test_bad_names_are_said(stubs, name):
    failure = failure_of(lambda: get(stubs, name))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "BAD_RESOURCE_NAME")
    assert "tenants/{tenant}/subjects/{subject}" in failure.message


def test_other_tenants_look_absent_for_reads_and_forbidden_for_writes(stubs, runtime):
    rights = {"basis": "owned"}
    runtime.store.create_subject("rival", "secret", class_noun="dog", placeholder="<s>", rights=rights)
    told = {
        failure_of(lambda t=t: get(stubs, f"tenants/{t}/subjects/secret")).message
        for t in ("rival", "void", "local")
    }
    assert len(told) == 1
    for tenant in ("rival", "void"):
        failure = failure_of(lambda t=tenant: create(stubs, "mine", parent=f"tenants/{t}"))
        assert (failure.code.name, failure.reason) == ("PERMISSION_DENIED", "NOT_ALLOWED")
    failure = failure_of(
        lambda: stubs.subjects.DeleteSubject(pb.DeleteSubjectRequest(name="tenants/rival/subjects/secret"))
    )
    assert failure.reason == "SUBJECT_NOT_FOUND"
    assert runtime.store.get_subject("rival", "secret").subject_id == "secret"


def test_delete_removes_rows_and_objects(stubs, runtime):
    name = make_subject(stubs, "short-lived")
    keys = [photo.object_key for photo in runtime.store.photos("local", "short-lived")]
    assert all(runtime.objects.exists(key) for key in keys)
    stubs.subjects.DeleteSubject(pb.DeleteSubjectRequest(name=name), timeout=DEADLINE)
    assert not any(runtime.objects.exists(key) for key in keys)
    assert failure_of(lambda: get(stubs, name)).reason == "SUBJECT_NOT_FOUND"


# ---------------------------------------------------------------------------------------------- uploads


@pytest.fixture
def subject(stubs):
    return make_subject(stubs, f"s{uuid.uuid4().hex[:12]}", photos=0)


def send(stubs, *messages):
    return stubs.subjects.UploadPhotos(iter(messages), timeout=DEADLINE)


def to(name):
    return pb.UploadPhotosRequest(subject=name)


def test_photos_arrive_in_any_chunking_and_are_described(stubs, subject):
    a, b = png(1), png(2, (300, 200))
    answer = send(stubs, to(subject), *file_messages("a.png", a, chunk=100), *file_messages("b.png", b))
    assert [(p.filename, p.width, p.height, p.size_bytes) for p in answer.photos] == [
        ("a.png", 48, 40, len(a)),
        ("b.png", 300, 200, len(b)),
    ]
    assert answer.added_count == 2
    assert answer.subject.photo_count == 2
    assert get(stubs, subject).photos == answer.photos


def test_repeating_an_upload_changes_nothing(stubs, subject):
    files = {"a.png": png(1), "b.png": png(2)}
    first = upload(stubs, subject, files)
    again = upload(stubs, subject, files)
    assert again.added_count == 0
    assert again.photos == first.photos
    assert again.subject.photo_count == 2


def test_one_bad_file_keeps_all_out_and_every_bad_one_is_named(stubs, subject):
    good, bad = png(1), b"GIF89a" + b"\0" * 50
    failure = failure_of(
        lambda: send(
            stubs,
            to(subject),
            *file_messages("good.png", good),
            *file_messages("bad.gif", bad),
            *file_messages("half.png", png(2)[:-200]),
        )
    )
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "BAD_IMAGE")
    assert sorted(failure.fields) == ["files[1]", "files[2]"]
    assert "bad.gif" in failure.fields["files[1]"]
    assert "half.png" in failure.fields["files[2]"]
    assert get(stubs, subject).photo_count == 0


@pytest.mark.parametrize("header", [{"sha256": "0" * 64}, {"size_bytes": 10}, {"size_bytes": 10_000_000}])
def test_bytes_that_are_not_as_announced_are_refused(stubs, subject, header):
    failure = failure_of(lambda: send(stubs, to(subject), *file_messages("a.png", png(1), **header)))
    assert (failure.reason, list(failure.fields)) == ("DIGEST_MISMATCH", ["files[0]"])
    assert get(stubs, subject).photo_count == 0


def test_a_file_too_large_is_refused_beside_the_other_files_errors(stubs, subject):
    failure = failure_of(
        lambda: send(
            stubs,
            to(subject),
            *file_messages("big.png", png(1), size_bytes=21 * 2**20),
            *file_messages("bad.png", b"nonsense"),
        )
    )
    assert sorted(failure.fields) == ["files[0]", "files[1]"]
    assert "big.png" in failure.fields["files[0]"]


def test_streams_out_of_order_are_refused(stubs, subject):
    header, chunk = next(file_messages("a.png", png(1))), pb.UploadPhotosRequest(chunk=b"x")
    for messages in (
        [],
        [header],
        [chunk],
        [to(subject), chunk],
        [to(subject), to(subject)],
        [to(subject), pb.UploadPhotosRequest()],
        [to(subject)],
        [to(subject), header, pb.UploadPhotosRequest(chunk=b"")],
        [to(subject), header, pb.UploadPhotosRequest(chunk=b"x" * (2**20 + 1))],
        [to(subject), *file_messages("", png(1))],
        [to(subject), *file_messages("a.png", png(1), sha256="nothex")],
        [to(subject), *file_messages("a.png", png(1), size_bytes=0)],
    ):
        failure = failure_of(lambda m=messages: send(stubs, *m))
        assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD"), messages
        assert failure.fields
    assert get(stubs, subject).photo_count == 0


def test_uploading_to_a_missing_subject_is_said_before_the_files_are_read(stubs):
    failure = failure_of(
        lambda: send(stubs, to("tenants/local/subjects/nobody"), *file_messages("a.png", png(1)))
    )
    assert (failure.code.name, failure.reason) == ("NOT_FOUND", "SUBJECT_NOT_FOUND")


def test_a_path_in_a_filename_is_only_a_name(stubs, subject):
    answer = send(stubs, to(subject), *file_messages("../../etc/passwd.png", png(1)))
    assert answer.photos[0].filename == "passwd.png"


def test_more_than_a_hundred_photos_are_refused(stubs, subject):
    files = {f"{i}.png": png(i, (16, 16)) for i in range(101)}
    failure = failure_of(lambda: upload(stubs, subject, files))
    assert failure.reason == "TOO_MANY_PHOTOS"
    assert get(stubs, subject).photo_count == 0
