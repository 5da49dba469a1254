"""What the judges are trained on: captions that only the object tells apart, views of one object."""

from __future__ import annotations

import pytest
import torch
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.judges import SAME_SCENE, clip_samples, train_clip, train_dino
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.preset import SMALL
from mooring_server.dinghy.render import Renderer
from mooring_server.dinghy.world import World


def test_every_other_step_shares_scenes_in_groups(sprites):
    make = clip_samples(World(SMALL, 4, sprites), SAME_SCENE * 2 + 5)
    free, grouped = make(0), make(1)
    assert len({s.scene for s in free[:SAME_SCENE]}) > 5
    parts = [grouped[at : at + SAME_SCENE] for at in range(0, len(grouped), SAME_SCENE)]
    assert [len(p) for p in parts] == [SAME_SCENE, SAME_SCENE, 5]
    assert all(len({s.scene for s in part}) == 1 for part in parts)
    assert len({s.caption for s in grouped}) > SAME_SCENE
    assert make(1) == grouped


@pytest.mark.parametrize("train", [train_clip, train_dino])
def test_a_judge_goes_on_where_it_stopped(sprites, tmp_path, train):
    world, renderer, cpu = World(SMALL, 4, sprites), Renderer(sprites, SMALL.judge_px), choose("cpu")

    def run(folder, steps):
        plan = Plan(steps=steps, batch=8, warmup_steps=1, decay=1e-9)
        model, loop = train(tmp_path / folder, world, renderer, cpu, plan)
        assert loop.figures()["samples"] == 8 * steps
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run("whole", 2)
    run("parts", 1)
    assert torch.equal(run("parts", 2), whole)
