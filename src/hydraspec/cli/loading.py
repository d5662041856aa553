"""What commands that load models share."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydraspec.config import EngineConfig
    from hydraspec.llm import LLM


def load_quietly(
    model: str,
    heads: str | None,
    tree: str | None,
    device: str | None,
    dtype: str | None,
    engine: EngineConfig | None = None,
) -> LLM:
    """`hydraspec.load` without the progress bars of transformers."""
    silence_transformers()
    from hydraspec.llm import load

    settle_threads()
    if engine is not None and engine.forward == "compile":
        show_log()
    return load(model, heads, tree, device, dtype, engine_config=engine)


def silence_transformers() -> None:
    """Turn off the progress bars that transformers shows while it loads weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def show_log() -> None:
    """Print what the library logs, such as which shape has been compiled in how many seconds, to standard error."""
    logging.basicConfig(format="hydraspec: %(message)s", stream=sys.stderr)
    logging.getLogger("hydraspec").setLevel(logging.INFO)


def show_warnings() -> None:
    """Print the warnings that the library logs to standard error, each in one line."""
    logging.basicConfig(format="hydraspec: %(message)s", level=logging.WARNING, stream=sys.stderr)


def settle_threads() -> int:
    """Let torch use as many CPU threads as this process may really run at once; OMP_NUM_THREADS has the last word.

    Returns:
        How many there are now.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), count_cores()))
    return torch.get_num_threads()


def count_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: by its affinity, and by its container's quota. Torch counts the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores
