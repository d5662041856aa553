"""The paper's design space on one base model: every step from Medusa to Hydra++ trained on the same number of tokens.

python recipes/ablation.py train   --data TRAIN --eval-data EVAL --out FOLDER [--tokens 1500000] [--jobs 2]
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
PREDICTED = "published-63"
TREES = ("chain-4", "small-8", "small-16")  # among which each row's best is looked for

app = typer.Typer(add_completion=False)


def name_folder(out: Path, row: str) -> Path:
    """Where a row's heads are."""
    return out / "-".join("".join(c if c.isalnum() else " " for c in row.replace("++", "pp")).lower().split())


def make_words(row: str, out: Path, base: str, data: str, eval_data: str, tokens: int) -> list[str]:
    """The command that trains a row."""
    options = {**COMMON, **ROWS[row], "base": base, "data": data, "eval-data": eval_data, "max-tokens": tokens}
    words = ["train", "--out", str(name_folder(out, row))]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [sys.executable, "-m", "hydraspec.cli.main", *words]


@app.command()
def train(
    data: Annotated[str, typer.Option(help="conversations to train on")],
    eval_data: Annotated[str, typer.Option(help="held-out conversations")],
    out: Annotated[Path, typer.Option(help="folder for the heads of all rows")],
    base: str = "tiny-assistant",
    tokens: Annotated[int, typer.Option(help="to train each row on")] = 1_500_000,
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
        words = make_words(row, out, base, data, eval_data, tokens)
        if list(folder.glob("training/step-*")):
            words.append("--resume")
        start = time.perf_counter()
        with (out / f"{folder.name}.log").open("a") as log:
            done = subprocess.run(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads})
        return f"{row}: exit code {done.returncode} after {(time.perf_counter() - start) / 60:.1f} min"

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(work, only or ROWS):
            print(line, flush=True)


if __name__ == "__main__":
    app()
