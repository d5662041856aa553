"""A small run on a tiny base model, put together without files of text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.train.batch import Example
from hydraspec.train.prepare import Prepared, Run, make_heads
from hydraspec.train.recipes import resolve_recipe
from hydraspec.train.store import TokenStore
from tests.conftest import VOCABULARY, make_model

CONFIG = TrainingConfig(
    recipe="hydra++",
    num_heads=2,
    num_layers=2,
    dropout=0.0,
    tied_vocabulary=True,
    max_length=32,
    batch_tokens=128,
    micro_tokens=64,
    epochs=2,
    warmup_steps=2,
    learning_rate=1e-2,
    autocast="float32",
    held_out=0.0,
)


def make_store(folder: Path, count: int = 60) -> TokenStore:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in torch.randint(6, 33, (count,), generator=generator).tolist():
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        examples.append(Example(ids, [place % 9 > 2 for place in range(length)]))
    return TokenStore.build(folder, examples, VOCABULARY)


def prepare_small(
    out: Path,
    base: BaseModel | None = None,
    resume: bool = False,
    hidden_states: Path | None = None,
    **options: object,
) -> Prepared:
    """What `hydraspec.train.prepare.prepare` makes, for a tiny random Llama and random conversations."""
    config = resolve_recipe(dataclasses.replace(CONFIG, **options))
    base = base or BaseModel(make_model("llama"), "tiny")
    tokens = out / "training" / "tokens"
    store = TokenStore(tokens) if tokens.exists() else make_store(tokens)
    torch.manual_seed(config.seed)
    heads = make_heads(base, store, config)
    accelerator = Accelerator(cpu=True)
    run = Run("tiny", "talks.jsonl", out, config, hidden_states=hidden_states, resume=resume)
    empty = TokenStore.build(out / "none", [], VOCABULARY)
    return Prepared(run, base, None, heads, store, empty, accelerator, Console(quiet=True))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def small_base() -> BaseModel:
    return BaseModel(make_model("llama"), "tiny")
