"""`hydraspec generate`: continue one prompt, as a stream."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hydraspec.cli.options import Device, Dtype, Heads, Model, TreeName, takes
from hydraspec.config import DecodingConfig, EngineConfig, SamplingConfig


@takes(config=DecodingConfig, sampling=SamplingConfig, engine=EngineConfig)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    config: DecodingConfig,
    sampling: SamplingConfig,
    engine: EngineConfig,
    heads: Heads = None,
    tree: TreeName = None,
    raw: Annotated[bool, typer.Option("--raw", help="take the prompt as it is, without the chat template")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="print tokens, acceptance length and speed at the end")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Continue PROMPT with MODEL and print the text as it comes."""
    from hydraspec.cli.loading import load_quietly
    from hydraspec.types import Output

    text = sys.stdin.read() if prompt == "-" else prompt
    llm = load_quietly(model, heads, tree, device, dtype, engine)
    request = llm.make_request(text, raw=raw, **vars(config), **vars(sampling))
    output, seconds = Output(), 0.0
    for record, piece in llm.stream_steps(request, output, config.stop):
        seconds += record.seconds.total
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if stats:
        assert llm.plan is not None
        sys.stderr.write(f"{llm.plan.describe()}; {llm.base.describe_forward()}\n")
        speed = output.step_tokens / seconds if seconds else 0.0
        sys.stderr.write(
            f"{len(output.token_ids)} tokens, ended by {output.finish_reason}, "
            f"acceptance length {output.acceptance_length:.2f}, {speed:.0f} tokens/s\n"
        )
