"""What the benchmark scripts share: a base model with several kinds of heads, and results with the machine named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydraspec.cli.loading import silence_transformers
from hydraspec.evaluate.bench import describe_machine
from hydraspec.files import write_json
from hydraspec.heads.checkpoint import load_heads
from hydraspec.llm import LLM, load
from hydraspec.shipped import find_shipped_heads

KINDS = ("medusa", "hydra", "hydra++")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def load_kinds(model: str, heads: list[str] | None = None) -> dict[str, LLM]:
    """One base model under the name `plain`, and with each kind of heads under theirs."""
    silence_transformers()
    plain = load(model, device="cpu", dtype="float32")
    llms = {"plain": plain}
    for name in heads or KINDS:
        llms[name] = LLM(plain.base, plain.codec, load_heads(find_shipped_heads(name, model), plain.base))
    return llms


def report(title: str, rows: list[dict[str, Any]], file: Path | None, **facts: Any) -> None:
    """Print rows as a table, and write them as JSON with the machine and the facts of the run."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    machine = describe_machine()
    console.print(table)
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    if file is not None:
        write_json(file, {"title": title, "machine": machine, **facts, "rows": rows})
