from itertools import islice

import numpy as np
import pytest
import torch

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.train.batch import Example
from hydraspec.train.packing import WINDOW, RowPlan, load_batch
from hydraspec.train.store import TokenStore
from tests.conftest import make_model
from tests.tiny_models import EXACT


def draw_lengths(count, most=512, mean=200):
    drawn = np.random.default_rng(0).gamma(2, mean / 2, count)
    return np.clip(drawn, 8, most).astype(np.int64)


@pytest.fixture
def store(tmp_path):
    generator = np.random.default_rng(3)
    examples = [
        Example(generator.integers(3, 96, n).tolist(), [place % 5 > 1 for place in range(n)])
        for n in (13, 9, 17, 24, 15, 30)
    ]
    return TokenStore.build(tmp_path / "tokens", examples, 96)


def test_a_plan_holds_every_conversation_once_an_epoch_and_fills_its_rows():
    lengths = draw_lengths(2 * WINDOW + 500)
    plan = RowPlan(lengths, 512, seed=1, epochs=2)
    rows = list(plan.rows())
    assert len(rows) == plan.num_rows
    assert sorted(number for row in rows for number in row) == sorted([*range(len(lengths))] * 2)
    assert max(int(lengths[list(row)].sum()) for row in rows) <= 512
    assert plan.num_tokens == 2 * lengths.sum()
    assert plan.fill > 0.97
    sizes = [len(row) for row in rows[:600]]
    assert abs(np.mean(sizes[:300]) - np.mean(sizes[300:])) < 0.3, "long and short ones are mixed all along"


def test_a_plan_depends_on_the_seed_and_differs_by_epoch():
    lengths = draw_lengths(300)
    rows = list(RowPlan(lengths, 512, seed=1, epochs=2).rows())
    assert rows == list(RowPlan(lengths, 512, seed=1, epochs=2).rows())
    assert rows != list(RowPlan(lengths, 512, seed=2, epochs=2).rows())
    half = RowPlan(lengths, 512, seed=1).num_rows
    assert rows[:half] != rows[half:]


@pytest.mark.parametrize("max_tokens", [0, 900_000])
def test_a_plan_is_taken_up_at_any_row(max_tokens):
    plan = RowPlan(draw_lengths(WINDOW + 300), 512, seed=4, epochs=2, max_tokens=max_tokens)
    rows = list(plan.rows())
    for start in (0, 1, 700, len(rows) // 2, len(rows) // 2 + 80, len(rows) - 1, len(rows), len(rows) + 5):
        assert list(islice(plan.rows(start), 40)) == rows[start : start + 40]


@pytest.mark.parametrize("max_tokens", [1000, 60_000, 500_000])
def test_a_plan_ends_with_the_row_that_reaches_the_tokens(max_tokens):
    lengths = draw_lengths(300)
    plan = RowPlan(lengths, 512, max_tokens=max_tokens)
    rows = list(plan.rows())
    before = sum(int(lengths[list(row)].sum()) for row in rows[:-1])
    assert before < max_tokens <= plan.num_tokens == before + int(lengths[list(rows[-1])].sum())
    assert len(rows) == plan.num_rows


def test_a_plan_of_nothing_has_no_rows():
    for max_tokens in (0, 100):
        plan = RowPlan(np.zeros(0, np.int64), 512, max_tokens=max_tokens)
        assert (plan.num_rows, list(plan.rows())) == (0, [])


def test_a_batch_holds_the_conversations_of_its_rows(store):
    batch = load_batch(store, [(2, 0), (5,)])
    assert batch.ids.shape == (2, 30)
    assert [(p.row, p.start, p.length, p.example) for p in batch.places] == [
        (0, 0, 17, 2),
        (0, 17, 13, 0),
        (1, 0, 30, 5),
    ]
    for place in batch.places:
        span = slice(place.start, place.start + place.length)
        assert batch.ids[place.row, span].tolist() == store[place.example].ids
        assert batch.mask[place.row, span].tolist() == store[place.example].mask
        assert batch.positions[place.row, span].tolist() == list(range(place.length))
    assert batch.segments[0].tolist() == [0] * 17 + [1] * 13
    wide = load_batch(store, [(2, 0), (5,)], row_length=40)
    assert wide.segments[:, 30:].eq(-1).all() and not wide.mask[:, 30:].any()
    nothing = load_batch(store, [])
    assert (nothing.num_tokens, nothing.segments.max(), len(nothing.find_anchors(0))) == (0, -1, 0)


# Each way of attending: plain, windows, soft-capped scores, learned positions, sinks, chunks, own attention code.
NAMES = ("Llama", "Mistral", "Gemma2", "GPT-2", "Qwen3", "GPT-OSS", "Llama4 text", "GPT-J", "Falcon, one key head")


@pytest.mark.parametrize("name", NAMES)
def test_conversations_in_one_row_do_not_see_each_other(store, name):
    model_type, options = EXACT[name]
    base = BaseModel(make_model(model_type, **options), name, self_check=False)

    def read(batch):
        return base.read_hidden_states(
            batch.ids, layout_packed(batch.segments, batch.positions, base.dtype, base.device)
        )

    batch = load_batch(store, [(0, 1, 2), (3, 4), (5,)], row_length=42)  # the last two rows end with padding
    hidden = read(batch)
    assert hidden.isfinite().all()
    for place in batch.places:
        alone = base.read_hidden_states(torch.tensor([store[place.example].ids]))[0]
        packed = hidden[place.row, place.start : place.start + place.length]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    batch.ids[0, 13:22] = batch.ids[0, 13:22].flip(0) % 90 + 4
    changed = (read(batch) != hidden).any(-1)
    assert changed[0, 13:22].all()
    changed[0, 13:22] = False
    assert not changed.any()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-J"])
def test_rows_of_one_conversation_need_no_mask_written_out(store, name):
    model_type, options = EXACT[name]
    base = BaseModel(make_model(model_type, **options), name, self_check=False)
    batch = load_batch(store, [(1,), (5,)])
    layout = layout_packed(batch.segments, batch.positions, base.dtype, base.device)
    assert layout.bias is None
    hidden = base.read_hidden_states(batch.ids, layout)
    for place in batch.places:
        alone = base.read_hidden_states(torch.tensor([store[place.example].ids]))[0]
        torch.testing.assert_close(hidden[place.row, : place.length], alone, rtol=1e-4, atol=1e-4)
