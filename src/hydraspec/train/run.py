"""A training run from files to files: read, estimate, train, save, measure."""

from __future__ import annotations

import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hydraspec.errors import HydraspecError
from hydraspec.heads.checkpoint import Provenance, library_versions, save_heads
from hydraspec.train.checkpoint import load_checkpoint, save_checkpoint
from hydraspec.train.loop import Trainer
from hydraspec.train.prepare import Prepared, Run, check, load_for_deployment, make_trainer, prepare
from hydraspec.train.progress import Saver, follow, listen_for_stop
from hydraspec.train.recipes import describe_losses
from hydraspec.train.report import measure_heads

# What may differ between a run and its continuation; the second line changes what is learned from there on.
_MAY_CHANGE = ("checkpoint_minutes", "checkpoint_steps", "held_out_prompts", "micro_tokens")
_MAY_BE_LOWERED = ("learning_rate", "final_learning_rate", "clip")


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
    rows = list(islice(trainer.data.rows(0), trainer.rows_per_step))
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
        base=Path(run.base).resolve().name if Path(run.base).is_dir() else run.base,  # heads travel, folders do not
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
        measured |= measure_heads(load_for_deployment(prepared), heads, prepared.held_out, run.config, console)
        lengths = {
            f"{tree}/{key}": value for tree, found in measured["acceptance"].items() for key, value in found.items()
        }
        prepared.accelerator.log(lengths, step=trainer.step)
        save_heads(heads, run.out, provenance)
    shutil.rmtree(run.state, ignore_errors=True)
    console.print(f"saved to {run.out}")
