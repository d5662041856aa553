"""What a training run is made of, checked and loaded: base model, data, heads, hidden states."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.heads import new_heads
from hydraspec.heads.protocol import DraftHeads
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.checkpoint import has_checkpoints
from hydraspec.train.forward import wants_bfloat16
from hydraspec.train.hidden_states import HiddenStates, OnlineStates
from hydraspec.train.loop import Data, HiddenSource, Trainer
from hydraspec.train.packing import RowPlan, load_batch
from hydraspec.train.recipes import resolve_recipe
from hydraspec.train.states_writer import count_bytes, write_hidden_states
from hydraspec.train.store import TokenStore, prepare_stores

STATE_FOLDER = "training"  # beside the heads, until the run is complete


@dataclass(frozen=True)
class Run:
    """What is trained from what, to where."""

    base: str
    data: str
    out: Path
    config: TrainingConfig
    eval_data: str | None = None
    hidden_states: Path | None = None  # folder for the base model's hidden states: written if absent, then read
    resume: bool = False
    trackers: tuple[str, ...] = ()  # tensorboard, wandb
    device: str | None = None

    @property
    def state(self) -> Path:
        """The folder of tokens and checkpoints."""
        return self.out / STATE_FOLDER


@dataclass(frozen=True)
class Prepared:
    """Everything that is loaded before the first step."""

    run: Run
    base: BaseModel
    codec: TextCodec
    heads: DraftHeads
    store: TokenStore
    held_out: TokenStore
    accelerator: Accelerator
    console: Console  # silent but in the first process


def check(run: Run) -> Run:
    """The run with its recipe filled in; refuses what can be seen to be wrong before anything is loaded."""
    config = resolve_recipe(run.config)
    started = has_checkpoints(run.state)
    if run.out.exists() and not run.out.is_dir():
        raise HydraspecError(f"{run.out} is a file: name a folder for the heads")
    if run.resume and not started and (run.out / "config.json").is_file():
        raise HydraspecError(f"the run in {run.out} is complete: there is nothing to resume")
    if run.resume and not started:
        raise HydraspecError(f"{run.out} holds no checkpoint to resume: leave --resume out, or name the run's folder")
    others = [p for p in run.out.iterdir() if p.name != STATE_FOLDER] if run.out.is_dir() else []
    if started and not run.resume:
        raise HydraspecError(f"{run.out} holds a run that was stopped: go on with --resume, or name another folder")
    if others and not run.resume:
        raise HydraspecError(f"{run.out} is there already and not empty: name another folder, or remove it")
    home = next(folder for folder in (run.out.absolute(), *run.out.absolute().parents) if folder.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise HydraspecError(f"{run.out} cannot be written: {home} is no folder that may be written to")
    return Run(**{**vars(run), "config": config})


def prepare(run: Run, console: Console) -> Prepared:
    """Load the base model, tokenise the data, make the heads."""
    config = run.config
    device = torch.device(run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        log_with=list(run.trackers) or None,
        project_dir=str(run.out / "logs"),
    )
    if run.trackers:
        accelerator.init_trackers("hydraspec", {k: v for k, v in config.to_dict().items() if not isinstance(v, tuple)})
    silent = console if accelerator.is_main_process else Console(quiet=True)
    path = find_shipped(run.base)
    device = accelerator.device if accelerator.num_processes > 1 else device
    # Of a float32 base on a CPU with bfloat16 products only the rounding differs, and heads see rounded states anyhow.
    half = torch.bfloat16 if device.type == "cpu" and wants_bfloat16(device, config.autocast) else None
    base = BaseModel.load(path, device, half)
    codec = TextCodec.load(path)
    if base.max_length is not None and config.max_length > base.max_length:
        raise HydraspecError(f"max_length {config.max_length} is beyond the base model's context of {base.max_length}")
    with accelerator.main_process_first(), silent.status("reading the data") as status:

        def watch(count: int) -> None:
            status.update(f"reading the data: {count:,} conversations")

        store, held_out = prepare_stores(
            run.data,
            run.eval_data,
            codec,
            run.state / "tokens",
            config.max_length,
            config.held_out,
            base.vocab_size,
            watch,
        )
    if not len(store):
        raise DataError(f"{run.data} holds no conversation with an answer to learn from")
    torch.manual_seed(config.seed)
    heads = make_heads(base, store, config)
    return Prepared(run, base, codec, heads, store, held_out, accelerator, silent)


def load_for_deployment(prepared: Prepared) -> BaseModel:
    """The base model as decoding loads it by default; on CPUs that is float32, whatever it was trained with."""
    base = prepared.base
    if base.device.type != "cpu" or base.dtype == torch.float32:
        return base
    # Widening the rounded weights would not bring back the checkpoint's own.
    return BaseModel.load(find_shipped(prepared.run.base), base.device, self_check=False)


def make_heads(base: BaseModel, store: TokenStore, config: TrainingConfig) -> DraftHeads:
    """Untrained heads as a resolved config describes them."""
    token_ids = None
    if 0 < config.draft_vocabulary < base.vocab_size:
        order = torch.as_tensor(store.token_counts).argsort(descending=True, stable=True)
        token_ids = order[: config.draft_vocabulary].sort().values
    return new_heads(
        base,
        config.recipe,
        token_ids=token_ids,
        prefix_layer=config.prefix_layer,
        prefix_window=config.prefix_window,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        shared_blocks=config.shared_blocks,
        tied_vocabulary=config.tied_vocabulary,
        dropout=config.dropout,
    )


def make_trainer(prepared: Prepared) -> Trainer:
    """The trainer of a prepared run, with its data and its source of hidden states."""
    run, config, store = prepared.run, prepared.run.config, prepared.store
    plan = RowPlan(store.lengths, config.max_length, config.seed, config.epochs, config.max_tokens)
    hidden: HiddenSource = OnlineStates(prepared.base)
    if run.hidden_states is not None:
        with prepared.accelerator.main_process_first():
            write_with_bar(prepared, run.hidden_states)
        hidden = HiddenStates.open(run.hidden_states, prepared.base, store)
    data = Data(plan.num_rows, plan.rows, lambda rows: load_batch(store, rows), hidden)
    return Trainer(prepared.base, prepared.heads, config, data, prepared.accelerator)


def write_with_bar(prepared: Prepared, folder: Path) -> None:
    """Write the base model's hidden states to `folder`, or what is missing of them; says first what they take."""
    total, base = prepared.store.num_tokens, prepared.base
    need = count_bytes(prepared.store, base.hidden_size)
    prepared.console.print(f"hidden states of {total:,} tokens in {folder}: {need / 1e6:,.0f} MB in all")
    with Progress(console=prepared.console) as bar:
        task = bar.add_task("hidden states", total=total)
        write_hidden_states(base, prepared.store, folder, lambda done: bar.update(task, completed=done))
