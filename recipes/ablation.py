"""The paper's design space on one base model: every step from Medusa to Hydra++ trained on the same number of tokens.

python recipes/ablation.py train   --data TRAIN --eval-data EVAL --out FOLDER [--tokens 800000] [--jobs 2]
python recipes/ablation.py measure --prompts EVAL --out FOLDER --results benchmarks/results/ablation

`train` trains what is not there yet and resumes what was stopped; `measure` writes RESULTS.md, .json and .png.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

# Each row changes one thing of an earlier one. Medusa has its own vocabulary layers, as published; the others share the
# base's, which costs a small model least. One learning rate for all, found for Hydra heads.
COMMON = {
    "draft-vocabulary": 2048,
    "batch-tokens": 2048,
    "micro-tokens": 2048,
    "learning-rate": 3e-3,
    "final-learning-rate": 0.05,
    "warmup-steps": 50,
    "dropout": 0.0,
    "checkpoint-minutes": 3,
}
HYDRA = {"recipe": "hydra", "tied-vocabulary": True}
TEACHER = {"teacher-weight": 1.0, "data-weight": 0.0}
PREFIX = {"recipe": "hydra++", "tied-vocabulary": True}
ROWS: dict[str, dict[str, Any]] = {
    "Medusa": {"recipe": "medusa"},
    "Hydra": HYDRA,
    "Hydra + noise": {**HYDRA, "noise": 5.0},
    "Hydra + teacher loss": {**HYDRA, **TEACHER},
    "+ prefix attention": {**PREFIX, "num-layers": 1},
    "+ 4 layers = Hydra++": {**PREFIX, "num-layers": 4},
    "Hydra++, shared blocks": {**PREFIX, "num-layers": 4, "shared-blocks": True},
    "EAGLE-style": {"recipe": "eagle"},
}
OWN_ANSWERS = (
    "Hydra++, the base's own answers"  # as the row of Hydra++, on what `hydraspec regenerate` made of the data
)
PREDICTED = "published-63"
TREES = ("chain-4", "small-8", "small-16")  # among which each row's best is looked for

app = typer.Typer(add_completion=False)


def name_folder(out: Path, row: str) -> Path:
    """Where a row's heads are."""
    return out / "-".join("".join(c if c.isalnum() else " " for c in row.replace("++", "pp")).lower().split())


def make_words(row: str, out: Path, base: str, data: str, eval_data: str, tokens: int) -> list[str]:
    """The command that trains a row."""
    options = {
        **COMMON,
        **ROWS.get(row, ROWS["+ 4 layers = Hydra++"]),
        "base": base,
        "data": data,
        "eval-data": eval_data,
        "max-tokens": tokens,
    }
    words = ["train", "--out", str(name_folder(out, row))]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [sys.executable, "-m", "hydraspec.cli.main", *words]


@app.command()
def train(
    data: Annotated[str, typer.Option(help="conversations to train on")],
    eval_data: Annotated[str, typer.Option(help="held-out conversations")],
    out: Annotated[Path, typer.Option(help="folder for the heads of all rows")],
    own_answers: Annotated[str | None, typer.Option(help="the same data regenerated: one more row")] = None,
    base: str = "tiny-assistant",
    tokens: Annotated[int, typer.Option(help="to train each row on")] = 800_000,
    jobs: Annotated[int, typer.Option(help="rows trained at once, sharing the cores")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="a row by name; may be given several times")] = None,
) -> None:
    """Train every row that is not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))

    def work(row: str) -> str:
        folder = name_folder(out, row)
        if (folder / "config.json").is_file() and not (folder / "training").exists():
            return f"{row}: there already"
        source = own_answers if row == OWN_ANSWERS and own_answers else data
        words = make_words(row, out, base, source, eval_data, tokens)
        if list(folder.glob("training/step-*")):
            words.append("--resume")
        start = time.perf_counter()
        with (out / f"{folder.name}.log").open("a") as log:
            done = subprocess.run(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads})
        return f"{row}: exit code {done.returncode} after {(time.perf_counter() - start) / 60:.1f} min"

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(work, only or [*ROWS, *([OWN_ANSWERS] if own_answers else [])]):
            print(line, flush=True)


@app.command()
def measure(
    prompts: Annotated[Path, typer.Option(help="held-out conversations to decode")],
    out: Annotated[Path, typer.Option(help="the folder that `train` filled")],
    results: Annotated[Path, typer.Option(help="written with .md, .json and .png behind it")],
    base: str = "tiny-assistant",
    count: Annotated[int, typer.Option(help="prompts for the acceptance lengths")] = 100,
    timed: Annotated[int, typer.Option(help="prompts for the speeds")] = 15,
    max_new_tokens: int = 64,
) -> None:
    """Measure every row that is trained: acceptance predicted and real, size, draft time, speed at its best tree."""
    from hydraspec.cli.loading import settle_threads, silence_transformers
    from hydraspec.evaluate.bench import Method as Way
    from hydraspec.evaluate.bench import compare, decode_with, describe_machine, make_batches
    from hydraspec.evaluate.suites import read_prompts
    from hydraspec.files import write_json, write_whole
    from hydraspec.heads import build_heads
    from hydraspec.heads.checkpoint import load_heads, read_config
    from hydraspec.llm import LLM, load
    from hydraspec.train.validation import compare_acceptance, write_own_texts
    from hydraspec.tree import find_tree, find_trees

    silence_transformers()
    settle_threads()
    llm = load(base, device="cpu", dtype="float32")
    texts = read_prompts(prompts, llm.codec, count, max_tokens=400)
    own = write_own_texts(llm.base, texts, max_new_tokens)
    plain, table = Way("plain", decode_with(LLM(llm.base, llm.codec, None), max_new_tokens)), []
    batches = make_batches(texts[:timed], 1)
    for row in (*ROWS, OWN_ANSWERS):
        folder = name_folder(out, row)
        if not folder.is_dir():
            continue
        config, provenance = read_config(folder)
        ready = load_heads(str(folder), llm.base)
        tree = find_tree(PREDICTED).cut(config.num_heads)
        (found,) = compare_acceptance(llm.base, ready, own, [tree], max_new_tokens)
        own_llms = [LLM(llm.base, llm.codec, ready, find_trees(name)) for name in TREES]
        ways = [Way(own.tree.name, decode_with(own, max_new_tokens)) for own in own_llms]
        speeds = {row.name: row for row in compare([plain, *ways], batches, rounds=3)}
        best = max((speeds[name] for name in TREES), key=lambda row: row.tokens_per_second)
        draft = speeds["small-16"]
        table.append(
            {
                "row": row,
                "parameters": sum(p.numel() for p in build_heads(config).parameters()),
                "top1": provenance.measured["top1"],
                "predicted": found.predicted.acceptance_length,
                "real": found.real,
                "same_texts": found.same_texts,
                "tokens": provenance.data,
                "draft_milliseconds": (draft.step_milliseconds or 0) * draft.stage_shares["draft"],
                "best_tree": best.name,
                "tokens_per_second": best.tokens_per_second,
                "plain_tokens_per_second": speeds["plain"].tokens_per_second,
                "against_plain": best.speedup,
                "identical": best.identical,
            }
        )
        lengths = f"predicted {found.predicted.acceptance_length:.3f}, real {found.real:.3f}"
        print(f"{row}: {lengths}, {best.speedup:.2f}x with {best.name}", flush=True)
    facts = {"machine": describe_machine(), "base": base, "prompts": count, "tree": PREDICTED}
    write_json(results.with_suffix(".json"), {**facts, "common": COMMON, "rows": table})
    page = write_page(table, facts)
    write_whole(results.with_suffix(".md"), lambda file: file.write_text(page, encoding="utf-8"))
    draw(table, results.with_suffix(".png"))


def write_page(table: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table as Markdown, with what each step changed."""
    real = {entry["row"]: entry["real"] for entry in table}
    before = {
        "Hydra": "Medusa",
        "Hydra + noise": "Hydra",
        "Hydra + teacher loss": "Hydra",
        "+ prefix attention": "Hydra + teacher loss",
        "+ 4 layers = Hydra++": "+ prefix attention",
        "Hydra++, shared blocks": "+ 4 layers = Hydra++",
        "EAGLE-style": "+ 4 layers = Hydra++",
        OWN_ANSWERS: "+ 4 layers = Hydra++",
    }
    lines = [
        "# From Medusa to Hydra++ on one base model",
        "",
        f"Base {facts['base']}; each row was trained on as many tokens (the first: {table[0]['tokens']}) with the same",
        f"learning rate, batch and draft vocabulary of {COMMON['draft-vocabulary']}.",
        f"Acceptance: {facts['prompts']} held-out prompts, greedy, float32, with the tree {facts['tree']}.",
        "",
        f"Speeds: {facts['machine']['cpu']}, {facts['machine']['threads']} threads, batch 1, each in turn with plain",
        f"decoding, against which it is given. Draft: with small-16. Best tree: of {', '.join(TREES)}.",
        "",
        "| row | parameters | top-1 by head | predicted | real | error | against | draft ms | best tree | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in table:
        row, error = entry["row"], entry["predicted"] / entry["real"] - 1
        verdict, other = "", before.get(row)
        if other in real:
            change = entry["real"] / real[other] - 1
            verdict = f"{change:+.1%} on {other}" + (": does not help here" if change <= 0 else "")
        lines.append(
            f"| {row} | {entry['parameters'] / 1e6:.2f} M | {' '.join(f'{x:.0%}' for x in entry['top1'])} "
            f"| {entry['predicted']:.3f} | {entry['real']:.3f} | {error:+.2%} | {verdict} "
            f"| {entry['draft_milliseconds']:.2f} | {entry['best_tree']} "
            f"| {entry['tokens_per_second']:.0f} ({entry['against_plain']:.2f}x) |"
        )
    return "\n".join(lines) + "\n"


def draw(table: list[dict[str, Any]], file: Path) -> None:
    """Acceptance lengths as bars, predicted beside real."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    places = range(len(table))
    axes.barh([p - 0.2 for p in places], [entry["real"] for entry in table], 0.4, label="real")
    axes.barh([p + 0.2 for p in places], [entry["predicted"] for entry in table], 0.4, label="predicted")
    axes.set_yticks(list(places), [entry["row"] for entry in table])
    axes.invert_yaxis()
    axes.set_xlabel("tokens a step, greedy, 63 nodes")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    app()
