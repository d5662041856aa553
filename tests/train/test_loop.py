"""The loop: losses as written out, learning, repetition, resumption after a kill, two processes."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads import KINDS
from hydraspec.heads.residual import ResidualHeads
from hydraspec.train import checkpoint, prepare, run
from hydraspec.train.forward import Anchored, TeacherForcedLoss
from hydraspec.train.loop import learning_rate
from hydraspec.train.progress import Saver, follow
from tests.conftest import make_model
from tests.train.conftest import prepare_small

RESIDUAL = [kind for kind, made in KINDS.items() if issubclass(made, ResidualHeads)]


def disturb(heads: torch.nn.Module) -> None:
    """Untrained blocks are identities: move them, so that a wrong input shows."""
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("kind", RESIDUAL)
@pytest.mark.parametrize(("teacher_weight", "data_weight"), [(0.0, 1.0), (0.5, 2.0)])
def test_the_loss_equals_a_plain_computation(small_base, tmp_path, kind, teacher_weight, data_weight):
    prepared = prepare_small(
        tmp_path,
        small_base,
        recipe=kind,
        teacher_weight=teacher_weight,
        data_weight=data_weight,
        reconstruction_weight=0.3,
        head_decay=0.5,
    )
    base, heads = prepared.base, prepared.heads
    disturb(heads)
    trainer = prepare.make_trainer(prepared)
    batch = trainer.data.load(list(trainer.data.rows(0))[:3])
    hidden = trainer.data.hidden.read(batch)
    anchored = Anchored.of(batch, 2, base.device)
    found = TeacherForcedLoss(base, heads, prepared.run.config)(anchored, hidden, anchored.count())
    hidden = hidden.float()
    contexts = heads.read_contexts(hidden, layout_packed(batch.segments, batch.positions, torch.float32, base.device))
    expected = []
    for head in range(2):
        losses = []
        for row, t in ((n // batch.ids.shape[1], n % batch.ids.shape[1]) for n in batch.find_anchors(head).tolist()):
            path = base.embed(batch.ids[row, t + 1 : t + 2 + head])
            parts = [contexts[row, t], *path] if heads.grounded else [contexts[row, t]]
            state = heads.blocks[head](torch.cat(parts))
            weight, bias = heads.vocabulary_weight(head, base)
            log_q = torch.log_softmax(torch.nn.functional.linear(state, weight, bias), -1)
            p = torch.softmax(base.project(hidden[row, t + 1 + head]), -1)
            true = torch.nn.functional.smooth_l1_loss(state, hidden[row, t + 1 + head])
            own = log_q[batch.ids[row, t + 2 + head]]
            losses.append(-data_weight * own - teacher_weight * (p * log_q).sum() + 0.3 * true)
        expected.append(0.5**head * torch.stack(losses).mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_vocabulary", [0, 40])
def test_heads_learn_and_the_base_stays_frozen(small_base, tmp_path, kind, draft_vocabulary):
    before = small_base.fingerprint()
    options = {"epochs": 6, "noise": 1.0, "dropout": 0.05, "draft_vocabulary": draft_vocabulary, "num_layers": 1}
    prepared = prepare_small(tmp_path, small_base, recipe=kind, tied_vocabulary=None, **options)
    losses = []
    trainer = prepare.make_trainer(prepared)
    trainer.run(lambda progress: losses.append(progress.loss))
    assert len(losses) == trainer.steps
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert small_base.fingerprint() == before
    assert not any(p.requires_grad for p in small_base.model.parameters())


def test_a_step_does_not_depend_on_how_it_is_cut_into_forward_passes(small_base, tmp_path):
    gradients = []
    for micro_tokens in (32, 64, 128):
        prepared = prepare_small(tmp_path, small_base, micro_tokens=micro_tokens, teacher_weight=1.0)
        trainer = prepare.make_trainer(prepared)
        trainer.find_gradients(list(trainer.data.rows(0))[:4])
        gradients.append(torch.cat([p.grad.flatten() for p in prepared.heads.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_its_fraction():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.25)
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert math.isclose(rates[60], 0.625)
    assert 0.25 <= rates[-1] < 0.251


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_weights(small_base, tmp_path):
    prepared = prepare_small(tmp_path, small_base)
    with torch.no_grad():
        prepared.heads.blocks[0].first.linear.bias.fill_(float("nan"))
    before = prepared.heads.blocks[1].first.linear.weight.clone()
    with pytest.raises(HydraspecError, match="the loss is nan at step 0: check the data"):
        prepare.make_trainer(prepared).run()
    assert torch.equal(prepared.heads.blocks[1].first.linear.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_trains_float32_heads(tmp_path, kind):
    base = BaseModel(make_model("llama").to(torch.bfloat16), "half")
    for autocast in ("float32", "bfloat16"):
        prepared = prepare_small(tmp_path, base, recipe=kind, autocast=autocast, num_layers=1, teacher_weight=1.0)
        trainer = prepare.make_trainer(prepared)
        trainer._advance(list(trainer.data.rows(0))[:4])
        assert {p.dtype for p in prepared.heads.parameters()} == {torch.float32}


# -- resumption --------------------------------------------------------------------------------------------------------


def train_all(out: Path, resume: bool = False, die_at: int | None = None, die_in_save: int | None = None) -> None:
    """A run with a checkpoint at every second step; it may kill itself after a step, or while it saves."""
    prepared = prepare_small(out, resume=resume, dropout=0.2, noise=2.0, ema=0.9, checkpoint_steps=2)
    trainer = prepare.make_trainer(prepared)
    run.resume(prepared, trainer)
    if die_in_save is not None:

        def save_half(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        before = checkpoint.write_json
        checkpoint.write_json = lambda *words: save_half() if trainer.step == die_in_save else before(*words)
    saver = Saver(prepared.run.config, lambda: run.save_state(prepared, trainer))
    advance = trainer._advance

    def advance_or_die(rows):  # type: ignore[no-untyped-def]
        if trainer.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(rows)

    trainer._advance = advance_or_die  # type: ignore[method-assign]
    follow(prepared.console, trainer, saver, [], prepared.accelerator)
    run.finish(prepared, trainer, done=True)


def in_a_child(function, *words: object, **options: object) -> int:  # type: ignore[no-untyped-def]
    """Run a function in a forked process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            function(*words, **options)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole") / "heads"
    assert in_a_child(train_all, out) == 0
    assert not (out / "training").exists()
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("death", [{"die_at": 5}, {"die_at": 8}, {"die_at": 15}, {"die_in_save": 6}], ids=str)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(uninterrupted, tmp_path, death):
    out = tmp_path / "heads"
    assert in_a_child(train_all, out, **death) == -signal.SIGKILL
    assert in_a_child(train_all, out, resume=True) == 0
    found = load_file(out / "model.safetensors")
    assert found.keys() == uninterrupted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in uninterrupted.items())


def test_another_run_cannot_be_resumed(tmp_path, small_base):
    prepared = prepare_small(tmp_path, small_base)
    trainer = prepare.make_trainer(prepared)
    run.save_state(prepared, trainer)
    other = prepare_small(tmp_path, small_base, resume=True, head_decay=0.5)
    with pytest.raises(HydraspecError, match=r"begun with head_decay 1.0, not 0.5"):
        run.resume(other, prepare.make_trainer(other))
    strange = BaseModel(make_model("llama", intermediate_size=64), "other")
    other = prepare_small(tmp_path, strange, resume=True)
    with pytest.raises(HydraspecError, match="begun with other base model"):
        run.resume(other, prepare.make_trainer(other))


def test_an_ended_run_saves_heads_and_a_checkpoint(tmp_path, small_base):
    prepared = prepare_small(tmp_path, small_base)
    trainer = prepare.make_trainer(prepared)
    stop: list[int] = []
    saver = Saver(prepared.run.config, lambda: run.save_state(prepared, trainer))
    trainer.run(lambda progress: stop.append(1) if progress.step == 3 else None, lambda: bool(stop))
    assert trainer.step == 3 < trainer.steps
    saver.save_now()
    run.finish(prepared, trainer, done=False)
    assert (tmp_path / "config.json").is_file()
    assert checkpoint.load_checkpoint(tmp_path / "training").step == 3


def test_two_processes_train_as_one_does(tmp_path):
    """Each of them, sharded or not, and resumed from its third step as well."""
    script, weights = Path(__file__).with_name("two_processes.py"), []
    for words in (["1", "one"], ["2", "two"], ["2", "sharded"]):
        out = tmp_path / words[1]
        done = subprocess.run(
            [sys.executable, str(script), words[0], str(out), words[1]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        weights.append(load_file(out / "weights.safetensors"))
    for name, tensor in weights[0].items():  # sums of another order, which AdamW makes larger: 0.5% of a step
        for other in weights[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=5e-5)


def test_a_config_knows_what_may_change():
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert {*run._MAY_CHANGE, *run._MAY_BE_LOWERED} <= names
