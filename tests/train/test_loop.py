import math

import pytest
import torch
from torch.nn import functional as F

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads import KINDS, new_heads
from hydraspec.train import loop
from hydraspec.train.data import Example, pad
from hydraspec.train.objectives import cross_entropy, teacher_cross_entropy
from tests.conftest import make_model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in (14, 9):
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        examples.append(Example(ids, [place % 7 > 1 for place in range(length)]))
    return pad(examples)


def test_objectives_are_their_formulas():
    logits, teacher = torch.randn(6, 9), torch.softmax(torch.randn(6, 9), -1)
    targets = torch.randint(0, 9, (6,))
    log_q = torch.log_softmax(logits, -1)
    torch.testing.assert_close(teacher_cross_entropy(logits, teacher), -(teacher * log_q).sum(-1).mean())
    torch.testing.assert_close(cross_entropy(logits, targets), -log_q[torch.arange(6), targets].mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("teacher_weight", "data_weight"), [(0.0, 1.0), (1.0, 0.0), (0.5, 2.0)])
def test_the_loss_equals_a_plain_computation(tiny_llama, batch, kind, teacher_weight, data_weight):
    torch.manual_seed(2)
    heads = new_heads(tiny_llama, kind, num_heads=3, num_layers=2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    got = loop.compute_loss(tiny_llama, heads, batch, teacher_weight, data_weight)
    out = tiny_llama.model(batch.ids, output_hidden_states=True, use_cache=False)
    contexts = heads.read_contexts(out.hidden_states[-1])
    expected = torch.zeros(())
    for head in range(3):
        losses = []
        for row in range(2):
            for t in range(batch.ids.shape[1] - head - 2):
                if batch.mask[row, t + 1] and batch.mask[row, t + 2 + head]:
                    path = tiny_llama.embed(batch.ids[row, t + 1 : t + 2 + head])
                    log_q = torch.log_softmax(heads.score(head, contexts[row, t], path, tiny_llama.project), -1)
                    p = torch.softmax(out.logits[row, t + 1 + head], -1)
                    own = -log_q[batch.ids[row, t + 2 + head]]
                    losses.append(data_weight * own - teacher_weight * (p * log_q).sum())
        expected = expected + torch.stack(losses).mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_a_short_text_and_the_base_stays_frozen(tiny_llama, batch, kind):
    before = tiny_llama.fingerprint()
    torch.manual_seed(0)
    heads = new_heads(tiny_llama, kind, num_heads=2)
    losses = []
    config = TrainingConfig(warmup_steps=2, learning_rate=1e-2, data_weight=1.0, teacher_weight=0.0, autocast="float32")
    done = loop.train(tiny_llama, heads, [batch] * 25, config, lambda p: losses.append(p.loss))
    assert done == 25
    assert losses[-1] < 0.5 * losses[0]
    assert tiny_llama.fingerprint() == before
    assert not any(p.requires_grad for p in tiny_llama.model.parameters())


def test_training_repeats_itself(tiny_llama, batch):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        heads = new_heads(tiny_llama, "hydra", num_heads=2, dropout=0.1)
        loop.train(tiny_llama, heads, [batch] * 3, TrainingConfig(warmup_steps=1))
        weights.append(torch.cat([p.detach().flatten() for p in heads.parameters()]))
    assert torch.equal(*weights)


def test_the_learning_rate_warms_up_and_falls_to_its_fraction():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.25)
    rates = [loop.learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert math.isclose(rates[60], 0.625)
    assert 0.25 <= rates[-1] < 0.251


def test_a_loss_that_is_no_number_ends_the_run(tiny_llama, batch):
    heads = new_heads(tiny_llama, "medusa")
    with torch.no_grad():
        heads.blocks[0].first.linear.bias.fill_(float("nan"))
    with pytest.raises(HydraspecError, match="the loss is nan at step 0"):
        loop.train(tiny_llama, heads, [batch], TrainingConfig())


def test_a_run_stops_when_asked(tiny_llama, batch):
    seen = []
    done = loop.train(
        tiny_llama, new_heads(tiny_llama, "medusa"), [batch] * 9, TrainingConfig(), seen.append, lambda: len(seen) == 4
    )
    assert done == 4 == len(seen)


def test_accuracy_counts_right_guesses(tiny_llama, batch):
    heads = new_heads(tiny_llama, "medusa", num_heads=2)
    examples = [Example(ids.tolist(), mask.tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    hidden = tiny_llama.read_hidden_states(batch.ids)
    right, total = 0, 0
    for row in range(2):
        for t in range(batch.ids.shape[1] - 2):
            if batch.mask[row, t + 1] and batch.mask[row, t + 2]:
                guess = heads.score(0, hidden[row, t], None, tiny_llama.project).argmax()
                right, total = right + int(guess == batch.ids[row, t + 2]), total + 1
    measured = loop.measure_accuracy(tiny_llama, heads, examples)
    assert math.isclose(measured[0].top1, right / total, abs_tol=1e-6)
    assert measured[0].top5 >= measured[0].top1


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_trains_float32_heads(batch, kind):
    base = BaseModel(make_model("llama").to(torch.bfloat16), "half")
    heads = new_heads(base, kind, num_heads=2, tied_vocabulary=True)
    examples = [Example(ids.tolist(), mask.tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    for autocast in ("float32", "bfloat16"):
        config = TrainingConfig(autocast=autocast, teacher_weight=1.0)
        assert loop.train(base, heads, [batch], config) == 1
    assert len(loop.measure_accuracy(base, heads, examples)) == 2
    assert {p.dtype for p in heads.parameters()} == {torch.float32}


def test_recipes_are_the_papers_unless_given():
    assert loop.resolve_recipe("hydra++", TrainingConfig()) == (4, 1.0, 0.0)
    assert loop.resolve_recipe("medusa", TrainingConfig()) == (1, 0.0, 1.0)
    assert loop.resolve_recipe("hydra", TrainingConfig(num_layers=3, teacher_weight=0.5)) == (3, 0.5, 1.0)


def test_softmax_of_the_teacher_is_the_bases(tiny_llama, batch):
    hidden = tiny_llama.read_hidden_states(batch.ids)
    teacher, index = loop._read_teacher(tiny_llama, hidden, batch)
    row, time = 1, 4
    assert batch.mask[row, time + 1]
    expected = F.softmax(tiny_llama.model(batch.ids, use_cache=False).logits[row, time], -1)
    torch.testing.assert_close(teacher[index[row, time]], expected, rtol=1e-4, atol=1e-5)
