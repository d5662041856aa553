"""What a forward costs on a CPU beyond its matrix products, and what a tree costs beyond a plain step.

python benchmarks/cpu_step.py [--shape 134m] [--dtype float32] [--rounds 30] [--json FILE]

A Llama with random weights; forwards of 1 to 64 nodes over a text of 256 tokens, at batch 1 and more, through the fast
path and through the model class of transformers, and the matrix products of the fast path alone. All of them are taken
in turn, medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common import console, report
from hydraspec.base.fused import FusedLlama
from hydraspec.base.model import BaseModel
from hydraspec.tree import PRESETS, Tree

SHAPES = {
    "134m": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "small": {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4},
}
VOCABULARY = {"134m": 32000, "small": 4096}
NODES = (1, 4, 8, 16, 32, 64)
TEXT = 256


def main(
    shape: str = "134m",
    dtype: str = "float32",
    batch: Annotated[int, typer.Option(help="sequences")] = 1,
    rounds: Annotated[int, typer.Option(help="how often each forward is timed", min=3)] = 30,
    json: Path | None = None,
) -> None:
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY[shape], max_position_embeddings=1024, **SHAPES[shape])
    base = BaseModel(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), shape)
    fused = base.fused
    if fused is None:
        console.print("this machine, or this shape, has no fast path")
        raise typer.Exit(1)
    cache = base.new_cache(batch, TEXT + max(NODES))
    base.prefill(torch.randint(0, base.vocab_size, (batch, TEXT)), [TEXT] * batch, cache)
    methods: dict[tuple[str, int], Callable[[], object]] = {}
    for nodes in NODES:
        tree = PRESETS["root"] if nodes == 1 else Tree([[rank] for rank in range(nodes - 1)], f"star-{nodes}")
        tokens = torch.randint(0, base.vocab_size, (batch, nodes))

        def verify(fast: FusedLlama | None, tokens: Tensor = tokens, tree: Tree = tree) -> None:
            base.fused = fast
            base.verify(tokens, tree, cache)

        rows = torch.randn(batch * nodes, base.hidden_size, dtype=base.dtype)
        wide = torch.randn(batch * nodes, config.intermediate_size, dtype=base.dtype)
        methods["fast path", nodes] = lambda verify=verify: verify(fused)
        methods["transformers' class", nodes] = lambda verify=verify: verify(None)
        methods["products", nodes] = lambda rows=rows, wide=wide: multiply(fused, rows, wide)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in methods}
    with Progress(console=console, transient=True) as bar, torch.inference_mode():
        for _ in bar.track(range(rounds), description="forwards in turn"):
            for key, method in methods.items():
                method()  # brings its weights back into the processor's caches, as the steps of a text do
                start = time.perf_counter()
                method()
                seconds[key].append(time.perf_counter() - start)
    base.fused = fused
    median = {key: 1e3 * statistics.median(times) for key, times in seconds.items()}
    plain = median["fast path", 1]
    rows_out: list[dict[str, Any]] = []
    for nodes in NODES:
        row: dict[str, Any] = {"nodes": nodes} | {name: median[name, nodes] for name, n in methods if n == nodes}
        row["of a plain step"] = median["fast path", nodes] / plain
        row["overhead of a plain step"] = (median["fast path", nodes] - median["products", nodes]) / plain
        rows_out.append(row)
    report(
        f"milliseconds a forward, {shape}, {dtype}, batch {batch}, {TEXT} tokens of text",
        rows_out,
        json,
        parameters=sum(p.numel() for p in base.model.parameters()),
        copies_bytes=fused.num_bytes,
        rounds=rounds,
    )


def multiply(fused: FusedLlama, rows: Tensor, wide: Tensor) -> None:
    """The matrix products of one forward, without anything between them."""
    for layer in fused.layers:
        layer.query_key_value(rows)
        layer.mix(rows)
        layer.gate_up(rows)
        layer.down(wide)
    fused.project(rows)


if __name__ == "__main__":
    typer.run(main)
