"""Which row of the caches already holds the beginning of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from hydraspec.decode.batch import RunningBatch

LEAST_SHARED = 16  # tokens: copying fewer is not worth it
WORTH_WAITING = 64  # tokens that a prompt being read must have in common for another to wait for it


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning of two token sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared in C: halve instead of walking
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def find_shared(prompt: Sequence[int], running: RunningBatch) -> tuple[int, int]:
    """The row whose tokens share the longest beginning with `prompt`, and how many tokens that is.

    The prompt's last token is never among them: it must be read for what follows it to be known. Without a common
    beginning worth copying, the answer is the first free row and 0.
    """
    wanted = list(prompt[:-1])
    best = max(range(running.size), key=lambda row: count_common(wanted, running.held(row)))
    shared = count_common(wanted, running.held(best))
    return (best, shared) if shared >= LEAST_SHARED else (running.occupied, 0)


def is_being_read(prompt: Sequence[int], shared: int, running: RunningBatch) -> bool:
    """Whether a prompt that is being read now will soon hold much more of `prompt` than the `shared` tokens."""
    wanted = list(prompt[:-1])
    rows = range(running.active, running.occupied)
    return any(count_common(wanted, list(running.job(row).request.prompt)) - shared >= WORTH_WAITING for row in rows)
