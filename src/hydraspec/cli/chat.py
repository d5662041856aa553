"""`hydraspec chat`: talk with a model in the terminal."""

from __future__ import annotations

from hydraspec.cli.options import Device, Dtype, Heads, Model, TreeName, takes
from hydraspec.config import DecodingConfig, EngineConfig, SamplingConfig


@takes(config=DecodingConfig, sampling=SamplingConfig, engine=EngineConfig)
def chat(
    model: Model,
    config: DecodingConfig,
    sampling: SamplingConfig,
    engine: EngineConfig,
    heads: Heads = None,
    tree: TreeName = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk with MODEL. /new starts over, Ctrl-C ends an answer, Ctrl-D ends the talk."""
    from rich.console import Console

    from hydraspec.cli.loading import load_quietly
    from hydraspec.errors import RequestError

    console = Console(highlight=False)
    llm = load_quietly(model, heads, tree, device, dtype, engine)
    if not llm.codec.is_chat:
        raise RequestError(f"{model} has no chat template: use hydraspec generate")
    console.print("/new starts over, Ctrl-C ends an answer, Ctrl-D ends the talk", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/new":
            messages = []
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            for piece in llm.stream(messages, **vars(config), **vars(sampling)):
                answer += piece
                console.print(piece, end="", style="cyan", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" …", end="", style="dim")
        except RequestError as error:
            console.print(f"{error}, or say /new", style="yellow")
            messages.pop()
            continue
        console.print()
        messages.append({"role": "assistant", "content": answer})
