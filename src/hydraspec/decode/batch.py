"""The sequences that are in the caches at one time, by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.heads.protocol import DraftHeads
from hydraspec.types import LiveText, Output, Request

# Steps without drafting after which the heads read what they have missed.
MOST_UNREAD = 128


@dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    number: int  # by order of submission
    request: Request
    output: Output
    live: LiveText = field(init=False)

    def __post_init__(self) -> None:
        self.live = LiveText(self.request, list(self.request.prompt))


class RunningBatch:
    """Rows `0 … active - 1` decode, the next `reading` rows are still reading their prompts, the others are free.

    A free row remembers the job that it held: its keys and values serve later prompts with the same beginning. Of a
    decoding row every token before the root is in the caches; the root is known, but not yet read by the base model.

    Attributes:
        root: `[rows]` int64.
        cache: the base model's keys and values.
        heads: what the draft heads remember, or None where nobody drafts.
        jobs: by row.
        active: rows that decode.
        reading: rows that read their prompts.
    """

    def __init__(self, base: BaseModel, heads: DraftHeads | None, rows: int, slots: int) -> None:
        self.root = torch.zeros(rows, dtype=torch.long, device=base.device)
        self.cache = base.new_cache(rows, slots)
        self._draft_heads = heads
        self.heads = heads.new_state(rows, slots) if heads is not None else None
        self.jobs: list[Job | None] = [None] * rows
        self.active = self.reading = 0
        # Hidden states and tokens of the decoding rows that the heads have not read, as many in each of them.
        most = MOST_UNREAD if heads else 0
        self._unread = torch.zeros(rows, most, base.hidden_size, dtype=base.dtype, device=base.device)
        self._unread_tokens = torch.zeros(rows, most, dtype=torch.long, device=base.device)
        self._unread_count = 0

    @property
    def size(self) -> int:
        """Rows in all."""
        return len(self.jobs)

    @property
    def occupied(self) -> int:
        """Rows that are not free."""
        return self.active + self.reading

    @property
    def decoding(self) -> slice:
        """The rows that decode."""
        return slice(0, self.active)

    def job(self, row: int) -> Job:
        """The job in an occupied row."""
        job = self.jobs[row]
        assert job is not None
        return job

    def held(self, row: int) -> Sequence[int]:
        """The tokens whose keys and values lie in a row."""
        job = self.jobs[row]
        return [] if job is None else job.live.tokens[: self.cache.lengths[row]]

    # -- what the heads have read -------------------------------------------------------------------------------

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Let the heads read newly committed tokens `[B, A]` of `rows` and their hidden states `[B, A, d]`."""
        if self._draft_heads is not None and self.heads is not None:
            self._draft_heads.observe(self.heads, hidden, tokens, counts, rows)

    def postpone(self, hidden: Tensor, tokens: Tensor) -> None:
        """Keep one newly committed token `[B, 1]` of each decoding row, and its hidden state `[B, 1, d]`, for later."""
        if self.heads is not None:
            self._unread[self.decoding, self._unread_count] = hidden[:, 0]
            self._unread_tokens[self.decoding, self._unread_count] = tokens[:, 0]
            self._unread_count += 1
            if self._unread_count == MOST_UNREAD:
                self.catch_up()

    def catch_up(self) -> None:
        """Let the heads read what was postponed: before they guess, and before other rows join."""
        if self._unread_count:
            hidden = self._unread[self.decoding, : self._unread_count]
            tokens = self._unread_tokens[self.decoding, : self._unread_count]
            self._unread_count = 0
            self.observe(hidden, tokens, [hidden.shape[1]] * self.active, self.decoding)

    # -- who is where -------------------------------------------------------------------------------------------

    def admit(self, job: Job, source: int, length: int) -> None:
        """Give `job` the first free row, with the first `length` tokens of row `source` as its beginning."""
        self.catch_up()
        row = self.occupied
        if source >= row:  # a free row: its tokens are taken over, not copied
            self._swap(source, row)
            self._truncate(row, length)
        else:
            self.cache.copy_beginning(source, row, length)
            if self.heads is not None:
                self.heads.copy_beginning(source, row, length)
        self.jobs[row] = job
        self.reading += 1

    def activate(self, row: int) -> None:
        """A prompt has been read, its root is known: its row decodes from now on."""
        assert self.active <= row < self.occupied
        self.catch_up()
        self._swap(row, self.active)
        self.active, self.reading = self.active + 1, self.reading - 1

    def release(self, row: int) -> None:
        """Free an occupied row, whichever state it is in; other rows may move."""
        read = self.cache.lengths[row] - (self._unread_count if row < self.active else 0)
        # What was accepted beyond the end of the text is no text that a later prompt could share.
        self._truncate(row, min(read, len(self.job(row).live.tokens)))
        if row < self.active:
            self.active -= 1
            self._swap(row, self.active)
            row = self.active
            self._unread_count = self._unread_count if self.active else 0
        else:
            self.reading -= 1
        self._swap(row, self.occupied)

    def _truncate(self, row: int, length: int) -> None:
        self.cache.reset(row, length)
        if self.heads is not None:
            self.heads.reset(row, length)

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        self.cache.swap(a, b)
        if self.heads is not None:
            self.heads.swap(a, b)
        self.root[[a, b]] = self.root[[b, a]]
        if self._unread_count:
            self._unread[[a, b]] = self._unread[[b, a]]
            self._unread_tokens[[a, b]] = self._unread_tokens[[b, a]]
        self.jobs[a], self.jobs[b] = self.jobs[b], self.jobs[a]
