"""`hydraspec demo`: the shipped model, plainly and with each kind of heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydraspec.cli.options import TreeName

if TYPE_CHECKING:
    from rich.console import Console

    from hydraspec.evaluate.bench import Row
    from hydraspec.llm import LLM

LABELS = {"medusa": "Medusa", "hydra": "Hydra", "hydra++": "Hydra++"}
STYLES = ("bold cyan", "bold yellow")


def demo(
    tree: TreeName = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens for each prompt at most", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="how often each prompt is timed with each method", min=1)] = 3,
    json: Annotated[Path | None, typer.Option(help="write the table to this file as well")] = None,
) -> None:
    """Watch Hydra decode, then compare it with plain decoding: same tokens, less time."""
    from rich.console import Console

    show_demo(Console(highlight=False), tree, max_new_tokens, rounds, json)


def show_demo(console: Console, tree: str | None, max_new_tokens: int, rounds: int, json: Path | None) -> None:
    """The demo on a given console; see `demo`."""
    from rich.progress import Progress

    from hydraspec.cli.loading import load_quietly
    from hydraspec.evaluate.bench import Method, compare, count_runs, decode_with, describe_machine, make_batches
    from hydraspec.evaluate.suites import DEMO_PROMPTS
    from hydraspec.files import write_json
    from hydraspec.heads.checkpoint import load_heads
    from hydraspec.llm import LLM, PLAIN
    from hydraspec.shipped import DEMO_MODEL, find_shipped_heads

    best = load_quietly(DEMO_MODEL, "hydra++", tree or "small-16", "cpu", "float32")
    machine = describe_machine()
    console.print(f"{DEMO_MODEL}, float32, {machine['threads']} threads on {machine['cpu']}; tree {best.tree.name}\n")
    stream_in_colours(best, DEMO_PROMPTS[0], max_new_tokens, console)
    methods = [Method("plain", decode_with(LLM(best.base, best.codec, None, PLAIN), max_new_tokens))]
    for kind, label in LABELS.items():
        heads = load_heads(find_shipped_heads(kind, DEMO_MODEL), best.base)
        llm = LLM(best.base, best.codec, heads, best.tree)
        methods.append(Method(label, decode_with(llm, max_new_tokens)))
    prompts = [best.codec.encode(prompt) for prompt in DEMO_PROMPTS]
    with Progress(console=console, transient=True) as bar:
        runs = count_runs(methods, prompts, [1], rounds)
        task = bar.add_task(f"{len(prompts)} prompts, methods in turn", total=runs)
        rows = compare(methods, make_batches(prompts, 1), rounds, lambda: bar.advance(task))
    print_rows(rows, console)
    if json is not None:
        write_json(json, {"machine": machine, "tree": best.tree.name, "rows": [vars(row) for row in rows]})
        console.print(f"written to {json}")


def stream_in_colours(llm: LLM, prompt: str, max_new_tokens: int, console: Console) -> None:
    """Print one answer as it comes, the tokens of each step in one of two colours in turn."""
    from hydraspec.types import Output

    console.print(f"[dim]prompt:[/] {prompt}")
    console.print("[dim]answer:[/] ", end="")
    request, output = llm.make_request(prompt, max_new_tokens), Output()
    for number, (_, piece) in enumerate(llm.stream_steps(request, output)):
        console.print(piece, end="", style=STYLES[number % 2], markup=False, soft_wrap=True)
    console.print(
        f"\n[dim]{len(output.token_ids)} tokens in {output.steps} steps, each in one colour: "
        f"{output.acceptance_length:.2f} tokens a step[/]\n"
    )


def print_rows(rows: list[Row], console: Console) -> None:
    """The comparison as a table."""
    from rich.table import Table

    table = Table("method", "tokens/s", "acceptance length", "speed-up", "identical")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name,
            f"{row.tokens_per_second:.0f}",
            f"{row.acceptance_length:.2f}",
            f"{row.speedup:.2f}x",
            "yes" if row.identical else f"no ({row.identical_prompts} of {row.prompts})",
        )
    console.print(table)
    console.print("[dim]acceptance length: tokens emitted per forward pass of the base model[/]")
