"""Frozen configurations. Each field's help text is also the command line's: the options derive from these classes.

Nothing here imports torch, so that ``hydraspec --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hydraspec.errors import HydraspecError, RequestError

MOST_HEADS, MOST_LAYERS = 8, 6  # that heads are built with: what tests hold


def option(default: Any, text: str) -> Any:
    """A dataclass field whose meaning is documented in ``metadata['help']``."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a set of draft heads: what ``config.json`` of a heads checkpoint holds under ``heads``."""

    kind: str = option("hydra++", "medusa, hydra, hydra++ or eagle")
    hidden_size: int = option(0, "width d of the base model's hidden states")
    vocab_size: int = option(0, "size V of the base model's vocabulary")
    num_heads: int = option(4, "heads, one for each token guessed ahead")
    num_layers: int = option(1, "residual blocks in each head, or decoder layers of the eagle head")
    shared_blocks: bool = option(False, "apply one block num_layers - 1 times, as the published code does")
    tied_vocabulary: bool = option(False, "use the base model's lm_head instead of one vocabulary layer a head")
    draft_vocabulary: int = option(0, "propose only this many tokens, the data's most frequent ones; 0: any")
    dropout: float = option(0.0, "dropout before each block and the vocabulary layer, in training only")
    prefix_layer: dict[str, Any] | None = option(None, "the transformers config of prefix attention or eagle layers")
    outer_norms: bool = option(True, "eagle: a norm before the first layer and after the last; EAGLE-1 has neither")

    def __post_init__(self) -> None:
        for name, most in (("num_heads", MOST_HEADS), ("num_layers", MOST_LAYERS)):
            if not 1 <= getattr(self, name) <= most:
                raise HydraspecError(f"heads need a {name} of 1 to {most}, not {getattr(self, name)}")
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
class RegenerationConfig:
    """How a base model answers a data set's prompts itself."""

    max_new_tokens: int = option(512, "tokens of an answer at most; a conversation ends with one that is cut")
    max_length: int = option(2048, "tokens of a conversation at most; it ends where they, or the context, are used up")
    text_tokens: int = option(64, "of a plain text, tokens that are kept; the base model continues them")
    limit: int = option(0, "conversations to take, from the first on; 0: all")

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_length", 2), ("text_tokens", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise HydraspecError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run of draft heads on a frozen base model; what is left out, the recipe decides."""

    recipe: str = option("hydra++", "medusa, hydra, hydra++ or eagle: the kind of heads, and how its paper trains them")
    num_heads: int = option(4, "heads, one for each token guessed ahead")
    num_layers: int | None = option(None, "residual blocks in each head, or decoder layers of the eagle head")
    shared_blocks: bool = option(False, "apply one block num_layers - 1 times, as the published code does")
    tied_vocabulary: bool | None = option(None, "use the base model's lm_head instead of training one a head")
    draft_vocabulary: int = option(0, "propose only this many tokens, the data's most frequent ones; 0: any")
    prefix_layer: str = option("base", "prefix attention: base, a decoder layer of the base's kind; plain, a Llama one")
    prefix_window: int = option(0, "tokens that prefix attention looks back, for long contexts; 0: all")
    data_weight: float | None = option(None, "weight of the cross-entropy to the data's tokens")
    teacher_weight: float | None = option(None, "weight of the cross-entropy to the base model's own distribution")
    kl_weight: float = option(0.0, "weight of KL(base || head): the teacher's cross-entropy less its entropy")
    reverse_kl_weight: float = option(0.0, "weight of KL(head || base)")
    reconstruction_weight: float | None = option(None, "weight of SmoothL1 to the base's true hidden states")
    head_weights: tuple[float, ...] = option((), "weights of the heads' losses, one a head; left out: 1")
    head_decay: float = option(1.0, "each head's loss weighs this much of the one before it")
    noise: float = option(0.0, "alpha of NEFTune noise on hidden states and embeddings; 0: none")
    dropout: float | None = option(None, "dropout before each block and the vocabulary layer")
    max_tokens: int = option(0, "tokens to train on in all; 0: every token of the data, epochs times")
    epochs: int = option(1, "passes over the data")
    batch_tokens: int = option(4096, "tokens to an optimiser step, of all processes together")
    micro_tokens: int = option(4096, "tokens in one forward pass of one process: what its memory holds")
    max_length: int = option(512, "longer conversations are cut to this many tokens, and rows are packed up to it")
    learning_rate: float = option(5e-4, "peak learning rate of AdamW")
    weight_decay: float = option(0.1, "weight decay of AdamW, on matrices only")
    warmup_steps: int = option(100, "steps of linear warm-up")
    final_learning_rate: float = option(0.33, "the cosine ends at this fraction of the peak")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.0, "decay of an average of the weights over steps, which is then what is saved; 0: none")
    held_out: float = option(0.02, "share of the conversations to measure on; chosen by id, without --eval-data")
    held_out_prompts: int = option(40, "held-out prompts to decode at the end; 0: none")
    autocast: str = option("auto", "auto, bfloat16 or float32: the dtype of the matrix products in training")
    checkpoint_minutes: float = option(10.0, "minutes between two checkpoints; 0: none by time")
    checkpoint_steps: int = option(0, "steps between two checkpoints; 0: none by steps")
    seed: int = option(0, "seed of the initial weights and of the data's order")

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_tokens", "max_length", "epochs"):
            if getattr(self, name) < 1:
                raise HydraspecError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, most in (("num_heads", MOST_HEADS), ("num_layers", MOST_LAYERS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise HydraspecError(f"{name} must be 1 to {most}, not {value}")
        if self.autocast not in ("auto", "bfloat16", "float32"):
            raise HydraspecError(f"autocast must be auto, bfloat16 or float32, not {self.autocast!r}")
        if self.prefix_layer not in ("base", "plain"):
            raise HydraspecError(f"prefix_layer must be base or plain, not {self.prefix_layer!r}")
        for name in ("batch_tokens", "micro_tokens"):
            if self.max_length > getattr(self, name):
                raise HydraspecError(
                    f"max_length {self.max_length} does not fit {name} {getattr(self, name)}: lower it"
                )
        if self.head_weights and len(self.head_weights) != self.num_heads:
            raise HydraspecError(f"head_weights must be one for each of {self.num_heads} heads")
        for name in ("ema", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise HydraspecError(f"{name} must lie in [0, 1), not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)
