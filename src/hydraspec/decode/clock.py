"""The time that each stage of a step takes."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from hydraspec.types import Seconds


class Clock:
    """Marks the borders between the stages of a step.

    On a GPU the marks are events, read once the step's results have been copied to the host; nothing waits for them.
    The commit is still running then, so the seconds given for it are those of the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._committed: tuple[Any, Any] | None = None  # around the commit of the step before

    def mark(self) -> None:
        """A stage begins or ends now."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> Seconds:
        """The seconds between the five marks of a step; the next step starts anew."""
        (drafting, verifying, accepting, committing, end), self._marks = self._marks, []
        if not self._cuda:
            return Seconds(verifying - drafting, accepting - verifying, committing - accepting, end - committing)
        draft, verify, accept = (
            a.elapsed_time(b) / 1e3 for a, b in pairwise((drafting, verifying, accepting, committing))
        )
        commit = self._committed[0].elapsed_time(self._committed[1]) / 1e3 if self._committed else 0.0
        self._committed = (committing, end)
        return Seconds(draft, verify, accept, commit)
