"""The base model: any attention-only causal LM of transformers, frozen and unmodified, behind a small interface."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hydraspec.base.attention import StepLayout, attend_with
from hydraspec.base.cache import SlotCache, send
from hydraspec.base.facts import (
    explain_config,
    find_context,
    find_eos,
    first_line,
    parse_device,
    probe_cache_shapes,
    refuse_unfit,
    store_columns_first,
)
from hydraspec.base.fused import fuse
from hydraspec.base.generation import GenerationDefaults
from hydraspec.base.quantised import find_quantisation, refuse_quantised_output
from hydraspec.errors import CheckpointError, HydraspecError, UnsupportedModel
from hydraspec.hub import fetch
from hydraspec.tree.topology import Tree
from hydraspec.types import Verified

logger = logging.getLogger(__name__)

# What of a config decides whether heads fit; the rest (dtype, library version, generation defaults) may differ.
_IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


class BaseModel:
    """A frozen causal LM that verifies trees.

    Attributes:
        model: the transformers model, on one device, in evaluation mode.
        name: the path or hub id it came from.
        hidden_size: width d of its hidden states.
        vocab_size: entries V of its output layer.
        max_length: tokens of context that it was made for, or None where it does not say.
        eos_token_ids: the tokens that end a text.
        logit_scale, logit_softcap: what the model does to its logits after the output layer.
        generation_defaults: what its generation config asks of every text.
        fused: the fast path of models of Llama's shape on a CPU; None: the model class itself is run.

    Raises:
        UnsupportedModel: it keeps recurrent state, or its attention cannot follow a tree.
    """

    def __init__(self, model: PreTrainedModel, name: str = "", self_check: bool = True) -> None:
        refuse_unfit(type(model), model.config, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name or str(model.config._name_or_path)
        self.config = model.config.get_text_config(decoder=True)
        self.output_layer: nn.Module = model.get_output_embeddings()
        self.input_layer: nn.Module = model.get_input_embeddings()
        refuse_quantised_output(self.output_layer, self.name)
        parameter = self.input_layer.get_parameter("weight")
        self.device, self.dtype = parameter.device, parameter.dtype
        self.hidden_size = int(self.config.hidden_size)
        self.vocab_size = len(self.output_layer.get_parameter("weight"))
        self.max_length = find_context(self.config)
        self.eos_token_ids = find_eos(model)
        # A model without the attention interface keeps its own attention code, which adds its mask.
        self._explicit_masks = not type(model)._can_set_attn_implementation()
        self.logit_scale = float(getattr(self.config, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(self.config, "logits_scaling", None) or 1.0)
        self.logit_softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        self.cache_shapes = probe_cache_shapes(
            self.config, lambda cache: self.model(input_ids=ids, past_key_values=cache, use_cache=True), self.name
        )
        self.generation_defaults = GenerationDefaults(model, self.name)
        # On a GPU static shapes do more, and there the model class can be recorded as it is.
        self.fused = fuse(model) if self.device.type == "cpu" else None
        if self_check:
            self.check_tree_attention()

    @classmethod
    def load(
        cls,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        self_check: bool = True,
    ) -> BaseModel:
        """Load a model folder or hub id.

        Args:
            name: a folder with `config.json` and safetensors, or a hub id.
            device: where its weights go.
            dtype: of its weights; None: float32 on a CPU, the checkpoint's own elsewhere.
            self_check: compare a tree with its paths once, see `check_tree_attention`.

        Raises:
            CheckpointError: there is no such model, or its files are damaged or incomplete.
            UnsupportedModel: it cannot be decoded as a tree.
        """
        device = parse_device(device)
        folder = fetch(name, "model")
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for one reason
            raise CheckpointError(explain_config(folder, error)) from error
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if kind is None:
            raise UnsupportedModel(f"{name} is of type {config.model_type}, which is no causal language model")
        refuse_unfit(kind, config, name)
        # Quantised weights are made for a device; others are moved to it below.
        place = {"device_map": {"": device}} if find_quantisation(config, name) else {}
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype or "auto", output_loading_info=True, **place
            )
        except Exception as error:
            raise CheckpointError(f"the weights of {name} cannot be read: {first_line(error)}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name} lacks {len(missing)} of its tensors, the first is {missing[0]}; copy it again"
            )
        try:
            model = model if place else model.to(device)
        except torch.OutOfMemoryError as error:
            raise HydraspecError(f"{name} does not fit the memory of {device}: {first_line(error)}") from error
        base = cls(model, name, self_check)
        if base.fused is None and device.type == "cpu" and model.dtype == torch.float32:
            store_columns_first(model)
        return base

    # -- what heads and stages need -----------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings `[..., d]` of token ids `[...]`, scaled as the model scales them itself."""
        return self.input_layer(ids)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of final hidden states `[..., d]`, with the model's logit scale and soft-capping."""
        logits = self.output_layer(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    def describe_forward(self) -> str:
        """Dtype, device and threads, and which code runs the layers, in one line."""
        where = f"{torch.get_num_threads()} CPU threads" if self.device.type == "cpu" else str(self.device)
        how = "fused layers" if self.fused is not None else "the model class of transformers"
        return f"{str(self.dtype).removeprefix('torch.')} on {where}, {how}"

    def new_cache(self, batch: int, max_length: int) -> SlotCache:
        """An empty cache for `batch` sequences of `max_length` slots, tree nodes included."""
        return SlotCache(self.cache_shapes, batch, max_length, self.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, counts: Sequence[int], cache: SlotCache, rows: slice | None = None) -> Verified:
        """Read prompts, or further pieces of them, and commit them to the cache.

        Args:
            ids: `[B, T]` right-padded token ids.
            counts: real tokens in each row.
            cache: written and lengthened by `counts`.
            rows: the B rows of the cache that the sequences lie in; None: the first ones.

        Returns:
            Logits `[B, 1, V]` after each row's last real token, and the hidden states `[B, T, d]` of all tokens.
        """
        rows = rows or slice(0, len(ids))
        last = send(counts, self.device) - 1
        cache.layout_chain(ids.shape[1], rows)
        verified = self._forward(ids, cache, last)
        cache.advance(counts, rows)
        return verified

    @torch.inference_mode()
    def verify(self, tokens: Tensor, tree: Tree, cache: SlotCache) -> Verified:
        """One forward over all nodes of a filled tree, for the first B rows of the cache: `tokens` `[B, N]`.

        The cache keeps the nodes until its next forward: see `SlotCache.commit`.
        """
        cache.layout_tree(tree, slice(0, len(tokens)))
        return self._forward(tokens, cache)

    @torch.no_grad()
    def read_hidden_states(self, ids: Tensor, layout: StepLayout | None = None) -> Tensor:
        """Final hidden states `[B, T, d]` of token ids `[B, T]`, without a cache (for training).

        Args:
            ids: rows of one right-padded text each, or of several side by side.
            layout: of several texts in a row, see `layout_packed`; None: each row is one text.
        """
        with _Tap(self.output_layer, torch.zeros(len(ids), dtype=torch.long, device=ids.device)) as tap:
            if layout is None:
                self.model(input_ids=ids, use_cache=False)
            else:
                # With a mask at hand transformers does not guess from the positions where a text begins.
                positions, ones = layout.positions_within(self.max_length), torch.ones_like(ids)
                with attend_with(self.config, layout, self._explicit_masks):
                    self.model(input_ids=ids, position_ids=positions, attention_mask=ones, use_cache=False)
        return tap.hidden

    def _forward(self, ids: Tensor, cache: SlotCache, last: Tensor | None = None) -> Verified:
        layout = cache.layout
        assert layout is not None
        positions = layout.positions_within(self.max_length)
        if self.fused is not None:
            hidden = self.fused.forward(self.embed(ids), layout, positions, cache)
            asked = hidden if last is None else hidden[torch.arange(len(last), device=self.device), last][:, None]
            return Verified(logits=self.fused.project(asked), hidden=hidden)
        with attend_with(self.config, layout, self._explicit_masks), _Tap(self.output_layer, last) as tap:
            out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return Verified(logits=out.logits, hidden=tap.hidden)

    # -- identity and trust -------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A hash of the config's shape and the input embeddings, the same in float32 and bfloat16, on every device."""
        identity = {key: getattr(self.config, key, None) for key in _IDENTITY}
        weight = self.input_layer.get_parameter("weight")
        rows = torch.linspace(0, len(weight) - 1, min(len(weight), 1024)).long().to(weight.device)
        sample = weight.detach()[rows].to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(json.dumps(identity).encode() + sample.tobytes()).hexdigest()[:32]

    @torch.inference_mode()
    def check_tree_attention(self) -> None:
        """Compare a small tree behind ragged prompts with each of its paths read plainly.

        Raises:
            UnsupportedModel: the logits differ by more than rounding explains.
        """
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, self.vocab_size, (2, 5), generator=generator).to(self.device)
        lengths = [5, 3]
        tree = Tree([[0], [1], [0, 0], [1, 0], [1, 0, 0]], "self-check")
        tokens = torch.randint(0, self.vocab_size, (2, tree.num_nodes), generator=generator).to(self.device)
        cache = self.new_cache(2, 5 + tree.num_nodes)
        self.prefill(prompts, lengths, cache)
        seen = self.verify(tokens, tree, cache)
        exact = self.dtype == torch.float32 and not hasattr(self.config, "quantization_config")
        tolerance = 1e-3 if exact else 0.25  # wrong masks are off by 1.5 deviations and more
        for row, length in enumerate(lengths):
            for path in tree.leaf_paths.tolist():
                nodes = sorted(set(path), key=path.index)
                text = torch.cat([prompts[row, :length], tokens[row, nodes]])
                plain = self.model(input_ids=text[None], use_cache=False).logits[0, length:].float()
                if not plain.isfinite().all():
                    raise UnsupportedModel(f"{self.name} says nan: its weights are damaged; fetch or save them again")
                error = (seen.logits[row, nodes].float() - plain).abs().max() / plain.std().clamp_min(1e-6)
                if not error < tolerance:
                    raise UnsupportedModel(
                        f"{self.name} ({self.config.model_type}) cannot verify trees: their logits are off by "
                        f"{error:.2g} standard deviations from plain decoding; its attention ignores tree masks"
                    )
            hidden = seen.hidden[row].to(self.dtype)
            if not torch.allclose(self.project(hidden).float(), seen.logits[row].float(), rtol=1e-2, atol=1e-2):
                logger.warning(
                    "%s transforms its logits in an unknown way; tied vocabulary layers leave that out", self.name
                )


class _Tap:
    """The hidden states that enter the output layer during one forward.

    With `last` `[B]`, only that position of each sequence goes on into the output layer.
    """

    def __init__(self, layer: nn.Module, last: Tensor | None = None) -> None:
        self._layer, self._last = layer, last
        self.hidden: Tensor

    def __enter__(self) -> _Tap:
        self._handle = self._layer.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _take(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        self.hidden = args[0]
        if self._last is None:
            return None
        rows = torch.arange(len(self._last), device=self._last.device)
        return (args[0][rows, self._last][:, None],)
