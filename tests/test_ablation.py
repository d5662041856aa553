"""The ablation's commands and its page."""

import runpy
from pathlib import Path

import pytest

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "ablation.py"))


def measure(row, real):
    return {
        "row": row,
        "parameters": 1_500_000,
        "top1": [0.5, 0.4],
        "predicted": real * 1.001,
        "real": real,
        "tokens": "10 tokens of a file",
        "draft_milliseconds": 1.0,
        "best_tree": "chain-4",
        "tokens_per_second": 300.0,
        "against_plain": 1.5,
    }


def test_the_page_says_where_a_step_does_not_help():
    facts = {"machine": {"cpu": "a processor", "threads": 2}, "base": "mine", "prompts": 5, "tree": "published-63"}
    page = RECIPE["write_page"]([measure("Medusa", 2.0), measure("Hydra", 2.5), measure("Hydra + noise", 2.4)], facts)
    medusa, hydra, noise = page.splitlines()[-3:]
    assert "| 1.50 M | 50% 40% | 2.002 | 2.000 | +0.10% |  |" in medusa
    assert "+25.0% on Medusa |" in hydra
    assert "-4.0% on Hydra: does not help here" in noise


@pytest.mark.parametrize("row", [*RECIPE["ROWS"], RECIPE["OWN_ANSWERS"]])
def test_every_row_is_a_command_that_train_understands(row):
    from typer.main import get_command

    from hydraspec.cli.main import app

    words = RECIPE["make_words"](row, Path("out"), "base", "data", "eval", 1000)
    command = get_command(app).commands["train"]  # type: ignore[attr-defined]
    with command.make_context("train", words[words.index("train") + 1 :]) as context:
        assert context.params["max_tokens"] == 1000
        assert context.params["out"].parent == Path("out")
