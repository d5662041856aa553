"""A training run from files to files: read, estimate, train, save, measure."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.heads import new_heads
from hydraspec.heads.checkpoint import Provenance, library_versions, save_heads
from hydraspec.heads.protocol import DraftHeads
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.checkpoint import has_checkpoints, load_checkpoint, save_checkpoint
from hydraspec.train.forward import wants_bfloat16
from hydraspec.train.hidden_states import HiddenStates, OnlineStates
from hydraspec.train.loop import Data, HiddenSource, Trainer
from hydraspec.train.packing import RowPlan, load_batch
from hydraspec.train.progress import Saver, follow, listen_for_stop
from hydraspec.train.recipes import describe_losses, resolve_recipe
from hydraspec.train.report import measure_heads
from hydraspec.train.states_writer import count_bytes, write_hidden_states
from hydraspec.train.store import TokenStore, prepare_stores

logger = logging.getLogger(__name__)

STATE_FOLDER = "training"  # beside the heads, until the run is complete
# What may differ between a run and its continuation; the second line changes what is learned from there on.
_MAY_CHANGE = ("checkpoint_minutes", "checkpoint_steps", "held_out_prompts", "micro_tokens")
_MAY_BE_LOWERED = ("learning_rate", "final_learning_rate", "clip")


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


def train_to_folder(run: Run, console: Console) -> bool:
    """Train heads and save them in `run.out`, with what they measured.

    Ctrl-C or SIGTERM saves a checkpoint and the heads as they are, and ends the run.

    Returns:
        Whether the run is complete.

    Raises:
        HydraspecError: something about the arguments or the files is wrong; what is there stays as it is.
    """
    run = check(run)
    fresh = not run.out.exists()
    try:
        prepared = prepare(run, console)
        trainer = make_trainer(prepared)
        resume(prepared, trainer)
        announce(prepared, trainer)
    except BaseException:
        if fresh:  # nothing has been trained: leave nothing behind
            shutil.rmtree(run.out, ignore_errors=True)
        raise
    saver = Saver(run.config, lambda: save_state(prepared, trainer))
    with listen_for_stop() as stop:
        follow(prepared.console, trainer, saver, stop, prepared.accelerator)
    done = trainer.step == trainer.steps
    if not done:
        saver.save_now()
    finish(prepared, trainer, done)
    prepared.accelerator.end_training()
    return done


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


# -- going on where a run was stopped --------------------------------------------------------------------------------


def describe_run(prepared: Prepared) -> dict[str, Any]:
    """What makes a run this run and no other."""
    config = {k: v for k, v in prepared.run.config.to_dict().items() if k not in _MAY_CHANGE}
    return {
        "base": prepared.base.fingerprint(),
        "data": prepared.store.digest,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
    }


def save_state(prepared: Prepared, trainer: Trainer) -> None:
    """Write a checkpoint; all processes must call this."""
    tensors, facts = trainer.capture()
    if prepared.accelerator.is_main_process:
        save_checkpoint(prepared.run.state, trainer.step, tensors, {**facts, "run": describe_run(prepared)})
    prepared.accelerator.wait_for_everyone()


def resume(prepared: Prepared, trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint, where that is asked for.

    Raises:
        HydraspecError: it belongs to another run: other data, another base model, another config; or all are damaged.
    """
    if not prepared.run.resume:
        return
    checkpoint = load_checkpoint(prepared.run.state)
    if checkpoint is None:
        raise HydraspecError(f"every checkpoint in {prepared.run.state} is damaged: start again in another folder")
    before, now = checkpoint.facts["run"], describe_run(prepared)
    for key, meaning in (("base", "base model"), ("data", "data")):
        if before[key] != now[key]:
            raise HydraspecError(f"{prepared.run.out} was begun with other {meaning}: resume it with the same")
    for key in (k for k in now["config"] if before["config"].get(k) != now["config"][k]):
        was, is_now = before["config"].get(key), now["config"][key]
        if key not in _MAY_BE_LOWERED:
            raise HydraspecError(
                f"{prepared.run.out} was begun with {key} {was}, not {is_now}: resume it with the same options"
            )
        prepared.console.print(f"{key} is {is_now} from here on; it was {was}")
    trainer.restore(checkpoint)
    prepared.console.print(f"resumed after step {trainer.step:,} of {trainer.steps:,}")


# -- what a run costs, and what it leaves ----------------------------------------------------------------------------


def announce(prepared: Prepared, trainer: Trainer) -> None:
    """Say what will be trained and what it will cost, before the first step.

    Raises:
        HydraspecError: the disk has no room for two checkpoints.
    """
    run, config, heads = prepared.run, prepared.run.config, prepared.heads
    count = sum(p.numel() for p in heads.parameters())
    prepared.console.print(
        f"{config.recipe} heads: {count:,} parameters, {config.num_heads} heads of {config.num_layers} layers; "
        f"{describe_losses(config)}"
    )
    need, free = 2 * 4 * count * (4 if config.ema else 3), shutil.disk_usage(run.out).free
    if free < need:
        raise HydraspecError(
            f"two checkpoints need {need / 1e6:,.0f} MB, but the disk of {run.out} has {free / 1e6:,.0f} MB free: "
            "free some, or name a folder on another disk"
        )
    rows = list(_first(trainer.data.rows(0), trainer.rows_per_step))
    seconds, tokens = _time_step(trainer, rows)
    left = (trainer.steps - trainer.step) * seconds
    prepared.console.print(
        f"{prepared.store.num_tokens:,} tokens of {len(prepared.store):,} conversations "
        f"({prepared.store.num_assistant_tokens:,} by the assistant), {len(prepared.held_out):,} held out"
    )
    prepared.console.print(
        f"{trainer.steps - trainer.step:,} steps of about {tokens:,} tokens: about {left / 60:.0f} min, checkpoints of "
        f"{need / 2e6:,.0f} MB; Ctrl-C saves and ends"
    )


def _first(rows: Iterator[Any], count: int) -> Iterator[Any]:
    return (row for _, row in zip(range(count), rows, strict=False))


def _time_step(trainer: Trainer, rows: list[Any]) -> tuple[float, int]:
    """Seconds and tokens of a step that is tried twice and thrown away; random states are as before."""
    state, seconds, tokens = torch.get_rng_state(), [], 0
    for _ in range(2):
        start = time.perf_counter()
        losses, tokens = trainer.find_gradients(rows)
        losses.tolist()
        seconds.append(time.perf_counter() - start)
        trainer.optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    return min(seconds), tokens


def finish(prepared: Prepared, trainer: Trainer, done: bool) -> None:
    """Save the heads, then measure them and save again with what was measured; a complete run's state is removed."""
    run, console = prepared.run, prepared.console
    weights = trainer.trained_weights()
    if not prepared.accelerator.is_main_process:
        return
    measured: dict[str, Any] = {
        "training_seconds": round(trainer.seconds),
        "tokens_per_second": round(trainer.tokens / trainer.seconds) if trainer.seconds else 0,
    }
    heads = trainer.heads
    heads.load_state_dict({k: v.to(prepared.base.device) for k, v in weights.items()})
    provenance = Provenance(
        base=run.base,
        base_fingerprint=prepared.base.fingerprint(),
        data=f"{trainer.tokens:,} tokens of {Path(run.data).name} ({len(prepared.store):,} conversations)",
        recipe={"heads": run.config.recipe, "steps": trainer.step, "of_steps": trainer.steps, **run.config.to_dict()},
        measured=measured,
        versions=library_versions(),
    )
    save_heads(heads, run.out, provenance)  # before anything else can fail
    if not done:
        console.print(
            f"saved heads and a checkpoint to {run.out} after {trainer.step:,} of {trainer.steps:,} steps; "
            "the same command with --resume goes on"
        )
        return
    if len(prepared.held_out):
        measured |= measure_heads(prepared.base, heads, prepared.held_out, run.config, console)
        lengths = {
            f"{tree}/{key}": value for tree, found in measured["acceptance"].items() for key, value in found.items()
        }
        prepared.accelerator.log(lengths, step=trainer.step)
        save_heads(heads, run.out, provenance)
    shutil.rmtree(run.state, ignore_errors=True)
    console.print(f"saved to {run.out}")
