import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from hydraspec.base.model import BaseModel
from hydraspec.errors import TreeError
from hydraspec.heads import KINDS, cut_vocabulary, new_heads
from hydraspec.train.batch import Batch, Example, Place
from hydraspec.train.ranks import NOT_FOUND, OwnText, Ranks, find_ranks, make_batch, rank_targets
from hydraspec.train.validation import (
    HeadAccuracy,
    compare_acceptance,
    decode,
    find_prompts,
    measure_acceptance,
    measure_accuracy,
    predict_acceptance,
    tabulate,
    write_own_texts,
)
from hydraspec.tree import Tree, find_tree
from tests.conftest import Script, ScriptedHeads, make_model, random_prompts

NEW = 24
PROMPTS = random_prompts([5, 19, 11, 1, 8, 30])
TREES = [find_tree(name) for name in ("root", "chain-4", "small-16", "published-63")]
FORK = Tree([[0], [1], [0, 0], [1, 0], [1, 1], [1, 1, 0]], "fork")


@pytest.fixture(scope="module")
def texts(tiny_llama):
    return write_own_texts(tiny_llama, PROMPTS, NEW, batch=4)


@pytest.fixture(scope="module")
def trained(tiny_llama, texts):
    """Heads of every kind that know part of the texts."""
    return {kind: train(tiny_llama, new_heads(tiny_llama, kind), texts) for kind in KINDS}


def train(base, heads, texts, steps=12):
    """A few steps towards the first half of the texts; the heads stay in training mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = make_batch(texts[: len(texts) // 2])
    hidden, embeddings = base.read_hidden_states(batch.ids), base.embed(batch.ids).detach()
    anchors = [batch.find_anchors(head) for head in range(heads.num_heads)]
    of_entry = torch.full((base.vocab_size,), -100)
    named = heads.name_tokens(torch.arange(heads.config.draft_vocabulary or base.vocab_size))
    of_entry[named] = torch.arange(len(named))
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3)
    for _ in range(steps):
        states, loss = heads.draft_states(hidden, embeddings, anchors), 0.0
        for head, state in enumerate(states):
            logits = F.linear(state, *heads.vocabulary_weight(head, base))
            loss = loss + F.cross_entropy(logits, of_entry[batch.ids.flatten()[anchors[head] + 2 + head]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads


def check_exact(base, heads, texts, limit=NEW, batch=16):
    found = compare_acceptance(base, heads, texts, TREES, limit, batch, torch.float32)
    for comparison in found:
        assert comparison.same_texts == comparison.texts == len(texts)
        assert comparison.predicted.acceptance_length == comparison.real
        assert comparison.predicted.steps == comparison.steps
        assert comparison.error == 0
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_is_what_decoding_reaches(tiny_llama, texts, trained, kind):
    found = check_exact(tiny_llama, trained[kind], texts)
    assert found[0].real == 1.0
    assert found[-1].real > 1.3


@pytest.mark.parametrize("tied", [False, True])
def test_of_heads_with_a_cut_vocabulary_too(tiny_llama, texts, tied):
    counts = torch.bincount(torch.tensor([token for text in texts for token in text.tokens]), minlength=96)
    whole = new_heads(tiny_llama, "hydra", tied_vocabulary=tied)
    heads = train(tiny_llama, cut_vocabulary(whole, counts, 20), texts)
    assert check_exact(tiny_llama, heads, texts)[-1].real > 1.2
    known = set(heads.token_ids.tolist())
    ranks = find_ranks(tiny_llama, heads, texts, dtype=torch.float32).ranks
    row = 0
    for text in texts:
        for place, token in enumerate(text.tokens[1:]):
            assert (ranks[row + place, 0] == NOT_FOUND) == (token not in known)
        row += len(text.tokens)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_limit_cuts_inside_an_accepted_block(tiny_llama, trained, limit, batch):
    own = write_own_texts(tiny_llama, PROMPTS, limit)
    assert {len(text.tokens) for text in own} == {limit}
    check_exact(tiny_llama, trained["hydra"], own, limit, batch)


def test_the_end_of_text_cuts_inside_an_accepted_block(texts, trained):
    end = texts[0].tokens[7]
    base = BaseModel(make_model("llama", eos_token_id=end), "tiny-llama")
    own = write_own_texts(base, PROMPTS, NEW)
    assert own[0].tokens == texts[0].tokens[: texts[0].tokens.index(end) + 1]
    check_exact(base, trained["hydra"], own)


@pytest.mark.parametrize("tree", [*TREES, FORK], ids=lambda tree: tree.name)
@pytest.mark.parametrize("limit", [*range(1, 8), NEW])
def test_known_ranks_walk_as_decoding_does(tiny_llama, texts, tree, limit):
    def rank(position):
        return (0, 1, 0, 11, 2, 1)[position % 6]

    scripted = ScriptedHeads(tiny_llama, Script([[*text.prompt, *text.tokens] for text in texts], rank))
    decoded = decode(tiny_llama, scripted, PROMPTS, tree, limit)
    lengths, rows = tuple(min(limit, len(text.tokens)) for text in texts), []
    for text, length in zip(texts, lengths, strict=True):
        for root in range(length):
            places = range(root + 1, root + 5)
            rows.append([rank(len(text.prompt) + place) if place < length else NOT_FOUND for place in places])
    walk = Ranks(torch.tensor(rows), lengths, (12,) * 4).walk(tree)
    assert (walk.steps, walk.tokens) == (decoded.steps, decoded.tokens)
    assert walk.acceptance_length == decoded.acceptance_length


def test_a_walk_by_hand():
    x = NOT_FOUND
    ranks = Ranks(
        torch.tensor(
            [
                *([1, 1, 0], [0, 1, 0], [0, 0, x], [2, x, x], [x, x, x]),  # from 0: (1, 1, 0), to 4: the end
                *([0, 1, x], [x, x, x], [0, x, x], [x, x, x]),  # from 0: (0), to 2: (0), to 4: beyond
                *([x, x, x],),  # a text of one token takes no step
            ]
        ),
        (5, 4, 1),
        (3, 2, 1),
    )
    assert ranks.find_accepted(FORK).tolist() == [3, 1, 2, 0, 0, 1, 0, 1, 0, 0]
    walk = ranks.walk(FORK)
    assert (walk.steps, walk.tokens, walk.acceptance_length) == (3, 7, 7 / 3)
    assert walk.rates == pytest.approx((1, 1 / 2, 1 / 2))  # three steps have a token left; two have two, and three
    assert walk.everywhere == pytest.approx(1 + 5 / 7 + 2 / 5 + 1 / 3)


def test_ranks_do_not_depend_on_how_texts_are_batched(tiny_llama, trained):
    own = [OwnText(tuple(prompt), tuple(random_prompts([3 * n + 1])[0])) for n, prompt in enumerate(PROMPTS)]
    together = find_ranks(tiny_llama, trained["hydra++"], own, dtype=torch.float32)
    apart = find_ranks(tiny_llama, trained["hydra++"], own, batch_tokens=1, dtype=torch.float32)
    assert torch.equal(together.ranks, apart.ranks)
    assert together.lengths == tuple(len(text.tokens) for text in own)


def test_a_rank_is_the_place_among_the_most_likely_tokens(tiny_llama, trained):
    heads, states = trained["medusa"], torch.randn(7, 64)
    targets = torch.randint(0, 96, (7,))
    with torch.no_grad():
        order = heads.vocabulary[1](states).argsort(-1, descending=True)
        found = rank_targets(tiny_llama, heads, 1, states, targets, 50, piece=3)
    expected = (order == targets[:, None]).long().argmax(1)
    assert found.tolist() == torch.where(expected < 50, expected, NOT_FOUND).tolist()


def test_trees_that_the_ranks_do_not_reach_are_refused(tiny_llama, texts, trained):
    ranks = Ranks(torch.zeros(2, 2, dtype=torch.long), (2,), (3, 1))
    with pytest.raises(TreeError, match="4 deep, but the heads guess 2"):
        ranks.walk(find_tree("chain-4"))
    with pytest.raises(TreeError, match="asks for 2 tokens of head 1, but only 1"):
        ranks.walk(Tree([[0], [0, 0], [0, 1]]))
    with pytest.raises(TreeError, match="5 deep, but the heads guess 4"):
        predict_acceptance(tiny_llama, trained["medusa"], texts, find_tree("chain-5"))


def pack(texts):
    """All texts in one row, but the last in one of its own."""
    rows = [texts[:-1], texts[-1:]]
    width = max(sum(len(t.prompt) + len(t.tokens) for t in row) for row in rows)
    ids, positions = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    mask, segments = torch.zeros(2, width, dtype=torch.bool), torch.full((2, width), -1)
    places = []
    for number, row in enumerate(rows):
        start = 0
        for segment, text in enumerate(row):
            single = make_batch([text])
            span = slice(start, start := start + single.ids.shape[1])
            ids[number, span], mask[number, span] = single.ids[0], single.mask[0]
            segments[number, span], positions[number, span] = segment, single.positions[0]
            places.append(Place(number, span.start, single.ids.shape[1], len(places)))
    return Batch(ids, mask, segments, positions, tuple(places))


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_that_of_the_plain_computation(tiny_llama, texts, trained, kind):
    # Not the base model's own choices: the data's tokens must not be what counts.
    given = [OwnText(text.prompt, tuple(random_prompts([len(text.tokens) - n])[0])) for n, text in enumerate(texts)]
    heads = trained[kind].eval()
    accuracy = measure_accuracy(tiny_llama, heads, [pack(given), make_batch(given[:2])], (1, 4, 200), torch.float32)
    for head in range(4):
        hits, places = {1: 0, 4: 0}, 0
        for text in [*given, *given[:2]]:
            batch = make_batch([text])
            hidden = tiny_llama.read_hidden_states(batch.ids)
            choice = tiny_llama.project(hidden)[0].argmax(-1)
            anchors = torch.arange(len(text.prompt) - 1, batch.ids.shape[1] - 2 - head)
            with torch.no_grad():
                parts = [batch.find_anchors(other) for other in range(4)]
                assert parts[head].tolist() == anchors.tolist()
                state = heads.draft_states(hidden, tiny_llama.embed(batch.ids), parts)[head]
                order = F.linear(state, *heads.vocabulary_weight(head, tiny_llama)).argsort(-1, descending=True)
            places += len(anchors)
            for count in hits:
                hits[count] += int((order[:, :count] == choice[anchors + 1 + head][:, None]).sum())
        assert accuracy[head].places == places
        assert accuracy[head].top[1] == pytest.approx(hits[1] / places)
        assert accuracy[head].top[4] == pytest.approx(hits[4] / places)
        assert accuracy[head].top[200] == 1.0


def test_without_anchors_there_is_nothing_to_be_right_about(tiny_llama, trained):
    batch = make_batch([OwnText((3, 4), (5,))])
    assert measure_accuracy(tiny_llama, trained["hydra"], [batch], (1,)) == [HeadAccuracy({1: 0.0}, 0)] * 4


def test_measuring_leaves_the_heads_as_they_were(tiny_llama, texts, trained):
    heads = trained["hydra++"].train()
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    measure_acceptance(tiny_llama, heads, PROMPTS, TREES[1], 4)
    measure_accuracy(tiny_llama, heads, [make_batch(texts)])
    predict_acceptance(tiny_llama, heads, texts, TREES[1])
    after = heads.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert heads.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in heads.parameters())
    assert heads.draft_states(torch.randn(1, 6, 64), torch.randn(1, 6, 64), [torch.tensor([1])] * 4)[0].requires_grad


def test_prepared_heads_are_measured_as_well(tiny_llama, texts):
    heads = train(
        tiny_llama, cut_vocabulary(new_heads(tiny_llama, "hydra", tied_vocabulary=True), torch.ones(96), 40), texts
    )
    before = predict_acceptance(tiny_llama, heads, texts, TREES[2], torch.float32)
    assert predict_acceptance(tiny_llama, heads.prepare(tiny_llama), texts, TREES[2], torch.float32) == before


def test_the_models_own_repetition_penalty_is_part_of_its_texts(texts, trained):
    model = make_model("llama")
    model.generation_config.repetition_penalty = 1.5
    base = BaseModel(model, "tiny-llama")
    own = write_own_texts(base, PROMPTS, NEW)
    assert own != texts
    check_exact(base, trained["hydra"], own)


def test_prompts_end_where_the_assistant_begins():
    turns = Example(list(range(8)), [False, False, True, True, False, True, False, True])
    asked = Example([1, 2], [False, False])
    found = [len(prompt) for prompt in find_prompts([turns, asked, turns, turns, turns, turns], 8)]
    assert found == [2, 5, 7, 7, 2]
    assert [len(prompt) for prompt in find_prompts([turns] * 4, 5)] == [2, 5]


def test_the_tables_show_what_was_measured(tiny_llama, texts, trained):
    comparison = compare_acceptance(tiny_llama, trained["hydra"], texts, [FORK], NEW)[0]
    table = tabulate([HeadAccuracy({1: 0.5, 10: 0.75}, 8)], [comparison])
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    shown = captured.get()
    for part in ("top 10", "50.0%", "75.0%", "fork", f"{comparison.real:.2f}", f"{comparison.error:+.1%}"):
        assert part in shown
    assert tabulate([], []).row_count == 0
