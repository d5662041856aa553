import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hydraspec.accept.processing import LONG_ROW, LogitsProcessing, keep_nuclei, keep_nucleus
from hydraspec.config import SamplingConfig
from hydraspec.errors import RequestError
from hydraspec.types import LiveText, Request

SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 10_000_000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 1e-9},  # 1 - top_p rounds to 1: the most likely token stays
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.7, "min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"temperature": 0.9, "repetition_penalty": 0.7, "top_p": 0.9},
    {"presence_penalty": 0.8, "frequency_penalty": 0.25},
    {"temperature": 0.7, "frequency_penalty": -0.5, "min_p": 0.05},
    {"logit_bias": ((3, 5.0), (4, -100.0), (3, 1.0))},
    {"temperature": 1.2, "allowed_tokens": (0, 3, 7, 8, 20), "logit_bias": ((7, 2.0),), "top_k": 3},
    {"top_k": 4, "top_p": 0.3, "min_p": 0.3},  # greedy: the argmax stays, so nothing is left out
]


def make_text(setting, tokens=(5, 3, 3, 9, 5, 5), prompt=3, processors=()):
    sampling = SamplingConfig(**({"seed": 0} | setting))
    return LiveText(Request(tuple(tokens[:prompt]), 99, sampling=sampling, processors=processors), list(tokens))


def process_plainly(text, tokens, logits):
    """One row, with transformers' own classes: `tokens` of the text and the path, logits [V]."""
    config, ids, scores = text.request.sampling, torch.tensor([tokens]), logits[None].float().clone()
    if config.allowed_tokens:
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[list(config.allowed_tokens)] = True
        scores[0, ~allowed] = -torch.inf
    for token, bias in config.logit_bias:
        scores[0, token] += bias
    if config.repetition_penalty:
        scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, scores)
    output = tokens[len(text.request.prompt) :]
    for token in set(output):
        scores[0, token] -= config.presence_penalty
        scores[0, token] -= config.frequency_penalty * output.count(token)
    chain = LogitsProcessorList(text.request.processors)
    if config.temperature:
        chain.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            chain.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            chain.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            chain.append(MinPLogitsWarper(config.min_p))
    return chain(ids, scores)[0]


def apply(texts, logits, path=None):
    processing = LogitsProcessing(texts, logits.shape[-1], "cpu")
    processing.refresh()
    nowhere = torch.empty(len(texts), 1, 0, dtype=torch.long)
    return processing.apply(logits[:, None], nowhere if path is None else path)[:, 0]


@pytest.mark.parametrize("vocab_size", [40, LONG_ROW + 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_transformers(vocab_size, dtype):
    torch.manual_seed(0)
    texts = [make_text(setting) for setting in SETTINGS]
    logits = (torch.randn(len(texts), vocab_size) * 3).to(dtype)  # bfloat16 has many ties
    result = apply(texts, logits)
    for row, text in enumerate(texts):
        expected = process_plainly(text, text.tokens, logits[row])
        assert torch.equal(result[row].isinf(), expected.isinf()), SETTINGS[row]
        torch.testing.assert_close(result[row], expected, rtol=0, atol=1e-6)
        assert result[row].argmax() == expected.argmax()


@pytest.mark.parametrize("vocab_size", [40, LONG_ROW + 100])
def test_rows_do_not_depend_on_the_batch(vocab_size):
    torch.manual_seed(1)
    texts = [make_text(setting) for setting in SETTINGS]
    logits = torch.randn(len(texts), vocab_size) * 3
    logits[0, 0] = -0.0
    before = logits.clone()
    together = apply(texts, logits)
    assert torch.equal(logits, before)
    for row, text in enumerate(texts):
        assert torch.equal(together[row], apply([text], logits[row : row + 1])[0]), SETTINGS[row]
    for row in (0, 1, len(SETTINGS) - 1):  # no settings that change anything: the same bits
        assert torch.equal(together[row].view(torch.int32), before[row].view(torch.int32))


def test_paths_count_like_text():
    torch.manual_seed(2)
    setting = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    texts = [make_text(setting), make_text({}), make_text(setting, tokens=(1, 2, 3, 4), prompt=4)]
    logits = torch.randn(3, 3, 20)
    path = torch.tensor([[[9, 9], [4, -1], [-1, -1]]] * 3)
    processing = LogitsProcessing(texts, 20, "cpu")
    processing.refresh()
    result = processing.apply(logits, path)
    for row, text in enumerate(texts):
        for place, walked in enumerate(([9, 9], [4], [])):
            expected = process_plainly(text, text.tokens + walked, logits[row, place])
            torch.testing.assert_close(result[row, place], expected, rtol=0, atol=1e-6)


def test_counts_follow_the_growing_text():
    torch.manual_seed(3)
    texts = [make_text({"frequency_penalty": 0.7}), make_text({"repetition_penalty": 1.5})]
    processing = LogitsProcessing(texts, 20, "cpu")
    nowhere = torch.empty(2, 1, 0, dtype=torch.long)
    for gained in ([], [11, 11], [7], []):
        for text in texts:
            text.tokens.extend(gained)
        processing.refresh()
        logits = torch.randn(2, 1, 20)
        result = processing.apply(logits, nowhere)
        for row, text in enumerate(texts):
            torch.testing.assert_close(result[row, 0], process_plainly(text, text.tokens, logits[row, 0]))


def test_processors_see_each_context_once_and_come_before_the_warpers():
    seen = []

    def record(input_ids, scores):
        seen.append((input_ids.tolist(), tuple(scores.shape)))
        return scores

    ngrams = NoRepeatNGramLogitsProcessor(2)
    texts = [
        make_text({"temperature": 0.5, "top_k": 3}, processors=(ngrams, record)),
        make_text({"temperature": 0.5}),
        make_text({}, processors=(record,)),
    ]
    torch.manual_seed(4)
    logits, path = torch.randn(3, 1, 20), torch.tensor([[[7, 3]], [[7, 5]], [[7, 5]]])
    processing = LogitsProcessing(texts, 20, "cpu")
    processing.refresh()
    result = processing.apply(logits, path, walking=[True, True, False])
    assert seen == [([[*texts[0].tokens, 7, 3]], (1, 20))]
    expected = process_plainly(texts[0], [*texts[0].tokens, 7, 3], logits[0, 0])
    assert torch.equal(result[0, 0], expected)
    assert result[0, 0, [3, 9]].isinf().all()  # 3 was followed by 3 and by 9
    assert torch.equal(result[2], logits[2])


def test_the_nucleus_of_one_row_equals_the_sorted_oracle():
    torch.manual_seed(5)
    for scale in (0.0, 0.5, 2.0, 10.0):
        scores = (torch.randn(30, 500) * scale).to(torch.bfloat16).float()
        scores[:, torch.randperm(500)[:250]] = -torch.inf
        for top_p in (0.05, 0.5, 0.9, 0.999):
            expected = keep_nuclei(scores, torch.tensor(1 - top_p))
            for row in range(30):
                kept = keep_nucleus(scores[row], 1 - top_p)
                # Equally likely tokens at the edge may round to either side of it.
                assert abs(int(kept.isfinite().sum()) - int(expected[row].isfinite().sum())) <= (scale == 0)
                if scale:
                    assert torch.equal(kept, expected[row])


@pytest.mark.parametrize("setting", [{"logit_bias": ((20, 1.0),)}, {"allowed_tokens": (2, -1)}])
def test_token_ids_outside_the_vocabulary_are_refused(setting):
    with pytest.raises(RequestError, match="but the vocabulary has the ids 0 to 19"):
        LogitsProcessing([make_text(setting)], 20, "cpu")
