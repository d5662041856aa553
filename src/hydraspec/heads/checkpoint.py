"""Heads on disk: `config.json` (shape and provenance) and `model.safetensors` (weights)."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hydraspec
from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.errors import CheckpointError, HydraspecError
from hydraspec.files import write_json, write_whole
from hydraspec.heads import build_heads
from hydraspec.heads.protocol import DraftHeads, choose_draft_dtype
from hydraspec.hub import fetch

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """What made a set of heads."""

    base: str  # path or hub id of the base model
    base_fingerprint: str  # BaseModel.fingerprint()
    data: str = ""  # what it was trained on, and how much of it
    recipe: dict[str, Any] = field(default_factory=dict)  # the training config
    measured: dict[str, Any] = field(default_factory=dict)  # what validation saw
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries


def library_versions() -> dict[str, str]:
    """Versions of what trains and runs heads."""
    return {
        "hydraspec": hydraspec.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save_heads(heads: DraftHeads, folder: Path, provenance: Provenance, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write heads into `folder`, each file whole; the config comes last, so that a torn folder is seen as one."""
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in heads.state_dict().items()
    }
    write_whole(folder / "model.safetensors", lambda file: save_file(tensors, file))
    content = {"format": FORMAT, "heads": heads.config.to_dict(), "provenance": dataclasses.asdict(provenance)}
    write_json(folder / "config.json", content)


def read_config(folder: Path) -> tuple[HeadsConfig, Provenance]:
    """Read `config.json` of a heads folder.

    Raises:
        CheckpointError: it is missing, or is not the config of heads.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(HeadsConfig)}
        unknown = set(content["heads"]) - known
        if content["format"] != FORMAT or unknown:
            raise CheckpointError(f"{file} is of a newer format ({', '.join(sorted(unknown)) or content['format']})")
        return HeadsConfig(**content["heads"]), Provenance(**content["provenance"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no heads: it has no config.json") from None
    except HydraspecError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is not the config of draft heads") from None


def load_heads(
    name: str, base: BaseModel, allow_other_base: bool = False, dtype: torch.dtype | None = None
) -> DraftHeads:
    """Load heads for `base`, on its device, ready to decode.

    Args:
        name: a folder or a hub id.
        base: the model that they shall draft for.
        allow_other_base: use heads that were trained on another model of the same shape, such as a fine-tuned one.
        dtype: of their weights; None: what `choose_draft_dtype` says.

    Raises:
        CheckpointError: they are missing, damaged, or do not fit the base model.
    """
    folder = Path(fetch(name, "heads"))
    config, provenance = read_config(folder)
    ours, theirs = (base.hidden_size, base.vocab_size), (config.hidden_size, config.vocab_size)
    if ours != theirs:
        raise CheckpointError(
            f"heads {name} do not fit {base.name}: they are for hidden size {theirs[0]} and vocabulary {theirs[1]}, "
            f"the model has {ours[0]} and {ours[1]}"
        )
    if provenance.base_fingerprint != base.fingerprint() and not allow_other_base:
        raise CheckpointError(
            f"heads {name} were trained for another model ({provenance.base}), not for {base.name}; "
            "use heads made for this one, or allow another base where it is a fine-tuned variant"
        )
    heads = build_heads(config)
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; copy the heads again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy the heads again") from None
    expected = heads.state_dict()
    if config.draft_vocabulary and "token_ids" in tensors:  # their vocabulary layers may be stored whole
        whole = {key for key in tensors if key.startswith("vocabulary.") and len(tensors[key]) == config.vocab_size}
        tensors |= {key: tensors[key][tensors["token_ids"]] for key in whole}
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise CheckpointError(f"{file} lacks the tensor {key}")
        if key not in expected:
            raise CheckpointError(f"{file} holds a tensor {key} that such heads do not have")
        if expected[key].shape != tensors[key].shape:
            raise CheckpointError(
                f"{file}: {key} has shape {list(tensors[key].shape)}, its config asks for {list(expected[key].shape)}"
            )
    heads.load_state_dict(tensors)
    return heads.prepare(base, dtype or choose_draft_dtype(base))
