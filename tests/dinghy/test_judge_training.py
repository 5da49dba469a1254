"""What the judges are trained on: captions that only the object tells apart, views of one object."""

from __future__ import annotations

import pytest
import torch
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.judges import (
    SAME_SCENE,
    clip_samples,
    dino_loop,
    load_dino,
    train_clip,
    train_dino,
)
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.preset import JUDGE_PX, SMALL
from mooring_server.dinghy.render import Renderer
from mooring_server.dinghy.world import World
from transformers import Dinov2Config, Dinov2Model


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
    world, renderer, cpu = World(SMALL, 4, sprites), Renderer(sprites, JUDGE_PX), choose("cpu")

    def run(folder, steps):
        plan = Plan(steps=steps, batch=8, warmup_steps=1, decay=1e-9)
        model, loop = train(tmp_path / folder, world, renderer, cpu, plan)
        assert loop.figures()["samples"] == 8 * steps
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run("whole", 2)
    run("parts", 1)
    assert torch.equal(run("parts", 2), whole)


def test_dino_goes_on_from_a_committed_judge_whatever_its_depth(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=3
    )
    Dinov2Model(config).save_pretrained(tmp_path / "judge")
    committed = load_dino(tmp_path / "judge").state_dict()
    model, loop = dino_loop(tmp_path / "run", choose("cpu"), Plan(steps=1, batch=2), tmp_path / "judge")
    for part in (model.student, model.teacher):
        assert part.state_dict().keys() == committed.keys()
        assert all(torch.equal(value, committed[name]) for name, value in part.state_dict().items())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, committed[name]) for name, value in model.teacher.state_dict().items())
    trained = {id(p) for p in loop.optimisers.parameters}
    assert not trained & {id(p) for p in model.teacher.parameters()}
