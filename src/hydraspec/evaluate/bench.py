"""Methods compared in turn on the same prompts: speed as ratios of one run, and whether the tokens are the same."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hydraspec.heads.checkpoint import library_versions
from hydraspec.llm import LLM
from hydraspec.types import Output, Seconds


@dataclass(frozen=True)
class Run:
    """One method on one prompt."""

    token_ids: list[int]
    seconds: float  # from the prompt to the last token, prefill included
    steps: int = 0
    step_tokens: int = 0
    stages: Seconds = field(default_factory=Seconds)


# Takes the prompt's token ids.
Method = Callable[[Sequence[int]], Run]


@dataclass(frozen=True)
class Row:
    """A method over all prompts; speed-up and identity are against the first method of the comparison."""

    name: str
    tokens_per_second: float
    acceptance_length: float
    speedup: float
    identical: bool
    identical_prompts: int
    prompts: int
    tokens: int
    step_milliseconds: float
    stage_shares: dict[str, float]


def decode_with(llm: LLM, max_new_tokens: int) -> Method:
    """Our own loop with the model, heads and tree of `llm`."""

    def run(prompt: Sequence[int]) -> Run:
        output = Output()
        request = llm.make_request(list(prompt), max_new_tokens)
        start = time.perf_counter()
        spent = [record.seconds for record in llm.run([request], [output])]
        seconds = time.perf_counter() - start
        stages = Seconds(*(sum(getattr(s, name) for s in spent) for name in ("draft", "verify", "accept", "commit")))
        return Run(output.token_ids, seconds, output.steps, output.step_tokens, stages)

    return run


def decode_with_transformers(model: PreTrainedModel, max_new_tokens: int) -> Method:
    """Greedy `generate` of transformers with its default cache."""

    def run(prompt: Sequence[int]) -> Run:
        ids = torch.tensor([list(prompt)], device=model.device)
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
        )
        new = out[0, ids.shape[1] :].tolist()
        return Run(new, time.perf_counter() - start, len(new) - 1, len(new) - 1)

    return run


def compare(
    methods: dict[str, Method],
    prompts: Sequence[Sequence[int]],
    rounds: int = 1,
    watch: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run all methods on all prompts, in turn on each prompt, the first method being the reference.

    Each method is warmed up on the first prompt. Of several rounds the median counts, prompt by prompt.

    Args:
        methods: by name; the first is what the others are compared with.
        prompts: token ids.
        rounds: how often each prompt is timed with each method.
        watch: called after each run, for a progress bar.
    """
    for method in methods.values():
        method(prompts[0])
    runs: dict[str, list[list[Run]]] = {name: [] for name in methods}
    for prompt in prompts:
        for name in methods:
            runs[name].append([])
        for turn in range(rounds):
            for name in _rotate(list(methods), turn):
                runs[name][-1].append(methods[name](prompt))
                watch()
    reference = next(iter(methods))
    return [_summarise(name, runs[name], runs[reference]) for name in methods]


def _rotate(names: list[str], turn: int) -> Iterator[str]:
    yield from names[turn % len(names) :]
    yield from names[: turn % len(names)]


def _summarise(name: str, runs: list[list[Run]], reference: list[list[Run]]) -> Row:
    seconds = sum(statistics.median(run.seconds for run in rounds) for rounds in runs)
    theirs = sum(statistics.median(run.seconds for run in rounds) for rounds in reference)
    firsts = [rounds[0] for rounds in runs]
    tokens = sum(len(run.token_ids) for run in firsts)
    their_tokens = sum(len(rounds[0].token_ids) for rounds in reference)
    steps = sum(run.steps for run in firsts)
    same = sum(run.token_ids == other[0].token_ids for run, other in zip(firsts, reference, strict=True))
    total = Seconds(*(sum(getattr(r.stages, stage) for r in firsts) for stage in asdict(Seconds())))
    return Row(
        name=name,
        tokens_per_second=tokens / seconds,
        acceptance_length=sum(run.step_tokens for run in firsts) / steps if steps else 1.0,
        speedup=(tokens / seconds) / (their_tokens / theirs),
        identical=same == len(runs),
        identical_prompts=same,
        prompts=len(runs),
        tokens=tokens,
        step_milliseconds=1e3 * total.total / steps if steps else 0.0,
        stage_shares={k: v / total.total for k, v in asdict(total).items()} if total.total else {},
    )


def describe_machine() -> dict[str, Any]:
    """What a figure must be read with: processor, threads, device and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{len(names)} x {names[0]}" if names else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu, **library_versions()}
