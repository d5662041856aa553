"""Tokens per second at batch 1, methods in turn in one run, and where the time of a step goes.

python benchmarks/speed.py --prompts EVAL.jsonl.gz [--count 40] [--tree small-16] [--rounds 3] [--json FILE]

Compared are our plain loop (the reference), `generate` of transformers on an untouched copy of the model, and our
loop with each kind of heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from common import KINDS, console, load_kinds, report
from hydraspec.evaluate.bench import compare, decode_with, decode_with_transformers
from hydraspec.evaluate.suites import read_prompts
from hydraspec.shipped import find_shipped
from hydraspec.tree import find_tree


def main(
    prompts: Annotated[Path, typer.Option(help="conversations in ShareGPT form")],
    model: str = "tiny-assistant",
    count: int = 40,
    max_new_tokens: int = 64,
    tree: Annotated[list[str], typer.Option(help="may be given several times")] = ["small-16"],  # noqa: B006
    rounds: int = 3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as cores")] = 0,
    json: Path | None = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    llms = load_kinds(model)
    texts = read_prompts(prompts, llms["plain"].codec, count, max_tokens=400)
    untouched = AutoModelForCausalLM.from_pretrained(find_shipped(model), dtype=torch.float32).eval()
    methods = {
        "plain": decode_with(llms["plain"], max_new_tokens),
        "transformers": decode_with_transformers(untouched, max_new_tokens),
    }
    for name in tree:
        for kind in KINDS:
            llm = type(llms[kind])(llms[kind].base, llms[kind].codec, llms[kind].heads, find_tree(name))
            methods[f"{kind}, {name}"] = decode_with(llm, max_new_tokens)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("methods in turn", total=count * rounds * len(methods))
        rows = compare(methods, texts, rounds, lambda: bar.advance(task))
    shown = [
        {
            "method": row.name,
            "tokens/s": round(row.tokens_per_second, 1),
            "acceptance length": row.acceptance_length,
            "speed-up": row.speedup,
            "identical": f"{row.identical_prompts}/{row.prompts}",
            "ms a step": row.step_milliseconds,
            **{stage: row.stage_shares.get(stage, 0.0) for stage in ("draft", "verify", "accept", "commit")},
        }
        for row in rows
    ]
    report("speed at batch 1, float32", shown, json, prompts=count, max_new_tokens=max_new_tokens, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
