"""Methods compared in turn on the same prompts: speed as ratios of one run, and whether the tokens are the same."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hydraspec.errors import RequestError
from hydraspec.heads.checkpoint import library_versions
from hydraspec.llm import LLM
from hydraspec.types import Output, Seconds

# Prompts in token ids that are decoded together.
Batch = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Run:
    """One method on one batch of prompts."""

    token_ids: list[list[int]]  # new tokens of each prompt, up to and including the first that ends the text
    seconds: float  # from the prompts to the last token, prefill included
    passes: int = 0  # forward passes of the base model after the prefill
    steps: int = 0  # the same, counted once for each sequence that took part
    step_tokens: int = 0  # tokens emitted by those steps
    stages: Seconds = field(default_factory=Seconds)  # where the passes' time went, where the method says


@dataclass(frozen=True)
class Method:
    """A way to decode a batch."""

    name: str
    decode: Callable[[Batch], Run]
    largest_batch: int | None = None  # more prompts at once it refuses

    def takes(self, size: int) -> bool:
        """Whether it decodes batches of `size` prompts."""
        return self.largest_batch is None or size <= self.largest_batch


@dataclass(frozen=True)
class Row:
    """A method over all batches of one size; speed-up and identity are against the first method of the comparison."""

    name: str
    batch: int
    tokens_per_second: float
    acceptance_length: float
    speedup: float
    identical: bool
    identical_prompts: int
    prompts: int
    tokens: int
    step_milliseconds: float | None  # None: the method does not say
    stage_shares: dict[str, float]
    round_tokens_per_second: list[float]  # the rounds one by one: how far the machine wavered


@dataclass(frozen=True)
class Skipped:
    """A method that cannot decode batches of this size."""

    name: str
    batch: int
    skipped: str  # why


def decode_with(llm: LLM, max_new_tokens: int, largest_batch: int = 1) -> Callable[[Batch], Run]:
    """Our own loop with the model, heads and tree of `llm`, for batches of at most `largest_batch` prompts."""
    # Prompts come again in each round; none of them may be found in the cache, where others would read it anew.
    config = dataclasses.replace(llm.engine_config, share_prefixes=False, max_batch=largest_batch)
    llm = LLM(llm.base, llm.codec, llm.heads, llm.tree, config)

    def run(prompts: Batch) -> Run:
        outputs = [Output() for _ in prompts]
        start = time.perf_counter()
        requests = [llm.make_request(list(prompt), max_new_tokens) for prompt in prompts]
        records = [record for record in llm.run(requests, outputs) if record.nodes]
        seconds = time.perf_counter() - start
        return Run(
            token_ids=[output.token_ids for output in outputs],
            seconds=seconds,
            passes=len(records),
            steps=sum(output.steps for output in outputs),
            step_tokens=sum(output.step_tokens for output in outputs),
            stages=_add(record.seconds for record in records),
        )

    return run


def make_batches(prompts: Batch, size: int) -> list[Batch]:
    """Prompts in order, `size` at a time; what is left over at the end is left out.

    Raises:
        RequestError: there are fewer than `size`.
    """
    if len(prompts) < size:
        raise RequestError(f"a batch of {size} needs as many prompts, but there are {len(prompts)}")
    return [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]


def compare_sizes(
    methods: Sequence[Method],
    prompts: Batch,
    sizes: Sequence[int],
    rounds: int = 1,
    watch: Callable[[], None] = lambda: None,
) -> list[Row | Skipped]:
    """`compare` at several batch sizes, each against the first method at the same size; methods in order within each.

    Raises:
        RequestError: there are fewer prompts than a size asks for.
    """
    batches = {size: make_batches(prompts, size) for size in sizes}
    table: list[Row | Skipped] = []
    for size in sizes:
        rows = iter(compare([method for method in methods if method.takes(size)], batches[size], rounds, watch))
        for method in methods:
            skipped = Skipped(method.name, size, f"decodes at most {method.largest_batch} at once")
            table.append(next(rows) if method.takes(size) else skipped)
    return table


def count_runs(methods: Sequence[Method], prompts: Batch, sizes: Sequence[int], rounds: int) -> int:
    """How often `compare_sizes` will call its `watch`: once for each batch, round and method, and for each warm-up."""
    total = 0
    for size in sizes:
        batches = make_batches(prompts, size)
        once = len(batches) * rounds + len(_find_warm_ups(batches))
        total += once * sum(method.takes(size) for method in methods)
    return total


def _find_warm_ups(batches: Sequence[Batch]) -> list[Batch]:
    """A batch for each doubling of the longest prompt's length: forwards of fixed shapes are made at such steps."""
    return list({max(map(len, batch)).bit_length(): batch for batch in batches}.values())


def compare(
    methods: Sequence[Method],
    batches: Sequence[Batch],
    rounds: int = 1,
    watch: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run all methods on all batches, in turn on each batch, the first method being the reference.

    Each method is warmed up, untimed, on a batch of each length. Of several rounds the median counts, batch by batch.

    Args:
        methods: the first is what the others are compared with.
        batches: of one size.
        rounds: how often each batch is timed with each method.
        watch: called after each run, warm-ups included, for a progress bar.
    """
    for method in methods:
        for batch in _find_warm_ups(batches):
            method.decode(batch)
            watch()
    runs: list[list[list[Run]]] = [[[] for _ in batches] for _ in methods]
    for place, batch in enumerate(batches):
        for turn in range(rounds):
            for number in _rotate(len(methods), turn):
                runs[number][place].append(methods[number].decode(batch))
                watch()
    return [summarise(method.name, runs[number], runs[0]) for number, method in enumerate(methods)]


def _rotate(count: int, turn: int) -> list[int]:
    """The numbers below `count`, beginning with another one at each turn."""
    return [(turn + place) % count for place in range(count)]


def summarise(name: str, runs: Sequence[Sequence[Run]], reference: Sequence[Sequence[Run]]) -> Row:
    """The row of a method from its runs, by batch and round, and those of the method that it is compared with.

    Time is the median over the rounds, batch by batch; stages are shared out over all rounds; tokens are the first's.
    """
    outputs = [tokens for rounds in runs for tokens in rounds[0].token_ids]
    expected = [tokens for rounds in reference for tokens in rounds[0].token_ids]
    everything = [run for rounds in runs for run in rounds]
    steps, passes = sum(run.steps for run in everything), sum(run.passes for run in everything)
    stages = _add(run.stages for run in everything)
    speed, its_speed = _measure_speed(runs), _measure_speed(reference)
    same = sum(ours == theirs for ours, theirs in zip(outputs, expected, strict=True))
    return Row(
        name=name,
        batch=len(runs[0][0].token_ids),
        tokens_per_second=speed,
        acceptance_length=sum(run.step_tokens for run in everything) / steps if steps else 1.0,
        speedup=speed / its_speed,
        identical=same == len(outputs),
        identical_prompts=same,
        prompts=len(outputs),
        tokens=sum(map(len, outputs)),
        step_milliseconds=1e3 * stages.total / passes if stages.total else None,
        stage_shares={k: v / stages.total for k, v in asdict(stages).items()} if stages.total else {},
        round_tokens_per_second=[_measure_speed([[run] for run in turn]) for turn in zip(*runs, strict=True)],
    )


def _measure_speed(runs: Sequence[Sequence[Run]]) -> float:
    """Tokens a second, of the median time that each batch took."""
    seconds = sum(statistics.median(run.seconds for run in rounds) for rounds in runs)
    return sum(len(tokens) for rounds in runs for tokens in rounds[0].token_ids) / seconds


def _add(parts: Iterator[Seconds]) -> Seconds:
    total = [0.0] * len(dataclasses.fields(Seconds))
    for part in parts:
        total = [a + b for a, b in zip(total, asdict(part).values(), strict=True)]
    return Seconds(*total)


def describe_machine() -> dict[str, Any]:
    """What a figure must be read with: processor, threads, device and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{len(names)} x {names[0]}" if names else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu, **library_versions()}
