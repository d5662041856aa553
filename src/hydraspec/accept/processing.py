"""Changes of the base model's logits before a token is chosen: each text has its own settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hydraspec.config import SamplingConfig
from hydraspec.errors import RequestError
from hydraspec.types import LiveText

# Below this a logit divided by the temperature may overflow; the result is greedy in all but name long before.
SMALLEST_TEMPERATURE = 1e-6
# On a CPU, sorting a row this long costs more than first finding the few tokens worth sorting.
LONG_ROW = 1024


class LogitsProcessing:
    """Applies each text's settings to its rows of logits, vectorised over the batch.

    The order is: allowed tokens, logit bias, penalties, the request's own processors, temperature, top-k, top-p,
    min-p. Tokens left out get -inf. A text without some setting keeps its logits bitwise, and no text's result depends
    on the others. At temperature 0 the last four change no argmax and are skipped.

    Formulas: those of transformers' RepetitionPenaltyLogitsProcessor (prompt and output), TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper; presence and frequency penalty as the OpenAI interface
    defines them, `logit - presence * [count > 0] - frequency * count`, with counts in the output only.

    Args:
        texts: B texts; their tokens may grow between two calls of `refresh`, never shrink.
        vocab_size: V, the length of a row of logits.
        device: of the logits.

    Raises:
        RequestError: a logit bias or an allowed token is not a token id of the vocabulary.
    """

    def __init__(self, texts: Sequence[LiveText], vocab_size: int, device: torch.device | str) -> None:
        self.texts = texts
        self.vocab_size, self.device = vocab_size, torch.device(device)
        configs = [text.request.sampling for text in texts]
        for config in configs:
            _check_token_ids(config, vocab_size)
        self._has_processors = any(text.request.processors for text in texts)
        self._forbidden = self._mark_forbidden(configs)  # [B, 1, V] bool
        self._bias = self._gather_biases(configs)
        self._start_counts(configs)
        warped = [config if config.temperature > 0 else SamplingConfig(temperature=1.0) for config in configs]
        temperatures = [max(config.temperature, SMALLEST_TEMPERATURE) for config in warped]
        self._temperature = self._column(temperatures, 1.0)
        self._top_k = [min(config.top_k, vocab_size) for config in warped]
        self._last_kept = torch.tensor([max(k, 1) - 1 for k in self._top_k], device=device).view(-1, 1, 1)
        self._unlimited = torch.tensor([k == 0 for k in self._top_k], device=device).view(-1, 1, 1)
        self._nucleus = {row: config.top_p for row, config in enumerate(warped) if config.top_p < 1}
        self._nucleus_rows = torch.tensor(list(self._nucleus), dtype=torch.int64, device=device)
        outside = [1 - top_p for top_p in self._nucleus.values()]
        self._outside = torch.tensor(outside, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._min_p = self._column([config.min_p for config in warped], 0.0)

    def refresh(self) -> None:
        """Count the tokens that the texts have gained since the last call, for the penalties. Updates the counts."""
        if self._counts is None:
            return
        places: list[int] = []
        for row in self._counted_rows:
            tokens = self.texts[row].tokens
            places.extend(row * self.vocab_size + token for token in tokens[self._counted[row] :])
            self._counted[row] = len(tokens)
        if places:
            index = torch.tensor(places).to(self.device, non_blocking=True)
            self._counts.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def apply(self, logits: Tensor, path: Tensor, walking: Sequence[bool] | None = None) -> Tensor:
        """The changed logits.

        Args:
            logits: `[B, M, V]` of the token after M contexts of each text; left as they are.
            path: `[B, M, L]` int64: a context is the text and these tokens; -1 stands for none.
            walking: the texts whose result is used; the requests' own processors are called for these only.

        Returns:
            `[B, M, V]` float32; may share memory with `logits`.
        """
        scores = logits.float()
        if self._forbidden is not None:
            scores = scores.masked_fill(self._forbidden, -math.inf)
        if self._bias is not None:
            rows, tokens, values = self._bias
            scores = scores.clone()
            scores[rows, :, tokens] += values[:, None]
        if self._counts is not None:
            scores = self._penalise(scores, self._counts, path)
        if self._has_processors:
            scores = self._call_processors(scores, path, walking)
        if self._temperature is not None:
            scores = scores / self._temperature
        if any(self._top_k):
            scores = self._keep_top_k(scores)
        if self._nucleus:
            scores = self._keep_nuclei(scores)
        if self._min_p is not None:
            probabilities = scores.softmax(-1)
            least = self._min_p * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -math.inf)
        return scores

    def _penalise(self, scores: Tensor, counts: Tensor, path: Tensor) -> Tensor:
        counts = counts[:, None]  # [B, 1, V]
        if path.shape[-1]:
            counts = counts.repeat(1, path.shape[1], 1)
            counts.scatter_add_(2, path.clamp(min=0), (path >= 0).to(torch.int32))
        present = counts > 0
        if self._repetition is not None:
            assert self._in_prompt is not None
            repeated = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
            scores = torch.where(present | self._in_prompt[:, None], repeated, scores)
        if self._presence is not None:
            scores = scores - self._presence * present
        if self._frequency is not None:
            scores = scores - self._frequency * counts
        return scores

    def _call_processors(self, scores: Tensor, path: Tensor, walking: Sequence[bool] | None) -> Tensor:
        scores = scores.clone()
        for row, text in enumerate(self.texts):
            if not text.request.processors or (walking is not None and not walking[row]):
                continue
            before = torch.tensor(text.tokens, device=self.device)
            for place in range(scores.shape[1]):
                after = path[row, place]
                input_ids = torch.cat([before, after[after >= 0]])[None]
                changed = scores[row, place][None]
                for processor in text.request.processors:
                    changed = processor(input_ids, changed)
                scores[row, place] = changed[0]
        return scores

    def _keep_top_k(self, scores: Tensor) -> Tensor:
        best = scores.topk(max(self._top_k)).values
        least = best.gather(-1, self._last_kept.expand(-1, scores.shape[1], 1)).masked_fill(self._unlimited, -math.inf)
        return scores.masked_fill(scores < least, -math.inf)  # ties with the last one stay, as in transformers

    def _keep_nuclei(self, scores: Tensor) -> Tensor:
        if self.device.type == "cpu" and self.vocab_size >= LONG_ROW:
            scores = scores.clone()
            for row, top_p in self._nucleus.items():
                for place in range(scores.shape[1]):
                    scores[row, place] = keep_nucleus(scores[row, place], 1 - top_p)
            return scores
        if len(self._nucleus) == len(self.texts):
            return keep_nuclei(scores, self._outside)
        return scores.index_copy(0, self._nucleus_rows, keep_nuclei(scores[self._nucleus_rows], self._outside))

    def _column(self, values: Sequence[float], neutral: float) -> Tensor | None:
        """`[B, 1, 1]` float32, or None where all are neutral."""
        if all(value == neutral for value in values):
            return None
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, 1, 1)

    def _mark_forbidden(self, configs: Sequence[SamplingConfig]) -> Tensor | None:
        if not any(config.allowed_tokens for config in configs):
            return None
        forbidden = torch.zeros(len(configs), 1, self.vocab_size, dtype=torch.bool)
        for row, config in enumerate(configs):
            if config.allowed_tokens:
                forbidden[row] = True
                forbidden[row, 0, list(config.allowed_tokens)] = False
        return forbidden.to(self.device)

    def _gather_biases(self, configs: Sequence[SamplingConfig]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, token ids and values, `[K]` each; biases given twice for one token add up."""
        biases: dict[tuple[int, int], float] = {}
        for row, config in enumerate(configs):
            for token, value in config.logit_bias:
                biases[row, token] = biases.get((row, token), 0.0) + value
        if not biases:
            return None
        rows, tokens = torch.tensor(list(biases), device=self.device).unbind(-1)
        return rows, tokens, torch.tensor(list(biases.values()), dtype=torch.float32, device=self.device)

    def _start_counts(self, configs: Sequence[SamplingConfig]) -> None:
        """Allocate what penalties need, where some text has any; the outputs are counted by `refresh`."""
        self._repetition = self._column([config.repetition_penalty or 1.0 for config in configs], 1.0)
        self._presence = self._column([config.presence_penalty for config in configs], 0.0)
        self._frequency = self._column([config.frequency_penalty for config in configs], 0.0)
        self._counted_rows = [row for row, config in enumerate(configs) if config.has_penalties]
        self._counted = [len(text.request.prompt) for text in self.texts]  # tokens before these are counted already
        self._counts: Tensor | None = None  # [B, V] int32, of the output
        self._in_prompt: Tensor | None = None  # [B, V] bool
        if not self._counted_rows:
            return
        self._counts = torch.zeros(len(configs), self.vocab_size, dtype=torch.int32, device=self.device)
        if self._repetition is not None:
            in_prompt = torch.zeros(len(configs), self.vocab_size, dtype=torch.bool)
            for row in self._counted_rows:
                in_prompt[row, list(self.texts[row].request.prompt)] = True
            self._in_prompt = in_prompt.to(self.device)


def keep_nuclei(scores: Tensor, outside: Tensor) -> Tensor:
    """Leave out the least likely tokens whose probabilities add up to `outside` or less; never the most likely one.

    Args:
        scores: `[..., V]` float32 logits.
        outside: 1 - top_p, to be broadcast with `[..., 1]`.
    """
    ascending, order = scores.sort(dim=-1, stable=True)
    removed = ascending.softmax(-1).cumsum(-1) <= outside
    removed[..., -1] = False
    return scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)


def keep_nucleus(scores: Tensor, outside: float) -> Tensor:
    """`keep_nuclei` of one row `[V]`, for CPUs: sorts only the tokens that may stay.

    Tokens of probability outside / V or less cannot add up to more than `outside`, so all of them are left out.
    """
    probabilities = scores.softmax(-1)
    unlikely = probabilities <= outside / len(scores)
    rest = probabilities.masked_fill(~unlikely, 0.0).sum()
    candidates = (~unlikely).nonzero()[:, 0]
    ascending, order = probabilities.index_select(0, candidates).sort(stable=True)
    stays = ascending.cumsum(-1).add_(rest) > outside
    stays[-1] = True
    kept = candidates[order[stays]]
    return torch.full_like(scores, -math.inf).index_copy_(0, kept, scores[kept])


def _check_token_ids(config: SamplingConfig, vocab_size: int) -> None:
    for name, tokens in (
        ("logit_bias", [token for token, _ in config.logit_bias]),
        ("allowed_tokens", config.allowed_tokens),
    ):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise RequestError(f"{name} names token {token}, but the vocabulary has the ids 0 to {vocab_size - 1}")
