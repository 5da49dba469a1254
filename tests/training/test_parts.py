"""Data, optimiser and checkpoint format, each against something independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.training.checkpoint import Checkpoint
from mooring_server.training.config import TrainConfig
from mooring_server.training.data import batch_indices, square, variants
from mooring_server.training.optimiser import FlatAdam, clip_, schedule
from PIL import Image


def photo(width, height, colour=(200, 30, 60)):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    image.paste(Image.new("RGB", (width // 2, height // 2), colour), (width // 4, height // 4))
    return image


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["crop", "letterbox"]))
def test_any_photo_becomes_a_square(width, height, framing):
    assert square(photo(max(2, width), max(2, height)), 16, framing).size == (16, 16)


def test_crop_keeps_the_middle_and_letterbox_keeps_everything():
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 30, 30))  # a white end
    cropped = square(wide, 30, "crop")
    boxed = square(wide, 30, "letterbox")
    assert cropped.convert("L").getextrema()[1] < 10
    assert boxed.convert("L").getpixel((5, 15)) > 245
    margin = boxed.getpixel((15, 1))
    assert margin[0] > 20, "the margin takes the border's mean colour, not black"


def test_variants_start_with_the_photo_and_keep_its_colours():
    config = TrainConfig(views=6)
    rows = variants(photo(40, 40), 32, config, 0)
    assert rows.shape == (6, 3, 32, 32)
    plain = square(photo(40, 40), 32, "crop")
    assert torch.equal(
        ((rows[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).flatten(),
        torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8),
    )
    assert not torch.equal(rows[1], rows[0])
    assert rows.min() >= -1.0
    assert rows.max() <= 1.0
    spread = (rows.mean((2, 3)) - rows[0].mean((1, 2))).abs().max()
    assert spread < 0.15, "shifted and zoomed, never tinted"


def test_variants_depend_on_seed_and_place_only():
    one = variants(photo(40, 40), 16, TrainConfig(), 3)
    assert torch.equal(one, variants(photo(40, 40), 16, TrainConfig(), 3))
    assert not torch.equal(one[1], variants(photo(40, 40), 16, TrainConfig(), 4)[1])
    assert not torch.equal(one[1], variants(photo(40, 40), 16, TrainConfig(seed=1), 3)[1])


def test_flip_mirrors_every_second_view():
    half = Image.new("RGB", (32, 32), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    plain = variants(half, 32, TrainConfig(views=2), 0)[1]
    mirrored = variants(half, 32, TrainConfig(views=2, flip=True), 0)[1]
    assert plain[:, :, :8].mean() > 0.5 > -0.5 > mirrored[:, :, :8].mean()


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
def test_every_row_comes_once_per_pass(count, batch_size, seed):
    steps = count  # count · batch_size rows are batch_size whole passes
    drawn = [row for step in range(steps) for row in batch_indices(count, batch_size, seed, step)]
    assert len(drawn) == count * batch_size
    assert all(drawn.count(row) == batch_size for row in range(count))


def test_flat_adam_is_torchs():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    ours = FlatAdam.create(start.clone())
    theirs = start.clone().requires_grad_()
    optimiser = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for number in range(1, 30):
        gradient = torch.randn(50, generator=generator)
        theirs.grad = gradient.clone()
        optimiser.step()
        ours.step(gradient, 1e-2, number)
    torch.testing.assert_close(ours.parameter, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_zero_gradient_leaves_padding_exactly_zero():
    adam = FlatAdam.create(torch.zeros(8))
    for number in range(1, 5):
        adam.step(torch.zeros(8), 1.0, number)
    assert not adam.parameter.any()


def test_clip_scales_only_what_is_too_long():
    gradient = torch.tensor([3.0, 4.0])
    assert clip_(gradient, 10.0) == pytest.approx(5.0)
    assert gradient.tolist() == [3.0, 4.0]
    assert clip_(gradient, 1.0) == pytest.approx(5.0)
    assert float(gradient.norm()) == pytest.approx(1.0)


@given(st.integers(1, 2000))
def test_schedule_warms_up_and_decays(steps):
    factors = [schedule(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1.0)
    peak = factors.index(max(factors))
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_checkpoint_round_trip():
    saved = Checkpoint(
        7, "sha256:x", {"flat": torch.arange(5.0)}, {"averages": {"loss": 0.1}, "history": [1]}
    )
    again = Checkpoint.from_bytes(saved.to_bytes())
    assert (again.step, again.run_digest, again.scalars) == (7, "sha256:x", dict(saved.scalars))
    assert torch.equal(again.tensors["flat"], torch.arange(5.0))


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:-4], lambda b: b"\xff" * 64]
)
def test_damaged_checkpoints_are_refused_by_name(damage):
    data = Checkpoint(1, "sha256:x", {"flat": torch.zeros(4)}, {}).to_bytes()
    with pytest.raises(MooringError) as caught:
        Checkpoint.from_bytes(damage(data))
    assert caught.value.reason is Reason.CHECKPOINT_NOT_USABLE
