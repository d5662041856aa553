import copy

import pytest

from hydraspec.errors import RequestError
from hydraspec.shipped import find_shipped
from hydraspec.text import StreamDecoder, TextCodec, check_stop_strings, cut_at_stop

TEXT = "Café “naïve” 😀 ends.\nA new line – and 日本語 too."


@pytest.fixture(scope="module")
def codec():
    return TextCodec.load(find_shipped("tiny-assistant"))


def test_prompts_come_as_text_messages_or_tokens(codec):
    as_text = codec.encode("Hello there")
    assert as_text == codec.encode([{"role": "user", "content": "Hello there"}])
    assert codec.decode(as_text) == "Hello there"
    assert codec.encode(as_text) == as_text
    assert codec.encode("Hello there", raw=True) == as_text[1:-2]  # the template adds roles and the end of the turn


@pytest.mark.parametrize("prompt", ["", "  \n", [], [5, 99999], [-1], 7, {"role": "user"}, [["a", "b"]], [{"text": 1}]])
def test_empty_and_impossible_prompts_are_refused(codec, prompt):
    with pytest.raises(RequestError):
        codec.encode(prompt)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_of_a_stream_make_the_whole_text(codec, size):
    ids = codec.encode(TEXT, raw=True)
    decoder = StreamDecoder(codec)
    pieces = [
        decoder.push(ids[start : start + size], last=start + size >= len(ids)) for start in range(0, len(ids), size)
    ]
    assert "".join(pieces) == codec.decode(ids)
    assert not any("�" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 3


@pytest.mark.parametrize("stop", ["line", "e", ". \n", "ends.\nA", "never"])
def test_a_stream_never_shows_a_stop_string(codec, stop):
    ids = codec.encode(TEXT, raw=True)
    find = check_stop_strings(codec, [stop])
    decoder, shown, done = StreamDecoder(codec, [stop]), "", False
    for count in range(1, len(ids) + 1):
        done = find(ids[:count], 1) is not None or count == len(ids)
        shown += decoder.push(ids[count - 1 : count], last=done)
        if done:
            break
    assert shown == cut_at_stop(codec.decode(ids), [stop])


def test_special_tokens_can_be_stop_strings(codec):
    ids = [*codec.encode("fine", raw=True), codec.tokenizer.convert_tokens_to_ids("<|user|>"), 9]
    assert check_stop_strings(codec, ["<|user|>"])(ids, 2) == len(ids) - 1


def test_what_the_template_refuses_is_one_line(codec):
    strict = TextCodec(copy.copy(codec.tokenizer))
    strict.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RequestError, match="refuses these messages: no system role"):
        strict.encode("Hello")


@pytest.mark.parametrize("new", [1, 3, 7])
def test_the_stop_check_names_the_completing_token(codec, new):
    ids = codec.encode(TEXT, raw=True)
    find = check_stop_strings(codec, ["new line"])
    expected = next(n for n in range(len(ids)) if "new line" in codec.decode(ids[:n]))
    found = None
    for end in range(new, len(ids) + new, new):
        found = find(ids[:end], new)
        if found is not None:
            break
    assert found == expected
    assert check_stop_strings(codec, []) is None
