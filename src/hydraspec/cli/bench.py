"""`hydraspec bench`: a model with its heads against plain decoding and the methods of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydraspec.cli.options import Device, Dtype, Model
from hydraspec.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from hydraspec.evaluate.bench import Method, Row, Skipped
    from hydraspec.llm import LLM

FILE_PROMPTS = 40  # of a prompt file, where no count is given
STAGES = ("draft", "verify", "accept", "commit")


def bench(
    model: Model,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="a folder, a hub id, or the kind shipped with MODEL; may be given several times"),
    ] = None,
    tree: Annotated[list[str] | None, typer.Option(help="as in generate; may be given several times")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, plain or .gz: strings, or objects with prompt, turns (MT-Bench) or conversations "
            "(ShareGPT); left out: twelve prompts for the shipped model"
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="prompts to take; left out: 40 of a file", min=1)] = None,
    peers: Annotated[
        str, typer.Option(help="plain, hf, assisted, lookup: the last three are transformers'; plain is always run")
    ] = "plain,hf,lookup",
    assistant: Annotated[str | None, typer.Option(help="the small model that drafts for the peer assisted")] = None,
    batch: Annotated[str, typer.Option(help="how many prompts are decoded at once, such as 1,4,16")] = "1",
    max_new_tokens: Annotated[int, typer.Option(help="tokens for each prompt at most", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="how often each batch is timed with each method", min=1)] = 3,
    device: Device = None,
    dtype: Dtype = None,
    forward: Annotated[
        str, typer.Option(help="our forward passes: eager, static, compile, or auto: by device")
    ] = "auto",
    json: Annotated[Path | None, typer.Option(help="write machine and table to this file as well")] = None,
) -> None:
    """Measure the speed of MODEL with HEADS: methods in turn on the same prompts, medians of several rounds."""
    sizes, names = _parse_sizes(batch), [name.strip() for name in peers.split(",") if name.strip()]
    if tree and not heads:
        raise RequestError("a tree needs heads to fill it: name them with --heads")
    from rich.console import Console
    from rich.progress import Progress

    from hydraspec.cli.loading import settle_threads, show_log, silence_transformers
    from hydraspec.config import EngineConfig
    from hydraspec.evaluate.bench import compare_sizes, count_runs, describe_machine
    from hydraspec.evaluate.peers import check_peers, make_peers
    from hydraspec.evaluate.suites import find_prompts
    from hydraspec.files import write_json
    from hydraspec.llm import load

    check_peers(names, assistant)
    silence_transformers()
    settle_threads()
    if forward == "compile":
        show_log()
    llm = load(model, device=device, dtype=dtype, engine_config=EngineConfig(forward=forward))
    context = llm.base.max_length
    if context is not None and max_new_tokens >= context:
        raise RequestError(f"{max_new_tokens} new tokens leave no room for a prompt in a context of {context}")
    texts = find_prompts(prompts, llm.codec, count, FILE_PROMPTS, context and context - max_new_tokens)
    methods = make_peers(llm, names, max_new_tokens, max(sizes), assistant)
    methods += _make_own(llm, model, heads or [], tree or [None], max_new_tokens, max(sizes))
    runs = count_runs(methods, texts, sizes, rounds)
    facts = {
        "model": model,
        "device": str(llm.base.device),
        "dtype": str(llm.base.dtype).removeprefix("torch."),
        "forward": forward,
        "prompts": len(texts),
        "prompt_tokens": sum(map(len, texts)),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
    }
    machine, console = describe_machine(), Console(highlight=False)
    _print_plan(facts, machine, [method.name for method in methods], sizes, runs, console)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("methods in turn", total=runs)
        rows = compare_sizes(methods, texts, sizes, rounds, lambda: bar.advance(task))
    print_tables(rows, console)
    if json is not None:
        write_json(json, {"machine": machine, **facts, "rows": [vars(row) for row in rows]})
        console.print(f"written to {json}")


def _print_plan(
    facts: dict[str, Any], machine: dict[str, Any], names: list[str], sizes: list[int], runs: int, console: Console
) -> None:
    """Where it runs, and what it will cost."""
    where = machine["gpu"] if facts["device"] != "cpu" else f"{machine['cpu']}, {_count(machine['threads'], 'thread')}"
    length = facts["prompt_tokens"] / facts["prompts"]
    console.print(
        f"{facts['model']} in {facts['dtype']} on {where}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}"
    )
    console.print(
        f"{facts['prompts']} prompts of {length:.0f} tokens on average, {facts['max_new_tokens']} new at most"
    )
    shape = f"batches of {', '.join(map(str, sizes))}, {_count(facts['rounds'], 'round')}"
    console.print(f"{_count(len(names), 'method')} in turn, {shape}: {runs} runs with warm-ups\n")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _parse_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"--batch reads sizes such as 1,4,16, not {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _make_own(
    llm: LLM, model: str, heads: list[str], trees: Sequence[str | None], max_new_tokens: int, largest_batch: int
) -> list[Method]:
    """Our loop with each set of heads and each tree."""
    from hydraspec.evaluate.bench import Method, decode_with
    from hydraspec.heads.checkpoint import load_heads
    from hydraspec.llm import LLM
    from hydraspec.shipped import find_shipped_heads
    from hydraspec.tree import find_trees

    methods = []
    for name in dict.fromkeys(heads):
        loaded = load_heads(find_shipped_heads(name, model), llm.base)
        for tree in dict.fromkeys(trees):
            own = LLM(llm.base, llm.codec, loaded, None if tree is None else find_trees(tree), llm.engine_config)
            label = name if tree is None else f"{name}, {own.tree.name}"
            methods.append(Method(label, decode_with(own, max_new_tokens, largest_batch)))
    return methods


def print_tables(rows: list[Row | Skipped], console: Console) -> None:
    """Speeds, then where the steps' time goes."""
    from rich.table import Table

    from hydraspec.evaluate.bench import Skipped

    speeds = Table("batch", "method", "tokens/s", "speed-up", "acceptance length", "identical")
    steps = Table("batch", "method", "ms a step", *STAGES)
    for table in (speeds, steps):
        for column in (table.columns[0], *table.columns[2:]):
            column.justify = "right"
    last = None
    for row in rows:
        for table in (speeds, steps):
            if last not in (None, row.batch):
                table.add_section()
        last = row.batch
        if isinstance(row, Skipped):
            speeds.add_row(str(row.batch), row.name, *"----")
            continue
        speeds.add_row(
            str(row.batch),
            row.name,
            f"{row.tokens_per_second:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.acceptance_length:.2f}",
            f"{row.identical_prompts}/{row.prompts}",
        )
        if row.step_milliseconds is not None:
            shares = [f"{row.stage_shares[stage]:.0%}" for stage in STAGES]
            steps.add_row(str(row.batch), row.name, f"{row.step_milliseconds:.1f}", *shares)
    console.print(speeds)
    console.print(
        "[dim]speed-up and identical outputs: against plain (our loop) at the same batch size; whole calls are timed, "
        "prefill included;\nacceptance length: tokens of a sequence per forward pass of the base model[/]"
    )
    for name, reason in {row.name: row.skipped for row in rows if isinstance(row, Skipped)}.items():
        console.print(f"[dim]-: {name} {reason}[/]")
    console.print(steps)
