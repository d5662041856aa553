"""Is greedy output the base model's own? Every kind of heads, several trees, batch 1 and a ragged batch of 4.

python benchmarks/exactness.py --prompts EVAL.jsonl.gz [--count 200] [--json FILE]

The oracle is `generate` of transformers on the unmodified model, one prompt at a time, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from common import KINDS, console, load_kinds, report
from hydraspec.evaluate.peers import decode_with_transformers
from hydraspec.evaluate.suites import read_prompts
from hydraspec.shipped import find_shipped

TREES = ("chain-4", "small-16", "published-63")


def main(
    prompts: Annotated[Path, typer.Option(help="conversations in ShareGPT form")],
    model: str = "tiny-assistant",
    heads: Annotated[list[str] | None, typer.Option(help="kinds or folders; left out: all shipped, and plain")] = None,
    count: int = 200,
    max_new_tokens: int = 48,
    json: Path | None = None,
) -> None:
    llms = load_kinds(model, heads)
    texts = read_prompts(prompts, llms["plain"].codec, count, max_tokens=400)
    untouched = AutoModelForCausalLM.from_pretrained(find_shipped(model), dtype=torch.float32).eval()
    oracle = decode_with_transformers(untouched, max_new_tokens, llms["plain"].base.eos_token_ids)
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as bar:
        expected = [oracle([text]).token_ids[0] for text in bar.track(texts, description="transformers")]
        for kind in heads or ("plain", *KINDS):
            for tree in TREES if kind != "plain" else ("root",):
                for batch in (1, 4):
                    same = 0
                    for start in bar.track(range(0, count, batch), description=f"{kind}, {tree}, batch {batch}"):
                        outputs = llms[kind].generate(texts[start : start + batch], max_new_tokens, tree=tree)
                        same += sum(o.token_ids == e for o, e in zip(outputs, expected[start:], strict=False))
                    rows.append({"heads": kind, "tree": tree, "batch": batch, "identical": same, "prompts": count})
    tokens = sum(map(len, expected))
    report(
        "greedy output against transformers generate, float32", rows, json, tokens=tokens, max_new_tokens=max_new_tokens
    )
    raise typer.Exit(0 if all(row["identical"] == count for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
