import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hydraspec.errors import DataError
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.conversations import Conversation
from hydraspec.train.encoding import encode_all, encode_conversation
from hydraspec.train.preview import preview_examples

TALK = [
    {"role": "user", "content": "A coffee, please."},
    {"role": "assistant", "content": "Which size?"},
    {"role": "user", "content": "Large."},
    {"role": "assistant", "content": "It is ready."},
]
# Thoughts stand in the last turn only, as in Qwen3's template.
THINKING = (
    "{% for m in messages %}<|user|>{{ m.role }}:"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def codec():
    return TextCodec.load(find_shipped("tiny-assistant"))


def train_tokenizer(template: str, trim: bool) -> TextCodec:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" " + m["content"] + " USER: ASSISTANT:" for m in TALK] * 4, trainer)
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template))


def talk(messages, where="talks.jsonl, line 9"):
    return Conversation("1", tuple(messages), None, where)


def pick(codec, example, learned=True):
    return codec.decode([t for t, m in zip(example.ids, example.mask, strict=True) if m == learned], special=True)


def test_the_mask_marks_what_the_assistant_wrote(codec):
    example = encode_conversation(codec, talk(TALK), 512)
    assert pick(codec, example) == "Which size?<|end|>It is ready.<|end|>"
    read = "<|user|>A coffee, please.<|end|><|assistant|><|user|>Large.<|end|><|assistant|>"
    assert pick(codec, example, learned=False) == read


class Slow:
    """A tokenizer that gives no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    "content", ["Which size?", " spaces  around ", "naïve café ☕👩‍🚀", "two\n\nlines\n", "<|end|>"]
)
def test_tokenizers_without_offsets_give_the_same_mask(codec, content):
    messages = [TALK[0], {"role": "assistant", "content": content}, *TALK[2:]]
    example = encode_conversation(codec, talk(messages), 512)
    assert pick(codec, example) == f"{content}<|end|>It is ready.<|end|>"
    assert encode_conversation(TextCodec(Slow(codec.tokenizer)), talk(messages), 512) == example


@pytest.mark.parametrize("trim", [True, False])
def test_tokens_that_begin_with_a_space_keep_it(trim):
    """Offsets may leave the space of a token out; it belongs to the answer all the same."""
    template = (
        "{% for m in messages %}{{ 'USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content + '</s>' }}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    codec = train_tokenizer(template, trim)
    assert pick(codec, encode_conversation(codec, talk(TALK), 512)) == " Which size?</s> It is ready.</s>"
    beside = train_tokenizer(template.replace("%} ASSISTANT:{%", "%} ASSISTANT: {%"), trim)
    with pytest.raises(DataError, match=r"line 9.*between tokens.*'Which size") as refused:
        encode_conversation(beside, talk(TALK), 512)
    assert "\n" not in str(refused.value)


def test_a_last_turn_that_is_written_in_another_way_is_learned_as_it_is(codec):
    copy = TextCodec.load(find_shipped("tiny-assistant"))
    copy.tokenizer.chat_template = THINKING
    example = encode_conversation(copy, talk(TALK), 512)
    assert pick(copy, example) == "Which size?<|end|><think>\n\n</think>It is ready.<|end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(codec):
    class Odd(TextCodec):
        def render(self, messages, answer_follows=False):
            return f"{len(messages)} turns " + super().render(messages, answer_follows)

    with pytest.raises(DataError, match="line 9: the chat template rewrites"):
        encode_conversation(Odd(codec.tokenizer), talk(TALK), 512)


def test_what_cannot_be_learned_from_is_an_error_that_shows_it(codec):
    with pytest.raises(DataError, match=r"line 9 has no answer.*A coffee, please"):
        encode_conversation(codec, talk(TALK[:1]), 512)
    silent = train_tokenizer("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", True)
    with pytest.raises(DataError, match="line 9"):
        encode_conversation(silent, talk(TALK), 512)
    silent.tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match="line 9: the chat template refuses these messages: no system turns"):
        encode_conversation(silent, talk(TALK), 512)
    silent.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_conversation(silent, talk(TALK), 512)


def test_of_a_cut_that_leaves_no_answer_nothing_is_learned(codec):
    whole = encode_conversation(codec, talk(TALK), 512)
    first = whole.mask.index(True)
    assert encode_conversation(codec, talk(TALK), first + 1) is None
    cut = encode_conversation(codec, talk(TALK), first + 2)
    assert (cut.ids, sum(cut.mask)) == (whole.ids[: first + 2], 2)
    assert encode_conversation(codec, talk([]), 512) is None


def test_plain_text_is_learned_in_pieces_all_but_their_first_tokens(codec):
    text = "The bakery opens at nine. " * 10
    ids = codec.tokenizer(text)["input_ids"]
    ((name, examples),) = encode_all(codec, [Conversation("t", (), text, "here")], 16)
    assert name == "t"
    assert [token for example in examples for token in example.ids] == ids[: sum(len(e.ids) for e in examples)]
    assert all(example.mask == [False] + [True] * (len(example.ids) - 1) for example in examples)
    assert max(len(example.ids) for example in examples) == 16


def test_conversations_and_texts_keep_their_order(codec):
    mixed = [talk(TALK), Conversation("2", (), "A text of its own.", "there"), talk(TALK[:2])]
    found = [examples for _, examples in encode_all(codec, mixed, 512)]
    assert found == [[encode_conversation(codec, one, 512)] for one in mixed]


def test_a_tokenizer_of_another_model_is_refused(codec):
    with pytest.raises(DataError, match="belongs to another model"):
        list(encode_all(codec, [talk(TALK)], 512, vocab_size=100))


def test_a_preview_sets_off_what_is_learned(codec):
    example = encode_conversation(codec, talk(TALK[:2]), 512)
    plain, coloured = (Console(file=io.StringIO(), width=200, color_system=c) for c in (None, "truecolor"))
    coloured._force_terminal = True
    assert preview_examples([example] * 3, codec, 2, plain) == 2
    assert plain.file.getvalue().count("<|user|>A coffee, please.<|end|><|assistant|>⟦Which size?<|end|>⟧") == 2
    assert f"{len(example.ids)} tokens, {sum(example.mask)} of them learned" in plain.file.getvalue()
    preview_examples([example], codec, 2, coloured)
    assert "\x1b[1;32mWhich size?<|end|>" in coloured.file.getvalue()
    assert "\x1b[2m<|user|>" in coloured.file.getvalue()
