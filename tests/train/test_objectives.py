"""Each objective is its formula, and the piecewise losses with their closed gradients are the readable ones."""

import pytest
import torch

from hydraspec.train.objectives import (
    Mix,
    cross_entropy,
    draw_noise,
    forward_kl,
    mix_objectives,
    reconstruction,
    reverse_kl,
    teacher_cross_entropy,
    weigh_heads,
)
from hydraspec.train.vocabulary_loss import HeadRows, OutputLayer, Teacher, measure_vocabulary_losses

WIDTH, VOCABULARY, TARGETS = 16, 23, 50


def test_objectives_are_their_formulas():
    logits, teacher = torch.randn(6, 9), torch.softmax(torch.randn(6, 9), -1)
    targets = torch.tensor([0, 3, 8, 1, 1, 2])
    q = torch.softmax(logits, -1)
    expected = -q[torch.arange(6), targets].log().mean()
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    torch.testing.assert_close(teacher_cross_entropy(logits, teacher), -(teacher * q.log()).sum(-1).mean())
    torch.testing.assert_close(forward_kl(logits, teacher), (teacher * (teacher / q).log()).sum(-1).mean())
    torch.testing.assert_close(reverse_kl(logits, teacher), (q * (q / teacher).log()).sum(-1).mean())
    assert forward_kl(teacher.log(), teacher).abs() < 1e-6
    x, y = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    assert reconstruction(x, y) == (0.5 * 0.5**2 + 3.0 - 0.5) / 2


def test_targets_outside_the_draft_vocabulary_count_as_nothing():
    logits = torch.randn(2, 9)
    torch.testing.assert_close(
        cross_entropy(logits, torch.tensor([4, -1])), cross_entropy(logits[:1], torch.tensor([4])) / 2
    )


def test_noise_has_the_size_of_its_conversation():
    torch.manual_seed(0)
    noise = draw_noise(torch.zeros(1, 200, 64), torch.tensor([[25] * 100 + [400] * 100]), alpha=5.0)
    for part, length in ((noise[0, :100], 25), (noise[0, 100:], 400)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.98 * bound < part.abs().max() <= bound


def test_heads_are_weighed_by_list_and_decay():
    assert weigh_heads(3) == [1.0, 1.0, 1.0]
    assert weigh_heads(3, (1.0, 0.5, 2.0), decay=0.5) == [1.0, 0.25, 0.5]


@pytest.mark.parametrize("own_layers", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize(
    "mix", [Mix(data=1), Mix(teacher=1), Mix(kl=0.7), Mix(reverse_kl=1), Mix(1, 0.5, 0.3, 0.2)], ids=str
)
def test_pieces_add_up_to_the_readable_losses_and_gradients(mix, scale, softcap, own_layers):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared, hidden = OutputLayer(draw(VOCABULARY, WIDTH), None, scale, softcap), draw(TARGETS, WIDTH)
    teacher = torch.softmax(shared.project(hidden), -1)
    states, layers, rows, expected = [], [], [], []
    for head in range(3):
        count = TARGETS - 3 * head
        chosen = torch.randperm(TARGETS, generator=generator)[:count].sort().values
        targets = torch.randint(-1, VOCABULARY, (count,), generator=generator)
        states.append(draw(count, WIDTH).requires_grad_())
        own = OutputLayer(draw(VOCABULARY, WIDTH).requires_grad_(), draw(VOCABULARY).requires_grad_())
        layers.append(own if own_layers else shared)
        rows.append(HeadRows(targets, chosen, (head + 1) / count))
        logits = layers[-1].project(states[-1])
        expected.append((head + 1) * mix_objectives(logits, targets, teacher[chosen], mix))
    inputs = states + ([part for layer in layers for part in (layer.weight, layer.bias)] if own_layers else [])
    found = measure_vocabulary_losses(states, layers, rows, Teacher(hidden, shared), mix, piece=7)
    torch.testing.assert_close(found, torch.stack(expected))
    weights = torch.tensor([1.0, 2.0, 3.0])  # so that backward must scale each head's gradient by its own
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((torch.stack(expected) * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_without_rows_get_zero_gradients():
    layer = OutputLayer(torch.randn(VOCABULARY, WIDTH).requires_grad_(), torch.zeros(VOCABULARY).requires_grad_())
    states = torch.zeros(0, WIDTH, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    teacher = Teacher(torch.zeros(0, WIDTH), OutputLayer(torch.randn(VOCABULARY, WIDTH)))
    losses = measure_vocabulary_losses([states], [layer], [HeadRows(nothing, nothing, 1.0)], teacher, Mix(teacher=1))
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert not layer.weight.grad.any()
