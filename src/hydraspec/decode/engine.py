"""Continuous batching: requests join and leave between steps; each says what it would say alone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from hydraspec.accept import make_rule
from hydraspec.accept.greedy import AcceptanceRule
from hydraspec.base.model import BaseModel
from hydraspec.config import EngineConfig
from hydraspec.decode.batch import Job, RunningBatch
from hydraspec.decode.clock import Clock
from hydraspec.decode.forwards import EagerForwards, Forwards, StaticForwards
from hydraspec.decode.memory import plan_memory
from hydraspec.decode.prefixes import find_shared, is_being_read
from hydraspec.decode.step import decode_step
from hydraspec.errors import RequestError, TreeError
from hydraspec.heads.protocol import DraftHeads
from hydraspec.tree import PRESETS, Tree, TreeTable, find_trees
from hydraspec.types import Output, Request, Seconds, StepRecord

logger = logging.getLogger(__name__)

# Plain decoding: the root alone.
PLAIN = PRESETS["root"]


class Engine:
    """Decodes requests with one base model and one set of heads, as many at once as its caches hold.

    Not for several threads at once: call `submit` and `abort` between steps.

    Attributes:
        trees: which tree is used at which number of decoding sequences.
        plan: what the caches hold.

    Raises:
        TreeError: a tree is deeper or wider than what the heads can guess.
        RequestError: the memory limit does not hold one sequence.
    """

    def __init__(
        self, base: BaseModel, heads: DraftHeads | None, trees: Tree | TreeTable, config: EngineConfig | None = None
    ) -> None:
        trees = find_trees(trees)
        for tree in trees.trees:
            check_reach(tree, base, heads)
        self.base, self.config = base, config or EngineConfig()
        # Without children to guess, nobody asks the heads.
        self.heads = heads if trees.depth else None
        self.trees = trees.to(base.device)
        self.plan = plan_memory(base, self.heads, self.trees, self.config)
        logger.info("%s; %s", self.plan.describe(), base.describe_forward())
        with torch.inference_mode():
            self._running = RunningBatch(base, self.heads, self.plan.max_batch, self.plan.slots)
        self._forwards = self._choose_forwards()
        self._waiting: deque[Job] = deque()
        self._submitted = 0
        self._rule: AcceptanceRule | None = None  # of the rows that decode now
        self._clock = Clock(base.device)

    def _choose_forwards(self) -> Forwards:
        forward = self.config.forward
        if forward == "auto":
            forward = "static" if self.base.device.type == "cuda" else "eager"
        if forward == "eager":
            return EagerForwards(self.base, self.heads, self._running)
        return StaticForwards(self.base, self.heads, self._running, "inductor" if forward == "compile" else None)

    # -- requests ------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be decoded to its end.

        Raises:
            RequestError: its prompt is empty, or prompt and new tokens do not fit the caches or the model's context.
        """
        if not request.prompt:
            raise RequestError("the prompt is empty: it has no tokens")
        if len(request.prompt) + request.max_new_tokens > self.plan.max_length:
            limit = "the model's context" if self.plan.max_length == self.base.max_length else "max_length, the limit"
            raise RequestError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit {limit} "
                f"of {self.plan.max_length}: shorten the prompt or lower max_new_tokens"
            )

    def submit(self, request: Request, output: Output | None = None) -> Job:
        """Queue a request; it joins the others at the next step that has a row for it.

        Args:
            request: what to decode.
            output: filled as the tokens come; left out: a new one, the job's `output`.

        Raises:
            RequestError: see `check`.
        """
        self.check(request)
        job = Job(self._submitted, request, output if output is not None else Output())
        self._submitted += 1
        self._waiting.append(job)
        return job

    def abort(self, job: Job) -> None:
        """End a request now, wherever it stands, with the finish reason "abort"; does nothing if it has finished."""
        if job.output.finish_reason is not None:
            return
        job.output.finish_reason = "abort"
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._release(next(row for row in range(self._running.occupied) if self._running.jobs[row] is job))

    def can_hold(self, trees: TreeTable, batch: int, length: int) -> bool:
        """Whether it decodes with these trees, and `batch` sequences of `length` tokens at once."""
        return self.trees == trees and self.plan.max_batch >= batch and self.plan.max_length >= length

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self._waiting and not self._running.occupied

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request], outputs: Sequence[Output]) -> Iterator[StepRecord]:
        """Decode requests until all have finished; what is left of them when the iterator is closed is aborted.

        An engine whose step was interrupted by anything else, Ctrl-C for instance, must not be used again.

        Args:
            requests: all of them are checked before the first starts.
            outputs: one for each request; filled as the tokens come.

        Yields:
            Records of `step`, with the requests numbered as given here.

        Raises:
            RequestError: see `check`; or requests of others are running.
        """
        if not self.is_idle:
            raise RequestError("this engine has other requests: use submit and step, or another engine")
        for request in requests:
            self.check(request)
        jobs = [self.submit(request, output) for request, output in zip(requests, outputs, strict=True)]
        numbers = {job.number: index for index, job in enumerate(jobs)}
        try:
            for output in outputs:
                while output.finish_reason is None:
                    for record in self.step():
                        yield replace(record, sequences=tuple(numbers[number] for number in record.sequences))
        except GeneratorExit:
            for job in jobs:
                self.abort(job)
            raise

    @torch.inference_mode()
    def step(self) -> list[StepRecord]:
        """Admit waiting requests, read a piece of the prompts that are not read yet, and decode one step.

        Returns:
            A record of the reading, if a prompt was read to its end (`nodes` is 0), and one of the decoding, if any.
        """
        self._admit()
        records = []
        if self._running.reading:
            record = self._read_prompts()
            if record.sequences:
                records.append(record)
        if self._running.active:
            records.append(self._decode())
        return records

    def _admit(self) -> None:
        running = self._running
        while self._waiting and running.occupied < running.size:
            prompt = self._waiting[0].request.prompt
            source, shared = running.occupied, 0
            if self.config.share_prefixes:
                source, shared = find_shared(prompt, running)
                if is_being_read(prompt, shared, running):
                    return  # requests start in the order in which they came
            running.admit(self._waiting.popleft(), source, shared)

    def _read_prompts(self) -> StepRecord:
        """Read the next piece of all prompts that are being read; those at their end start to decode."""
        running, lengths = self._running, self._running.cache.lengths
        rows = slice(running.active, running.occupied)
        prompts = [running.job(row).request.prompt for row in range(rows.start, rows.stop)]
        done = lengths[rows]
        width = max(1, self.config.prefill_tokens // len(prompts))
        # Padding must not reach beyond the caches' last slot.
        width = min(width, max(map(len, prompts)) - min(done), self.plan.slots - max(done))
        pieces = [prompt[start : start + width] for prompt, start in zip(prompts, done, strict=True)]
        counts = [len(piece) for piece in pieces]
        width = max(counts)
        ids = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces]).to(self.base.device)
        verified = self.base.prefill(ids, counts, running.cache, rows)
        running.observe(verified.hidden, ids, counts, rows)
        ready = [place for place, prompt in enumerate(prompts) if lengths[rows.start + place] == len(prompt)]
        jobs = [running.job(rows.start + place) for place in ready]
        if not ready:
            return StepRecord(0, (), (), (), Seconds())
        rule = make_rule([job.live for job in jobs], self.base.vocab_size, self.base.device)
        roots = rule.choose(verified.logits[ready, 0])
        running.root[[rows.start + place for place in ready]] = roots
        emitted = [emit(job, [token]) for job, token in zip(jobs, roots.tolist(), strict=True)]
        for job in jobs:
            running.activate(running.jobs.index(job))
        self._rule = None
        self._release_finished()
        return StepRecord(0, tuple(job.number for job in jobs), (0,) * len(jobs), tuple(emitted), Seconds())

    def _decode(self) -> StepRecord:
        """Advance all decoding rows by one step."""
        running = self._running
        jobs = [running.job(row) for row in range(running.active)]
        if self._rule is None:
            self._rule = make_rule([job.live for job in jobs], self.base.vocab_size, self.base.device)
        tree = self.trees.pick(running.active)
        accepted, seconds = decode_step(self._forwards, tree, self._rule, running, self._clock)
        emitted = []
        for job, tokens in zip(jobs, accepted.tokens, strict=True):
            gained = emit(job, tokens)
            job.output.steps += 1
            job.output.step_tokens += len(gained)
            emitted.append(gained)
        self._release_finished()
        return StepRecord(
            nodes=tree.num_nodes,
            sequences=tuple(job.number for job in jobs),
            accepted=tuple(count - 1 for count in accepted.counts),
            emitted=tuple(emitted),
            seconds=seconds,
        )

    def _release_finished(self) -> None:
        for row in reversed(range(self._running.active)):
            if self._running.job(row).output.finish_reason is not None:
                self._release(row)

    @torch.inference_mode()
    def _release(self, row: int) -> None:
        self._running.release(row)
        self._rule = None


def check_reach(tree: Tree, base: BaseModel, heads: DraftHeads | None) -> None:
    """Refuse a tree that the heads cannot fill.

    Raises:
        TreeError: it is deeper than the heads guess, or wider than their vocabulary.
    """
    reach = heads.num_heads if heads is not None else 0
    if tree.depth > reach:
        what = f"the heads guess {reach} tokens ahead" if heads is not None else "there are no heads to fill it"
        raise TreeError(f"tree {tree.name} is {tree.depth} deep, but {what}: choose a tree no deeper than {reach}")
    width = max((stage.width for stage in tree.expansion), default=0)
    proposed = (heads.config.draft_vocabulary if heads is not None else 0) or base.vocab_size
    if width > proposed:
        raise TreeError(f"tree {tree.name} asks for {width} tokens of one head, but only {proposed} are proposed")


def emit(job: Job, tokens: Sequence[int]) -> tuple[int, ...]:
    """Append new tokens to a job's output and text, cut where plain decoding would have stopped.

    Returns:
        The tokens that were appended. Sets the output's `finish_reason` where it ends among them.
    """
    request, output = job.request, job.output
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
    gained = tuple(output.token_ids[before:])
    job.live.tokens.extend(gained)
    return gained
