from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.arms import arms_of
from mooring_server.evaluation.evaluate import EvaluationCache, evaluate
from mooring_server.evaluation.report import grid, render
from mooring_server.evaluation.result import SUBJECT
from PIL import Image
from running_ticks import finish


@pytest.fixture(scope="module")
def results(base, bank, judges, adapter, photos, config):
    cache = EvaluationCache()
    weak = dataclasses.replace(config, adapter_scale=0.3)
    free = dataclasses.replace(config, budget=None)
    return [
        (label, finish(evaluate(base, bank, judges, adapter, photos, settings, cache=cache))[0])
        for label, settings in (("none", free), ("moored", weak))
    ]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.scripts = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in {"src", "href"}]
        self.scripts += tag == "script"
        if tag not in {"meta", "img", "br", "line", "rect", "circle", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass  # closed in itself

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(results, photos):
    page = Page(render(results, photos=photos, title="A & <b>"))
    assert page.open == []
    assert page.scripts == 0
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    text = render(results, photos=photos, title="A & <b>")
    assert "http" not in text
    assert "url(" not in text


def test_what_callers_wrote_is_escaped(results):
    text = render(results, title="<script>alert(1)</script>")
    assert "<script>" not in text
    assert "a photo of a &lt;duck&gt; duck on the beach" in text


def test_the_page_holds_every_arm_figure_and_picture(results):
    text = render(results)
    for label in ("base", "none", "moored"):
        assert f">{label}</th>" in text
    for _, result in results:
        assert f"{result.metrics['dino']:.3f}" in text
        assert f"{result.drift.value:.3f}" in text
        assert result.certificate.adapter_digest in text
        assert result.certificate.layers[0].name in text
    first = results[0][1]
    assert text.count("<img") == 3 * len(first.pairs)
    assert "trained without a budget" in text
    assert "of budget 0.1" in text


def test_one_evaluation_and_the_base_alone_render_too(results, base, bank, judges, photos, config):
    alone, _ = finish(evaluate(base, bank, judges, None, photos, config))
    text = render([("untouched", alone)])
    assert "Drift against budget" not in text
    assert text.count("<img") == len(alone.pairs)
    both = arms_of([results[1], ("untouched", alone)])
    assert [arm.label for arm in both] == ["untouched", "moored"]
    assert "moored" in render(results[1:])


def test_evaluations_that_do_not_compare_are_refused(results):
    label, result = results[1]
    for change in (
        {"base_digest": "sha256:other"},
        {"judges_digest": "sha256:other"},
        {"pairs": result.pairs[1:]},
    ):
        with pytest.raises(MooringError) as caught:
            render([results[0], (label, dataclasses.replace(result, **change))])
        assert caught.value.reason is Reason.INVALID_FIELD
    with pytest.raises(MooringError):
        grid([])


def test_the_grid_shows_the_arms_pictures_in_their_places(results):
    cell = 64
    picture = np.asarray(grid(results, cell=cell))
    first = results[0][1]
    subject = first.of_kind(SUBJECT)
    by_prompt = {pair.prompt: pair for pair in reversed(subject)}  # the first seed of each prompt
    for index, pair in enumerate(by_prompt.values()):
        shown = np.asarray(Image.fromarray(pair.base).resize((cell, cell), Image.Resampling.NEAREST))
        assert _find(picture, shown) is not None, f"the base's picture {index} is missing"
        mine = np.asarray(Image.fromarray(pair.adapted).resize((cell, cell), Image.Resampling.NEAREST))
        above, below = _find(picture, shown), _find(picture, mine)
        assert above[1] == below[1], "one column"
        assert above[0] < below[0], "the base first"


def test_the_grid_is_deterministic_and_widens_with_photos(results, photos):
    assert grid(results).tobytes() == grid(results).tobytes()
    assert grid(results, photos=photos).height > grid(results).height
    assert grid(results, subject_prompts=1, generic_prompts=1).width < grid(results).width


def _find(picture, patch):
    height, width = patch.shape[:2]
    for y, x in zip(*np.where((picture == patch[0, 0]).all(-1)), strict=True):
        window = picture[y : y + height, x : x + width]
        if window.shape == patch.shape and np.array_equal(window, patch):
            return int(y), int(x)
    return None
