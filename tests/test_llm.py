import pytest
import torch

import hydraspec
from hydraspec.errors import CheckpointError, HydraspecError, RequestError

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
