"""The small VACE of the table: what it is shown, how it begins, that it learns, and what its file says."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from bench.quality import vace_model, vace_training
from bench.quality.cases import quality_case
from bench.quality.run import Plan, weights_of
from kvlock_fast.conditioning import Given
from kvlock_fast.models import wrap_pipeline


@pytest.fixture(scope="module")
def trainer():
    return vace_training.Trainer(seed=0)


def test_the_bank_shows_what_the_pipeline_shows(trainer):
    bank = vace_training.EditBank(trainer.pipe, vace_training.FIRST_SEED)
    bank.add(2)
    _, shown, _, captions = bank.batch(np.random.default_rng(0), 8, 5)
    model = wrap_pipeline(trainer.pipe)
    for seen, caption in zip(shown, captions, strict=True):
        number = next(i for i in range(2) if bank.items[i][4] == caption)
        case = quality_case(number, vace_training.FIRST_SEED).edit
        video, mask = torch.from_numpy(case.target.video), torch.from_numpy(case.mask)
        given = Given(video, mask, model.project(mask), 1.0)
        wanted = model.condition([caption], given)["shown"][0]
        assert seen.shape == wanted.shape and (seen - wanted).abs().max() < 5e-3


def test_it_begins_as_the_demo_model_and_learns(trainer):
    trainer.bank.add(2)
    rng = np.random.default_rng
    with torch.no_grad():
        before = trainer.loss(trainer.bank, rng(0), 4, 1).item()
        for block in trainer.transformer.vace_blocks:
            assert not block.proj_out.weight.any()
    for _ in range(6):
        trainer.step(0.1)
    with torch.no_grad():
        assert trainer.loss(trainer.bank, rng(0), 4, 1).item() < before
    frozen = {name for name, p in trainer.transformer.named_parameters() if not p.requires_grad}
    assert frozen and not any(name.startswith("vace_") for name in frozen)


def test_its_file_says_which_model_it_belongs_to(trainer, tmp_path, monkeypatch):
    from bench.demo_model.checkpoint import save_state

    path = tmp_path / "vace.safetensors"
    assert vace_model.belongs_to(path) is None
    save_state(trainer.state, tmp_path / "state")
    vace_training.export(tmp_path / "state", path)
    assert vace_model.belongs_to(path) == weights_of("demo")
    made = vace_model.trained_vace(vace_training.load_pipeline("demo").pipe, path)
    for name, value in vace_model.vace_parts(made.transformer).state_dict().items():
        assert torch.equal(value, trainer.state.average[name].half().float()), name
    monkeypatch.setattr("bench.quality.run.WEIGHTS", path)
    plan = Plan("demo", 2, 3.0, {}, ("demo", {}), tmp_path)
    assert plan.vace_weights is not None
    monkeypatch.setattr("bench.quality.run.weights_of", lambda model: "others")
    assert plan.vace_weights is None


def test_training_draws_no_held_out_edit():
    from kvlock_fast.demo.scene import HELD_OUT

    assert vace_training.FIRST_SEED + vace_training.BANK < HELD_OUT <= vace_training.HELD_OUT_SEED
