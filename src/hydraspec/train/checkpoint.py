"""Training checkpoints: everything that a run needs to go on exactly, written whole or not at all.

A checkpoint is a folder `step-00000120` with `state.safetensors` (weights, optimiser, random states) and `state.json`
(what the run is, and the hash of the former). It is filled under another name and renamed; the last two are kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydraspec.files import hash_file, write_json, write_whole

logger = logging.getLogger(__name__)

KEPT = 2
_PREFIX, _UNFINISHED = "step-", ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """What was read back."""

    step: int  # optimiser steps done
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint into `folder` and remove all but the last two.

    Args:
        folder: of all checkpoints of a run.
        step: optimiser steps done.
        tensors: on the CPU; those that share memory are written once each.
        facts: JSON values.

    Raises:
        HydraspecError: the disk is full; earlier checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{_PREFIX}{step:08d}"
    unfinished = folder / f"{_UNFINISHED}{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        whole = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        write_whole(unfinished / "state.safetensors", lambda file: save_file(whole, file))
        digest = hash_file(unfinished / "state.safetensors")
        write_json(unfinished / "state.json", {**facts, "step": step, "sha256": digest})
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)  # of the same step, from before a damaged one was passed over
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in _list(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; a damaged one is passed over with a warning. None: there is none."""
    return next(filter(None, map(_read, reversed(_list(folder)))), None)


def _read(place: Path) -> Checkpoint | None:
    try:
        facts = json.loads((place / "state.json").read_text(encoding="utf-8"))
        if hash_file(place / "state.safetensors") != facts["sha256"]:
            raise ValueError("its weights are not those that were written")
        return Checkpoint(int(facts["step"]), load_file(place / "state.safetensors"), facts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("checkpoint %s is damaged (%s); going back to the one before it", place, error)
        return None


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has left checkpoints, damaged or not."""
    return bool(_list(folder))


def _list(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []
