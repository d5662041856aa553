"""Frozen configurations. Each field's help text is also the command line's: the options derive from these classes.

Nothing here imports torch, so that ``hydraspec --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hydraspec.errors import HydraspecError


def option(default: Any, text: str) -> Any:
    """A dataclass field whose meaning is documented in ``metadata['help']``."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a set of draft heads: what ``config.json`` of a heads checkpoint holds under ``heads``."""

    kind: str = option("hydra++", "medusa, hydra or hydra++")
    hidden_size: int = option(0, "width d of the base model's hidden states")
    vocab_size: int = option(0, "size V of the base model's vocabulary")
    num_heads: int = option(4, "heads, one for each token guessed ahead")
    num_layers: int = option(1, "residual blocks in each head")
    shared_blocks: bool = option(False, "apply one block num_layers - 1 times, as the published code does")
    tied_vocabulary: bool = option(False, "use the base model's lm_head instead of one vocabulary layer a head")
    draft_vocabulary: int = option(0, "propose only this many tokens, the data's most frequent ones; 0: any")
    dropout: float = option(0.0, "dropout before each block and the vocabulary layer, in training only")
    prefix_layer: dict[str, Any] | None = option(None, "the transformers config of the prefix attention layer")

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_layers < 1:
            raise HydraspecError(
                f"heads need num_heads >= 1 and num_layers >= 1, not {self.num_heads} and {self.num_layers}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise HydraspecError(f"dropout must lie in [0, 1), not {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class DecodingConfig:
    """What one request asks of the decode loop."""

    max_new_tokens: int | None = option(None, "tokens to write at most; left out: 128, or what the context leaves")
    stop: tuple[str, ...] = option((), "strings that end the text; the text is cut before them")
    ignore_eos: bool = option(False, "go on past the end-of-text token")

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise HydraspecError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if any(not text for text in self.stop):
            raise HydraspecError("a stop string must not be empty")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run of draft heads on a frozen base model."""

    num_heads: int = option(4, "heads, one for each token guessed ahead")
    num_layers: int = option(0, "residual blocks in each head; 0: what the paper uses for this kind of heads")
    shared_blocks: bool = option(False, "apply one block num_layers - 1 times, as the published code does")
    tied_vocabulary: bool = option(False, "use the base model's lm_head instead of training one a head")
    draft_vocabulary: int = option(0, "propose only this many tokens, the data's most frequent ones; 0: any")
    teacher_weight: float = option(-1.0, "weight of the cross-entropy to the base's distribution; -1: the paper's")
    data_weight: float = option(-1.0, "weight of the cross-entropy to the data's tokens; -1: the paper's")
    max_tokens: int = option(0, "tokens to train on in all; 0: every token of the data, epochs times")
    epochs: int = option(1, "passes over the data")
    batch_tokens: int = option(4096, "tokens in a batch, padding included")
    max_length: int = option(512, "longer conversations are cut to this many tokens")
    learning_rate: float = option(5e-4, "peak learning rate of AdamW")
    weight_decay: float = option(0.1, "weight decay of AdamW, on matrices only")
    warmup_steps: int = option(100, "steps of linear warm-up")
    final_learning_rate: float = option(0.33, "the cosine ends at this fraction of the peak")
    clip: float = option(1.0, "largest gradient norm")
    dropout: float = option(0.0, "dropout before each block and the vocabulary layer")
    held_out: int = option(
        200, "conversations to measure on, at most; without --eval-data they are kept out of training"
    )
    autocast: str = option("auto", "auto, bfloat16 or float32: the dtype of the matrix products in training")
    seed: int = option(0, "seed of the initial weights and of the data's order")

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_length", "epochs", "num_heads"):
            if getattr(self, name) < 1:
                raise HydraspecError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.autocast not in ("auto", "bfloat16", "float32"):
            raise HydraspecError(f"autocast must be auto, bfloat16 or float32, not {self.autocast!r}")
        if self.max_length > self.batch_tokens:
            raise HydraspecError(
                f"max_length {self.max_length} does not fit a batch of batch_tokens {self.batch_tokens}: lower it"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)
