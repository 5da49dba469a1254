from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.safety.phrases import PACKAGED, PhraseCheck, plain_words
from mooring_server.safety.policy import SafetyPolicy, Verdict, refusal


def check_of(tmp_path: Path, text: str) -> PhraseCheck:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    return PhraseCheck.load(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a RED car", "cars"),
        ("a réd  càr, at night", "cars"),
        ("a r\u200bed car", "cars"),  # a zero-width space inside a word
        ("a ｒｅｄ car", "cars"),  # full-width letters
        ("a red-car", "cars"),
        ("a car that is red", ""),
        ("a red cart", ""),
        ("a cart", ""),
        ("snow falls on the old dog", "weather"),
        ("the dog sleeps in snow", "weather"),
        ("the dog sleeps", ""),
        ("", ""),
    ],
)
def test_phrases_are_found_in_every_spelling_of_the_same_words(
    tmp_path: Path, prompt: str, category: str
) -> None:
    check = check_of(tmp_path, "# mine\n\ncars: red car\nweather: snow + dog\n")
    verdict = check.judge(prompt)
    assert (verdict.category, verdict.allowed) == (category, not category)


@pytest.mark.parametrize("line", ["no category", "Upper: x", "cars:", "cars: +", "cars: red + ", "cars: ..."])
def test_a_line_that_is_no_rule_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(MooringError) as caught:
        check_of(tmp_path, f"cars: red car\n{line}\n")
    assert caught.value.reason is Reason.INVALID_FIELD
    assert "list.txt:2" in caught.value.message


def test_a_list_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(MooringError, match="cannot be read"):
        PhraseCheck.load(tmp_path / "missing.txt")


def test_the_packaged_list_is_read_and_leaves_ordinary_prompts_alone() -> None:
    check = PhraseCheck.load(PACKAGED)
    assert check.judge("a naked child").category == "minors"
    for prompt in ("a photo of a dog", "a child on the beach", "a nude by Titian", "children in the snow"):
        assert check.judge(prompt).allowed


@given(st.text(max_size=60))
def test_the_plain_form_is_stable_and_judging_never_fails(text: str) -> None:
    once = plain_words(text)
    assert plain_words(" ".join(once)) == once
    assert PhraseCheck([]).judge(text).allowed


class _Says:
    def __init__(self, *, allowed: bool) -> None:
        self.allowed, self.asked = allowed, 0

    def judge(self, _what: object) -> Verdict:
        self.asked += 1
        return Verdict("says", allowed=self.allowed, category="" if self.allowed else "bad")


def test_a_refused_prompt_is_an_error_that_names_field_and_category_only() -> None:
    policy = SafetyPolicy([_Says(allowed=True), _Says(allowed=False)])
    with pytest.raises(MooringError) as caught:
        policy.require_prompts("acme", [("prompt", "secret words")])
    error = caught.value
    assert (error.reason, error.metadata["category"]) == (Reason.PROMPT_REFUSED, "bad")
    assert [fault.field for fault in error.fields] == ["prompt"]
    assert "secret" not in str(error)


def test_exempt_tenants_are_not_checked() -> None:
    check = _Says(allowed=False)
    policy = SafetyPolicy([check], [check], exempt={"trusted"})
    assert policy.require_prompts("trusted", [("prompt", "x")]) == ()
    assert policy.judge_image("trusted", None) == ()  # type: ignore[arg-type]
    assert not policy.checks_images("trusted")
    assert policy.checks_images("acme")
    assert check.asked == 0


def test_the_first_refusal_of_an_image_counts() -> None:
    last = _Says(allowed=True)
    policy = SafetyPolicy([], [_Says(allowed=True), _Says(allowed=False), last])
    verdicts = policy.judge_image("acme", None)  # type: ignore[arg-type]
    assert [verdict.allowed for verdict in verdicts] == [True, False]
    assert refusal(verdicts) == verdicts[1]
    assert last.asked == 0
