"""What an engine will hold, planned before the first byte of it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from hydraspec.base.cache import count_bytes
from hydraspec.base.model import BaseModel
from hydraspec.config import EngineConfig
from hydraspec.errors import RequestError
from hydraspec.heads.protocol import DraftHeads
from hydraspec.tree.table import TreeTable


@dataclass(frozen=True)
class MemoryPlan:
    """The caches of an engine."""

    max_batch: int  # sequences decoded together
    max_length: int  # tokens of a sequence, prompt and output
    slots: int  # of a sequence: its tokens, and the nodes of the largest tree behind them
    bytes_per_sequence: int

    @property
    def bytes(self) -> int:
        """Of all caches together."""
        return self.max_batch * self.bytes_per_sequence

    def describe(self) -> str:
        """The plan in one line."""
        return (
            f"caches for {self.max_batch} sequences of {self.max_length} tokens: {self.max_batch} x "
            f"{self.bytes_per_sequence / 2**20:.1f} MiB = {self.bytes / 2**20:.1f} MiB"
        )


def plan_memory(base: BaseModel, heads: DraftHeads | None, trees: TreeTable, config: EngineConfig) -> MemoryPlan:
    """How many sequences, of what length, in how many bytes.

    Raises:
        RequestError: the length is not known, or the byte limit does not hold one sequence.
    """
    lengths = [length for length in (config.max_length, base.max_length) if length is not None]
    if not lengths:
        raise RequestError(f"{base.name} does not state the length of its context: give max_length")
    length = min(lengths)
    slots = length + trees.num_nodes
    per_sequence = slots * count_bytes(base.cache_shapes, base.dtype)
    if heads is not None:
        per_sequence += heads.count_bytes(slots)
    batch = config.max_batch
    if config.memory is not None:
        batch = min(batch, config.memory // per_sequence)
        if batch < 1:
            raise RequestError(
                f"a memory limit of {config.memory:,} bytes does not hold one sequence of {length} tokens, which takes "
                f"{per_sequence:,}: raise it or lower max_length"
            )
    return MemoryPlan(batch, length, slots, per_sequence)
