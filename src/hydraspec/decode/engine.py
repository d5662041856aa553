"""The decode loop: prefill a batch of requests, then step until each of them has finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hydraspec.accept.greedy import AcceptanceRule, GreedyAcceptance
from hydraspec.base.model import BaseModel
from hydraspec.decode.step import RunningBatch, decode_step
from hydraspec.errors import RequestError, TreeError
from hydraspec.heads.protocol import DraftHeads
from hydraspec.tree.presets import PRESETS
from hydraspec.tree.topology import Tree
from hydraspec.types import Output, Request, Seconds, StepRecord

# Plain decoding: the root alone.
PLAIN = PRESETS["root"]


class Engine:
    """Decodes batches of requests with one base model, one set of heads and one tree.

    Raises:
        TreeError: the tree is deeper or wider than what the heads can guess.
    """

    def __init__(
        self, base: BaseModel, heads: DraftHeads | None, tree: Tree, rule: AcceptanceRule | None = None
    ) -> None:
        reach = heads.num_heads if heads is not None else 0
        if tree.depth > reach:
            what = f"the heads guess {reach} tokens ahead" if heads is not None else "there are no heads to fill it"
            raise TreeError(f"tree {tree.name} is {tree.depth} deep, but {what}: choose a tree no deeper than {reach}")
        width = max((stage.width for stage in tree.expansion), default=0)
        proposed = (heads.config.draft_vocabulary if heads is not None else 0) or base.vocab_size
        if width > proposed:
            raise TreeError(f"tree {tree.name} asks for {width} tokens of one head, but only {proposed} are proposed")
        self.base, self.heads, self.rule = base, heads, rule or GreedyAcceptance()
        self.tree = tree.to(base.device)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be decoded to its end.

        Raises:
            RequestError: its prompt is empty, or prompt and new tokens do not fit the model's context.
        """
        if not request.prompt:
            raise RequestError("the prompt is empty: it has no tokens")
        limit = self.base.max_length
        if limit is not None and len(request.prompt) + request.max_new_tokens > limit:
            raise RequestError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit the "
                f"model's context of {limit}: shorten the prompt or lower max_new_tokens"
            )

    def run(self, requests: Sequence[Request], outputs: Sequence[Output]) -> Iterator[StepRecord]:
        """Decode requests together until all have finished.

        Args:
            requests: all of them are checked before the first starts.
            outputs: one for each request; filled as the tokens come.

        Yields:
            A record of the prefill (`nodes` is 0), then one of each verification step.

        Raises:
            RequestError: see `check`.
        """
        for request in requests:
            self.check(request)
        if not requests:
            return
        slots = max(len(request.prompt) + request.max_new_tokens for request in requests) + self.tree.num_nodes
        active = list(range(len(requests)))
        running, record = self._prefill(requests, outputs, slots)
        yield record
        while True:
            going = [row for row, index in enumerate(active) if outputs[index].finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                running.retain(going)
                active = [active[row] for row in going]
            accepted, seconds = decode_step(self.base, self.heads, self.tree, self.rule, running)
            emitted = []
            for index, tokens in zip(active, accepted.tokens, strict=True):
                gained = emit(requests[index], outputs[index], tokens)
                outputs[index].steps += 1
                outputs[index].step_tokens += len(gained)
                emitted.append(gained)
            yield StepRecord(
                nodes=self.tree.num_nodes,
                sequences=tuple(active),
                accepted=tuple(count - 1 for count in accepted.counts),
                emitted=tuple(emitted),
                seconds=seconds,
            )

    def _prefill(
        self, requests: Sequence[Request], outputs: Sequence[Output], slots: int
    ) -> tuple[RunningBatch, StepRecord]:
        """Read all prompts and choose each one's first token, the first root."""
        counts = [len(request.prompt) for request in requests]
        ids = torch.zeros(len(requests), max(counts), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, : counts[row]] = torch.tensor(request.prompt)
        with torch.inference_mode():
            cache = self.base.new_cache(len(requests), slots)
            verified = self.base.prefill(ids.to(self.base.device), counts, cache)
            root = self.rule.choose(verified.logits[:, 0])
            # Without children to guess, nobody asks the heads.
            heads = self.heads if self.tree.depth else None
            state = heads.begin(verified.hidden, counts, slots) if heads is not None else None
        first = root.tolist()
        emitted = tuple(emit(r, o, [token]) for r, o, token in zip(requests, outputs, first, strict=True))
        record = StepRecord(0, tuple(range(len(requests))), (0,) * len(requests), emitted, Seconds())
        return RunningBatch(root, cache, state), record


def emit(request: Request, output: Output, tokens: Sequence[int]) -> tuple[int, ...]:
    """Append new tokens to an output, cut where plain decoding would have stopped.

    Returns:
        The tokens that were appended. Sets `finish_reason` where the output ends among them.
    """
    before = len(output.token_ids)
    kept = list(tokens[: request.max_new_tokens - before])
    reason = "length" if before + len(kept) == request.max_new_tokens else None
    for place, token in enumerate(kept):
        if token in request.eos_token_ids:
            kept, reason = kept[: place + 1], "eos"
            break
    output.token_ids.extend(kept)
    if request.stop_check is not None:
        stop = request.stop_check(output.token_ids, len(kept))
        if stop is not None:
            del output.token_ids[stop:]
            reason = "stop"
    output.finish_reason = reason
    return tuple(output.token_ids[before:])
