"""The papers' recipes by name: what a training config leaves out, its recipe decides."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError
from hydraspec.train.objectives import Mix

# Medusa (section 2.2), Hydra and Hydra++ (sections 3 and 4, and the published code), EAGLE (section 3.2: w_cls 0.1).
RECIPES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "medusa": {"num_layers": 1, "data_weight": 1.0, "dropout": 0.0, "tied_vocabulary": False},
        "hydra": {"num_layers": 1, "data_weight": 1.0, "dropout": 0.0, "tied_vocabulary": False},
        "hydra++": {"num_layers": 4, "teacher_weight": 1.0, "dropout": 0.2, "tied_vocabulary": False},
        "eagle": {"num_layers": 1, "teacher_weight": 0.1, "reconstruction_weight": 1.0, "tied_vocabulary": True},
    }
)
_REST = {"data_weight": 0.0, "teacher_weight": 0.0, "reconstruction_weight": 0.0, "dropout": 0.0}


def resolve_recipe(config: TrainingConfig) -> TrainingConfig:
    """The config with everything that it leaves out filled in by its recipe.

    Raises:
        HydraspecError: there is no such recipe, or nothing is left to train on.
    """
    if config.recipe not in RECIPES:
        raise HydraspecError(f"no recipe is called {config.recipe!r}: choose {', '.join(RECIPES)}")
    values = {**_REST, **RECIPES[config.recipe]}
    resolved = dataclasses.replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})
    if not any((*dataclasses.astuple(mix_of(resolved)), resolved.reconstruction_weight)):
        raise HydraspecError("all objectives have weight 0: give one of them a weight, such as --teacher-weight 1")
    return resolved


def mix_of(config: TrainingConfig) -> Mix:
    """The weights of the objectives that read logits, of a resolved config."""
    assert config.data_weight is not None and config.teacher_weight is not None, "resolve the recipe first"
    return Mix(config.data_weight, config.teacher_weight, config.kl_weight, config.reverse_kl_weight)


def describe_losses(config: TrainingConfig) -> str:
    """The objectives of a resolved config and their weights, for people."""
    names = {
        "data_weight": "cross-entropy",
        "teacher_weight": "teacher cross-entropy",
        "kl_weight": "KL",
        "reverse_kl_weight": "reverse KL",
        "reconstruction_weight": "reconstruction",
        "noise": "noise",
        "dropout": "dropout",
    }
    return ", ".join(f"{name} {getattr(config, key):g}" for key, name in names.items() if getattr(config, key))
