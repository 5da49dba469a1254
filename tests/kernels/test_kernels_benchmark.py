"""The kernels' benchmark prints no speed unless ours agrees with the references."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import kernel_peers as peers
from benchmarks import kernels


def test_the_gate_lets_a_right_kernel_through():
    assert 0.0 < kernels.gate("cpu", [4]) <= 1.0


@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("multi_lora_", lambda output, *_, **__: output, "multi_lora at rank 4"),
        ("add_gradient_", "half", "gradient at rank 4"),
    ],
)
def test_a_wrong_kernel_prints_no_speed(name, broken, says, monkeypatch, capsys):
    if broken == "half":
        right = kernels.add_gradient_

        def broken(layout, flat, grad, lam):
            return right(layout, flat, grad, lam / 2)

    monkeypatch.setattr(kernels, name, broken)
    monkeypatch.setattr(sys, "argv", ["kernels", "--ranks", "4", "--quick"])
    with pytest.raises(SystemExit, match=says):
        kernels.main()
    assert capsys.readouterr().out == ""


def test_rows_come_as_json_and_the_gpu_is_not_claimed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--ranks", "2", "--quick", "--json", "--parts", "step"])
    kernels.main()
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert row["ours"] is None
    assert "not measured" in row["extra"]["how"]
    assert json.loads(err) == row


def test_peers_compute_the_same_penalty():
    layout = peers.SD15.layout(4, 10_000)
    flat = peers.random_factors(layout, "cpu")[0]
    exact = float(kernels.add_gradient_(layout, flat, torch.zeros_like(flat), 1.0).sigma2.sum())
    assert float(peers.matrix_norm_loop(layout, flat)()) == pytest.approx(exact, rel=1e-4)
    assert float(peers.gram_eigvalsh(layout, flat)()) == pytest.approx(exact, rel=1e-4)
    for batched in (True, False):
        step = peers.power_iteration(layout, flat, batched=batched)
        assert float(step()) < 0.999 * exact  # one step does not reach σ
        for _ in range(100):
            found = step()
        assert float(found) == pytest.approx(exact, rel=1e-3)


def test_layer_tables_are_the_networks():
    assert [sum(count for *_, count, _ in network.layers) for network in (peers.SD15, peers.SDXL)] == [
        128,
        560,
    ]
    assert peers.FLUX.layout(16).size == 266 * 16 * 2 * 3072


def test_times_are_medians_of_turns():
    calls = []
    found = kernels.raced(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", seconds=1e-6
    )
    assert set(found) == {"a", "b"}
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 5]
