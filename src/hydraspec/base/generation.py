"""What a model's own generation config asks of every text, so that our output is what its `generate` would say."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

logger = logging.getLogger(__name__)

# Settings that change what greedy decoding says, and that nothing here applies.
_NOT_APPLIED = {
    "guidance_scale": 1.0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "num_beams": 1,
}


class GenerationDefaults:
    """The settings of a model's generation config that change its distribution, temperature and its kin aside.

    Attributes:
        repetition_penalty: for requests that name none; 1.0: none.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._config: Any = getattr(model, "generation_config", None)
        self._device = model.device
        self.repetition_penalty = float(self._read("repetition_penalty") or 1.0)
        for setting, neutral in _NOT_APPLIED.items():
            value = self._read(setting)
            if value is not None and value != neutral:
                logger.warning("%s asks for %s=%s when it generates; that is not applied", name, setting, value)

    def make_processors(self, prompt_length: int, eos_token_ids: frozenset[int]) -> tuple[LogitsProcessor, ...]:
        """The processors of one request, as `generate` of transformers makes and orders them."""
        eos = sorted(eos_token_ids)
        made: list[LogitsProcessor] = []
        if value := self._read("sequence_bias"):
            made.append(SequenceBiasLogitsProcessor(sequence_bias=value))
        if value := self._read("no_repeat_ngram_size"):
            made.append(NoRepeatNGramLogitsProcessor(value))
        if value := self._read("bad_words_ids"):
            made.append(NoBadWordsLogitsProcessor(value, eos or None))
        if (value := self._read("min_length")) and eos:
            made.append(MinLengthLogitsProcessor(value, eos, device=str(self._device)))
        if (value := self._read("min_new_tokens")) and eos:
            made.append(MinNewTokensLengthLogitsProcessor(prompt_length, value, eos, device=str(self._device)))
        if value := self._read("suppress_tokens"):
            made.append(SuppressTokensLogitsProcessor(value, device=str(self._device)))
        if value := self._read("begin_suppress_tokens"):
            made.append(SuppressTokensAtBeginLogitsProcessor(value, prompt_length, device=str(self._device)))
        return tuple(made)

    def _read(self, setting: str) -> Any:
        return getattr(self._config, setting, None)
