"""Sampled output with heads against plain sampling: the same seed must give the same tokens.

python benchmarks/sampling.py --prompts EVAL.jsonl.gz [--seeds 1000] [--heads KIND] [--json FILE]

Every seed is combined with four temperatures and four ways of cutting the distribution. All these requests go through
one engine, so that each batch mixes them; plain decoding at the first batch size is the reference.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from common import KINDS, console, load_kinds, report
from hydraspec.config import EngineConfig
from hydraspec.decode.engine import PLAIN, Engine
from hydraspec.evaluate.suites import read_prompts
from hydraspec.llm import LLM
from hydraspec.tree import find_trees
from hydraspec.types import Output, Request

TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
CUTS: tuple[dict[str, Any], ...] = ({"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {})
TREES = ("chain-4", "small-16")


def main(
    prompts: Annotated[Path, typer.Option(help="conversations in ShareGPT form")],
    model: str = "tiny-assistant",
    heads: Annotated[list[str], typer.Option(help="kinds or folders; may be given several times")] = list(KINDS),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="may be given several times")] = [1, 8],  # noqa: B006
    seeds: int = 1000,
    max_new_tokens: int = 6,
    json: Path | None = None,
) -> None:
    llms = load_kinds(model, heads)
    texts = read_prompts(prompts, llms["plain"].codec, 40, max_tokens=200)
    requests = [
        llms["plain"].make_request(
            texts[seed % len(texts)], max_new_tokens, ignore_eos=True, seed=seed, temperature=temperature, **cut
        )
        for seed, temperature, cut in product(range(seeds), TEMPERATURES, CUTS)
    ]
    runs = [*product(["plain"], ["root"], batch[1:]), *product(heads, TREES, batch)]
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as bar:
        expected = decode(llms["plain"], "root", batch[0], requests, bar)
        for kind, tree, size in runs:
            got = decode(llms[kind], tree, size, requests, bar)
            same = sum(a.token_ids == b.token_ids for a, b in zip(got, expected, strict=True))
            steps = sum(output.steps for output in got)
            length = sum(output.step_tokens for output in got) / steps
            rows.append(
                {"heads": kind, "tree": tree, "batch": size, "identical": same, "requests": len(requests)}
                | {"acceptance length": length}
            )
            console.print(rows[-1])
    report(
        "sampled output against plain sampling with the same seed, float32",
        rows,
        json,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        temperatures=TEMPERATURES,
        cuts=CUTS,
        distinct=len({tuple(output.token_ids) for output in expected}),
    )
    raise typer.Exit(0 if all(row["identical"] == len(requests) for row in rows) else 1)


def decode(llm: LLM, tree: str, batch: int, requests: list[Request], bar: Progress) -> list[Output]:
    """All requests through one engine of `batch` rows."""
    trees = find_trees(PLAIN if tree == "root" else tree)
    engine = Engine(llm.base, llm.heads, trees, EngineConfig(max_batch=batch, max_length=512))
    outputs = [Output() for _ in requests]
    task = bar.add_task(f"{tree}, batch {batch}", total=sum(request.max_new_tokens for request in requests))
    for record in engine.run(requests, outputs):
        bar.advance(task, sum(map(len, record.emitted)))
    bar.remove_task(task)
    return outputs


if __name__ == "__main__":
    typer.run(main)
