"""Command-line options that derive from the frozen configs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer


def takes(config_class: type) -> Callable[[Callable], Callable]:
    """Give a command one option for each field of a config; the command gets the config as `config`."""
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    parameters = []
    for field in fields:
        kind: Any = hints[field.name]
        default = field.default
        if kind == tuple[str, ...]:  # an option that may be given several times
            kind, default = list[str] | None, None
        annotation = Annotated[kind, typer.Option(help=field.metadata["help"])]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]

        @wraps(command)
        def run(**values: Any) -> None:
            chosen = {field.name: values.pop(field.name) for field in fields}
            for name, value in chosen.items():
                if isinstance(value, list) or (value is None and hints[name] == tuple[str, ...]):
                    chosen[name] = tuple(value or ())
            command(config=config_class(**chosen), **values)

        signature = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + parameters
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature}
        return run

    return decorate


Model = Annotated[str, typer.Argument(help="a model folder, a hub id, or a shipped model: tiny-assistant")]
Heads = Annotated[str | None, typer.Option(help="heads: a folder, a hub id, or the kind that is shipped with MODEL")]
TreeName = Annotated[
    str | None, typer.Option("--tree", help="root, chain-K, small-8, small-16, published-63 or FILE.json")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; left out: a GPU where there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on a CPU")]
