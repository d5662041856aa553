"""Command-line options that derive from the frozen configs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from hydraspec.errors import RequestError


def takes(**configs: type) -> Callable[[Callable], Callable]:
    """Give a command one option for each field of some configs; the command gets each config under its name here."""
    fields = {name: dataclasses.fields(config) for name, config in configs.items()}
    hints = {name: get_type_hints(config) for name, config in configs.items()}
    parameters = []
    for name in configs:
        for field in fields[name]:
            kind: Any = hints[name][field.name]
            default = field.default
            if kind in _REPEATED:  # an option that may be given several times
                kind, default = _REPEATED[kind], None
            annotation = Annotated[kind, typer.Option(help=field.metadata["help"])]
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in configs]

        @wraps(command)
        def run(**values: Any) -> None:
            made = {}
            for name, config in configs.items():
                chosen = {field.name: values.pop(field.name) for field in fields[name]}
                for key, value in chosen.items():
                    if hints[name][key] in _REPEATED:
                        chosen[key] = tuple(map(_parse_pair, value or ()) if key == "logit_bias" else value or ())
                made[name] = config(**chosen)
            command(**made, **values)

        signature = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + parameters
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature}
        return run

    return decorate


# How the command line takes fields that hold several values.
_REPEATED: dict[Any, Any] = {
    tuple[str, ...]: list[str] | None,
    tuple[int, ...]: list[int] | None,
    tuple[float, ...]: list[float] | None,
    tuple[tuple[int, float], ...]: list[str] | None,
}


def _parse_pair(text: str) -> tuple[int, float]:
    """`TOKEN=BIAS` as numbers."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RequestError(f"--logit-bias reads TOKEN=BIAS, for example 42=-5.0; not {text!r}") from None


Model = Annotated[str, typer.Argument(help="a model folder, a hub id, or a shipped model: tiny-assistant")]
Heads = Annotated[str | None, typer.Option(help="heads: a folder, a hub id, or the kind that is shipped with MODEL")]
TreeName = Annotated[
    str | None,
    typer.Option(
        "--tree", help="root, chain-K, small-8, small-16, published-63, FILE.json, or by load: 4:small-16,16:root"
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; left out: a GPU where there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on a CPU")]
