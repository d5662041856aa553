"""Frozen configurations. Each field's help text is also the command line's: the options derive from these classes.

Nothing here imports torch, so that ``hydraspec --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hydraspec.errors import HydraspecError, RequestError


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
class SamplingConfig:
    """How the base model's distribution is changed, and how a token is chosen from it.

    The changes apply in this order: allowed tokens, logit bias, penalties, temperature, top-k, top-p, min-p. Each is
    defined as transformers (repetition penalty, temperature, top-k, top-p, min-p) or the OpenAI interface (logit bias,
    presence and frequency penalty) defines it. The defaults are greedy decoding of the unchanged distribution.
    """

    temperature: float = option(0.0, "divides the logits before sampling; 0: greedy")
    top_k: int = option(0, "sample among this many most likely tokens; 0: all")
    top_p: float = option(1.0, "sample among the fewest tokens that hold this much probability; 1: all")
    min_p: float = option(0.0, "leave out tokens below this fraction of the most likely one's probability")
    repetition_penalty: float | None = option(
        None, "divides (or multiplies, if negative) logits of tokens in prompt and output; left out: the model's own"
    )
    presence_penalty: float = option(0.0, "taken off the logits of tokens that the output holds")
    frequency_penalty: float = option(0.0, "taken off the logits for each time that the output holds the token")
    seed: int | None = option(None, "of the sampling noise: the same seed gives the same text; left out: a random one")
    acceptance: str = option("exact", "exact, or typical: longer paths, but no longer the base model's distribution")
    posterior_threshold: float = option(0.09, "typical acceptance: the most that a token's probability must exceed")
    posterior_alpha: float = option(0.3, "typical acceptance: scales exp(-entropy), the other bound")
    logit_bias: tuple[tuple[int, float], ...] = option((), "token ids and what is added to their logits")
    allowed_tokens: tuple[int, ...] = option((), "the only token ids that may be chosen; empty: all")

    def __post_init__(self) -> None:
        for name, fits, range_text in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
            ("posterior_threshold", 0 < self.posterior_threshold <= 1, "in (0, 1]"),
            ("posterior_alpha", 0 < self.posterior_alpha <= 1, "in (0, 1]"),
        ):
            if not fits:
                raise RequestError(f"{name} must be {range_text}, not {getattr(self, name)}")
        if self.acceptance not in ("exact", "typical"):
            raise RequestError(f"acceptance must be exact or typical, not {self.acceptance!r}")

    @property
    def has_penalties(self) -> bool:
        """Whether the text so far changes the distribution."""
        return self.repetition_penalty not in (None, 1) or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the choice is the argmax of the unchanged logits."""
        return not (self.temperature or self.has_penalties or self.logit_bias or self.allowed_tokens)


@dataclass(frozen=True)
class DecodingConfig:
    """What one request asks of the decode loop, besides its sampling."""

    max_new_tokens: int | None = option(None, "tokens to write at most; left out: 128, or what the context leaves")
    stop: tuple[str, ...] = option((), "strings that end the text; the text is cut before them")
    ignore_eos: bool = option(False, "go on past the end-of-text token")

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise HydraspecError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if any(not text for text in self.stop):
            raise HydraspecError("a stop string must not be empty")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may hold at once."""

    max_batch: int = option(16, "sequences decoded together at most; others wait")
    max_length: int | None = option(None, "tokens of a sequence at most, prompt and output; left out: the context")
    memory: int | None = option(None, "bytes for all caches at most; max_batch is lowered to fit; left out: no limit")
    prefill_tokens: int = option(512, "prompt tokens read between two steps at most, so that others do not wait long")
    share_prefixes: bool = option(True, "copy the cache of a common beginning instead of reading it again")
    forward: str = option(
        "auto", "eager; static: fixed shapes, recorded as CUDA graphs; compile: static and compiled; auto: by device"
    )

    def __post_init__(self) -> None:
        if self.forward not in ("auto", "eager", "static", "compile"):
            raise RequestError(f"forward must be auto, eager, static or compile, not {self.forward!r}")
        for name in ("max_batch", "max_length", "memory", "prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")


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
