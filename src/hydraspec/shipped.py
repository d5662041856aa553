"""The models that come with the package, by short name."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# In an installed package the models lie inside it; in a checkout, beside src.
_HOMES = (_PACKAGE / "models", _PACKAGE.parent.parent / "models")

DEMO_MODEL = "tiny-assistant"


def find_shipped(name: str) -> str:
    """The path of the shipped model or heads called `name`, or `name` itself where there are none."""
    if not Path(name).exists() and "/" not in name:
        for home in _HOMES:
            if (home / name / "config.json").is_file():
                return str(home / name)
    return name


def find_shipped_heads(name: str, model: str) -> str:
    """As `find_shipped`; a kind such as `hydra++` names the heads shipped with `model`."""
    found = find_shipped(f"{Path(model).name}-{name}")
    return found if Path(found).is_dir() else find_shipped(name)
