"""Acceptance length of each kind of heads: tokens emitted per verification step, greedy, on held-out prompts.

python benchmarks/acceptance.py --prompts EVAL.jsonl.gz [--count 100] [--tree published-63] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from common import KINDS, load_kinds, report
from hydraspec.evaluate.suites import read_prompts

BATCH = 10  # what else is in the batch does not change an output


def main(
    prompts: Annotated[Path, typer.Option(help="conversations in ShareGPT form")],
    model: str = "tiny-assistant",
    count: int = 100,
    max_new_tokens: int = 64,
    tree: Annotated[list[str], typer.Option(help="may be given several times")] = ["published-63"],  # noqa: B006
    heads: Annotated[list[str] | None, typer.Option(help="may be given several times; left out: all shipped")] = None,
    json: Path | None = None,
) -> None:
    llms = load_kinds(model, heads)
    texts = read_prompts(prompts, llms["plain"].codec, count, max_tokens=400)
    rows: list[dict[str, Any]] = []
    for name in tree:
        first = 0.0
        for kind in heads or KINDS:
            outputs = []
            for start in range(0, count, BATCH):
                outputs += llms[kind].generate(texts[start : start + BATCH], max_new_tokens, tree=name)
            length = sum(o.step_tokens for o in outputs) / sum(o.steps for o in outputs)
            first = first or length
            tokens = sum(len(o.token_ids) for o in outputs)
            rows.append(
                {
                    "tree": name,
                    "heads": kind,
                    "acceptance length": length,
                    "against the first": length / first,
                    "tokens": tokens,
                }
            )
    report("acceptance length, greedy", rows, json, prompts=count, max_new_tokens=max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
