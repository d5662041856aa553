"""Which architectures decode exactly: tiny random models of each, batches of three of different lengths.

python benchmarks/architectures.py [--only Gemma2] [--json FILE]

The oracle is greedy `generate` of transformers, one prompt at a time, in float32. Two kinds of heads draft: scripted
ones that know the answer, so that long paths are accepted and moved in the cache, and Hydra heads of random weights,
which are almost always wrong. Models that keep recurrent state or whose attention cannot follow a tree must be refused.
`distinct` is the least number of different tokens in an output: text that repeats one token would show no mistake.
Exit code 1: something was not as expected.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests

from tests.conftest import Script, ScriptedHeads, generate_plainly, make_model, random_prompts
from tests.tiny_models import EXACT, REFUSED

from common import console, report
from hydraspec.base.model import BaseModel
from hydraspec.decode.engine import Engine
from hydraspec.errors import UnsupportedModel
from hydraspec.heads import DraftHeads, new_heads
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request

NEW = 24
TREES = ("chain-4", "small-16", "published-63")
PROMPTS = random_prompts([5, 19, 11])


def main(
    only: Annotated[list[str] | None, typer.Option(help="an architecture's name; may be given several times")] = None,
    json: Path | None = None,
) -> None:
    torch.set_num_threads(1)  # tiny products
    chosen = {name: config for name, config in {**EXACT, **REFUSED}.items() if only is None or name in only}
    if not chosen:
        raise typer.BadParameter(f"no architecture is called so: choose among {', '.join([*EXACT, *REFUSED])}")
    rows = []
    with Progress(console=console, transient=True) as bar:
        for name, (model_type, options) in bar.track(chosen.items(), description="architectures"):
            model = make_model(model_type, **options)
            row = {"architecture": name, "type": model_type, "expected": "exact" if name in EXACT else "refused"}
            rows.append(row | check(model, name))
    rows.sort(key=lambda row: (row["expected"], row["result"] == row["expected"]))
    report("greedy output of tiny random models against transformers generate", rows, json, prompts=len(PROMPTS))
    wrong = [row["architecture"] for row in rows if row["result"] != row["expected"]]
    console.print(f"{len(rows) - len(wrong)} of {len(rows)} as expected{': not ' if wrong else ''}{', '.join(wrong)}")
    raise typer.Exit(1 if wrong else 0)


def check(model: Any, name: str) -> dict[str, Any]:
    """Whether a model decodes exactly with every tree and both kinds of heads, and how much that says."""
    row: dict[str, Any] = {"result": "exact", "accepted": 0.0, "distinct": 0, "why": ""}
    try:
        base = BaseModel(model, name)
    except UnsupportedModel as error:
        return row | {"result": "refused", "why": str(error)}
    except Exception as error:  # whatever the model's own code raises should have been a refusal
        return row | {"result": "error", "why": f"at load, {type(error).__name__}: {error}"}
    truth = [generate_plainly(model, prompt, NEW + 6) for prompt in PROMPTS]
    script = Script([prompt + new for prompt, new in zip(PROMPTS, truth, strict=True)])
    row["distinct"] = min(len(set(new[:NEW])) for new in truth)
    for kind, heads in (("scripted", ScriptedHeads(base, script)), ("hydra", make_random_heads(base))):
        for tree in TREES:
            try:
                outputs = decode(base, heads, tree)
            except Exception as error:
                return row | {"result": "error", "why": f"{kind}, {tree}, {type(error).__name__}: {error}"}
            same = sum(o.token_ids == new[:NEW] for o, new in zip(outputs, truth, strict=True))
            if same < len(PROMPTS):
                return row | {
                    "result": "differs",
                    "why": f"{kind}, {tree}: {same} of {len(PROMPTS)} outputs are the same",
                }
            row["accepted"] = max(row["accepted"], *(output.acceptance_length for output in outputs))
    return row


def make_random_heads(base: BaseModel) -> DraftHeads:
    """Hydra heads whose blocks change what they read."""
    heads = new_heads(base, "hydra")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return heads.prepare(base)


def decode(base: BaseModel, heads: DraftHeads, tree: str) -> list[Output]:
    outputs = [Output() for _ in PROMPTS]
    requests = [Request(tuple(prompt), NEW) for prompt in PROMPTS]
    for _ in Engine(base, heads, find_tree(tree)).run(requests, outputs):
        pass
    return outputs


if __name__ == "__main__":
    typer.run(main)
