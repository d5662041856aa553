import pytest
import torch

import hydraspec
from hydraspec.base.cache import SlotCache
from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError, HydraspecError, RequestError
from hydraspec.llm import LLM
from tests.conftest import Script, ScriptedHeads, generate_plainly, make_model, random_prompts

PROMPT = "Find me a hotel in San Jose."


def test_generate_and_stream_agree(shipped):
    output = shipped.generate(PROMPT, max_new_tokens=30)[0]
    assert "".join(shipped.stream(PROMPT, max_new_tokens=30)) == output.text
    assert output.finish_reason in ("eos", "length")
    assert output.text == shipped.codec.decode(output.token_ids)


def test_a_batch_keeps_its_order(shipped):
    prompts = [PROMPT, [{"role": "user", "content": "Hi"}], shipped.codec.encode("I want coffee.")]
    together = shipped.generate(prompts, max_new_tokens=20)
    alone = [shipped.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_text_is_cut_before_the_stop_string(shipped):
    whole = shipped.generate(PROMPT, max_new_tokens=30)[0]
    stop = whole.text.split()[3]
    cut = shipped.generate(PROMPT, max_new_tokens=30, stop=stop)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert "".join(shipped.stream(PROMPT, max_new_tokens=30, stop=[stop])) == cut.text


def test_end_of_text_can_be_ignored(shipped):
    assert len(shipped.generate(PROMPT, max_new_tokens=60, ignore_eos=True)[0].token_ids) == 60


def test_long_prompts_are_refused_and_the_default_limit_fits(shipped):
    ids = shipped.codec.encode(PROMPT)
    with pytest.raises(RequestError, match="1100 tokens, but the model's context holds 1024"):
        shipped.generate([(ids * 1000)[:1100]])
    output = shipped.generate([(ids * 1000)[:1020]], ignore_eos=True)[0]
    assert len(output.token_ids) == 4
    with pytest.raises(RequestError, match="do not fit"):
        shipped.generate([(ids * 1000)[:1020]], max_new_tokens=5)


def test_wrong_arguments_are_refused(shipped):
    with pytest.raises(RequestError, match="empty"):
        shipped.generate(["Hello", ""])
    with pytest.raises(HydraspecError, match="max_new_tokens"):
        shipped.generate("Hello", max_new_tokens=0)
    with pytest.raises(HydraspecError, match="stop string"):
        shipped.generate("Hello", stop="")
    for device in ("cuda:99", "toaster"):
        with pytest.raises(HydraspecError, match=f"device {device} cannot be used"):
            hydraspec.load("tiny-assistant", device=device)
    with pytest.raises(CheckpointError, match="no dtype"):
        hydraspec.load("tiny-assistant", dtype="float7")


def test_tensors_of_token_ids_are_prompts(shipped):
    ids = torch.tensor(shipped.codec.encode(PROMPT))
    assert shipped.generate(ids, max_new_tokens=5, stop=None) == shipped.generate([ids], max_new_tokens=5)


def test_no_prompts_give_no_outputs(shipped):
    assert shipped.generate([]) == []


# By setting, a value that changes the text `t` where plain decoding ends at `t[15]`.
GENERATION = {
    "repetition_penalty": lambda t: 2.0,
    "no_repeat_ngram_size": lambda t: 1,
    "min_length": lambda t: 9 + 20,
    "min_new_tokens": lambda t: 20,
    "suppress_tokens": lambda t: [t[3]],
    "begin_suppress_tokens": lambda t: [t[0]],
    "bad_words_ids": lambda t: [[t[1], t[2]]],
}


@pytest.mark.parametrize("settings", [*([name] for name in GENERATION), list(GENERATION)])
def test_the_models_own_generation_config_is_followed(settings, tiny_llama):
    model, prompts = make_model("llama"), random_prompts([9, 4])
    text = generate_plainly(model, prompts[0], 24)
    model.generation_config.eos_token_id = text[15]
    plain = [generate_plainly(model, prompt, 24, eos=text[15]) for prompt in prompts]
    for name in settings:
        setattr(model.generation_config, name, GENERATION[name](text))
    expected = [generate_plainly(model, prompt, 24, eos=text[15]) for prompt in prompts]
    assert expected[0] != plain[0]
    base = BaseModel(model, "tiny")
    codec = type("Ids", (), {"encode": lambda self, ids, raw: ids, "decode": lambda self, ids, special=False: ""})()
    heads = ScriptedHeads(base, Script([p + e for p, e in zip(prompts, expected, strict=True)]))
    for llm in (LLM(base, codec, None), LLM(base, codec, heads)):
        assert [output.token_ids for output in llm.generate(prompts, 24)] == expected


def test_sampling_repeats_with_its_seed_and_differs_between_copies(shipped):
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    twice = shipped.generate([PROMPT, PROMPT], **options)
    assert twice[0].token_ids != twice[1].token_ids
    assert shipped.generate(PROMPT, **options)[0].token_ids == twice[0].token_ids
    assert "".join(shipped.stream(PROMPT, **options)) == twice[0].text
    plain = LLM(shipped.base, shipped.codec, None)
    assert [o.token_ids for o in plain.generate([PROMPT, PROMPT], **options)] == [o.token_ids for o in twice]


def test_wrong_sampling_options_are_refused_in_one_line(shipped):
    for options, message in (
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0}, "top_p must be in"),
        ({"acceptance": "loose"}, "exact or typical"),
        ({"tempreature": 1}, "no option is called 'tempreature'"),
        ({"logit_bias": ((99999, 1.0),)}, "99999"),
    ):
        with pytest.raises(RequestError, match=message):
            shipped.generate("Hello", **options)


def test_typical_acceptance_is_an_option(shipped):
    options = {"max_new_tokens": 40, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    typical, exact = (shipped.generate(PROMPT, acceptance=a, **options)[0] for a in ("typical", "exact"))
    assert len(typical.token_ids) == len(exact.token_ids) == 40
    assert typical.acceptance_length > exact.acceptance_length


def test_an_interrupted_call_leaves_nothing_wrong_behind(shipped, monkeypatch):
    llm = LLM(shipped.base, shipped.codec, shipped.heads)
    expected = llm.generate(PROMPT, 20)[0].token_ids
    commit = SlotCache.commit

    def interrupt(self, *args):
        commit(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(SlotCache, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPT, 20)
    monkeypatch.undo()
    assert llm.generate(PROMPT, 20)[0].token_ids == expected


def test_streams_may_be_left_and_may_overlap(shipped):
    llm = LLM(shipped.base, shipped.codec, shipped.heads)
    whole = llm.generate(PROMPT, 30)[0].text
    left = llm.stream(PROMPT, 30)
    next(left)
    pieces = list(zip(llm.stream(PROMPT, 30), llm.stream(PROMPT, 30), strict=False))
    assert "".join(a for a, _ in pieces) == "".join(b for _, b in pieces) == whole
    left.close()
    assert llm.generate(PROMPT, 30)[0].text == whole
