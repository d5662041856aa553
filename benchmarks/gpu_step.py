"""What a step costs on a GPU: stages, nodes, and how near a plain step comes to the memory's bandwidth.

python benchmarks/gpu_step.py [--shape vicuna-7b] [--forward auto] [--rounds 3] [--json FILE]

Base and heads have the shape of Vicuna-7B and of its published Hydra++ heads, and weights that count: after token t
comes t + 1, for both. So the weights of no checkpoint are needed, all that is guessed along first children is accepted,
and commits are as long as they get. Times do not depend on what the weights say; acceptance does, so it is no result.

Without a GPU the script runs unchanged on a small shape, to see that it works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common import console, report
from hydraspec.base.model import BaseModel
from hydraspec.config import EngineConfig
from hydraspec.decode.engine import Engine
from hydraspec.heads import DraftHeads, new_heads
from hydraspec.tree import PRESETS, Tree
from hydraspec.types import Output, Request, Seconds

SHAPES: dict[str, dict[str, int]] = {
    "vicuna-7b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "small": {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    },
}
STARS = (16, 32, 64)  # nodes: the root and its children, for the cost of verifying so many
PUBLISHED = "published-63"
PEERS = ("generate", "generate, static")  # of transformers: its default cache, and the one that it compiles for
STEP_TARGET, BANDWIDTH_TARGET = 1.35, 0.8
UNSETTLED = 3  # steps at the beginning of a run that are not counted
PEAK = 12.0  # deviations by which the next token's logit stands out
SMALL = 1e-3  # scale of what layers add to the residual stream


@dataclass
class Timing:
    """All runs of one method."""

    stages: list[Seconds] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds from the end of one step to the end of the next
    runs: list[float] = field(default_factory=list)  # seconds of whole calls, prefill included
    tokens: list[int] = field(default_factory=list)  # of the last run
    acceptance_length: float = 1.0

    def median_stage(self, stage: str) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(getattr(seconds, stage) for seconds in self.stages)

    @property
    def median_step(self) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of whole calls."""
        return len(self.tokens) / statistics.median(self.runs)


Method = Callable[[Timing], None]


def main(
    shape: Annotated[str | None, typer.Option(help="vicuna-7b or small; left out: by device")] = None,
    device: Annotated[str | None, typer.Option(help="left out: a GPU where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="left out: bfloat16 on a GPU, float32 on a CPU")] = None,
    forward: Annotated[str, typer.Option(help="our forward passes: eager, static, compile, or auto")] = "auto",
    shared_blocks: Annotated[bool, typer.Option(help="heads with one block applied three times")] = False,
    peers: Annotated[bool, typer.Option(help="run generate of transformers as well")] = True,
    prompt_length: int = 128,
    new_tokens: Annotated[int, typer.Option(min=32)] = 128,
    rounds: int = 3,
    json: Path | None = None,
) -> None:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    shape = shape or ("vicuna-7b" if place.type == "cuda" else "small")
    if shape not in SHAPES:
        raise typer.BadParameter(f"no shape is called {shape!r}: choose {', '.join(SHAPES)}")
    model = make_counting_model(SHAPES[shape], place, kind)
    base = BaseModel(model, shape)
    heads = make_counting_heads(base, shared_blocks)
    sizes = {"base parameters": count(model), "heads parameters": count(heads)}
    console.print(f"{shape} in {kind} on {place}, {sizes}")
    trees = {"root": PRESETS["root"], PUBLISHED: PRESETS[PUBLISHED]}
    trees |= {f"star-{nodes}": Tree([[rank] for rank in range(nodes - 1)], f"star-{nodes}") for nodes in STARS}
    prompt = torch.randint(0, SHAPES[shape]["vocab_size"], (prompt_length,), generator=torch.Generator().manual_seed(0))
    config = EngineConfig(max_batch=1, max_length=prompt_length + new_tokens, share_prefixes=False, forward=forward)
    methods = {
        name: decode_with(Engine(base, heads, tree, config), prompt.tolist(), new_tokens)
        for name, tree in trees.items()
    }
    if peers:
        ids = prompt[None].to(place)
        methods[PEERS[0]] = generate_with(model, ids, new_tokens)
        methods[PEERS[1]] = generate_with(model, ids, new_tokens, cache_implementation="static")
    timings, failed = take_turns(methods, rounds)
    summary = {**sizes, **summarise(timings, count_weights_read(model), measure_copy(place))}
    rows = []
    for name, tree in trees.items():
        timing = timings[name]
        row: dict[str, Any] = {"tree": name, "nodes": tree.num_nodes}
        row |= {stage: timing.median_stage(stage) for stage in ("draft", "verify", "accept", "commit")}
        rows.append(row | {"whole step": timing.median_step, "accepted": timing.acceptance_length})
    facts = {"shape": shape, "dtype": str(kind).removeprefix("torch."), "device": str(place), "forward": forward}
    facts |= {"prompt_length": prompt_length, "new_tokens": new_tokens, "rounds": rounds, "failed": failed}
    report("milliseconds a step, batch 1, medians", rows, json, **facts, summary=summary)
    for key, value in summary.items():
        console.print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value:,}")
    for name, why in failed.items():
        console.print(f"{name} failed: {why}")


def summarise(timings: dict[str, Timing], weights: int, copy_bandwidth: float) -> dict[str, Any]:
    """What the targets are about, and whole calls against those of transformers."""
    plain, step = timings["root"].median_step, timings[PUBLISHED].median_step
    summary: dict[str, Any] = {
        f"64-node step / plain step (target {STEP_TARGET})": step / plain,
        "64-node verify / plain verify": timings[PUBLISHED].median_stage("verify")
        / timings["root"].median_stage("verify"),
        "weights read by a plain step, bytes": weights,
        "plain step, GB/s of weights": weights / plain / 1e6,
        "large copy, GB/s read and written": copy_bandwidth / 1e9,
        f"plain step / copy bandwidth (target {BANDWIDTH_TARGET})": weights / (plain / 1e3) / copy_bandwidth,
    }
    for name in ("root", *PEERS):
        if name in timings:
            summary[f"{'plain (our loop)' if name == 'root' else name}, tokens/s"] = timings[name].tokens_per_second
    same = [name for name, timing in timings.items() if timing.tokens == timings["root"].tokens]
    return {**summary, "methods with the plain loop's tokens": len(same), "methods": len(timings)}


def take_turns(methods: dict[str, Method], rounds: int) -> tuple[dict[str, Timing], dict[str, str]]:
    """Run all methods `rounds` times in turn after a warm-up each; peers that fail are left out, with the reason."""
    timings: dict[str, Timing] = {}
    failed: dict[str, str] = {}
    with Progress(console=console, transient=True) as bar:
        for name in bar.track(list(methods), description="warm-up"):
            if name not in PEERS:
                methods[name](Timing())
            elif why := warm_up(methods[name]):
                failed[name] = why
                continue
            timings[name] = Timing()
        for _ in bar.track(range(rounds), description="in turn"):
            for name, timing in timings.items():
                methods[name](timing)
    return timings, failed


def warm_up(method: Method) -> str | None:
    """Run a peer once; why it fails, if it does, as its compiler may."""
    try:
        method(Timing())
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def decode_with(engine: Engine, prompt: list[int], new_tokens: int) -> Method:
    """Our loop: the clock is read when a step's tokens have come to the host, so that a step is all that it takes."""

    def run(timing: Timing) -> None:
        output, ends = Output(), []
        start = time.perf_counter()
        records = []
        for record in engine.run([Request(tuple(prompt), new_tokens)], [output]):
            if record.nodes:
                ends.append(time.perf_counter())
                records.append(record.seconds)
        timing.runs.append(time.perf_counter() - start)
        timing.steps += [after - before for before, after in pairwise(ends)][UNSETTLED - 1 :]
        timing.stages += records[UNSETTLED:]
        timing.tokens, timing.acceptance_length = output.token_ids, output.acceptance_length

    return run


def generate_with(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options: Any) -> Method:
    """Greedy `generate` of transformers; with a static cache it compiles its forward on a GPU by itself."""

    def run(timing: Timing) -> None:
        start = time.perf_counter()
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        timing.tokens = out[0, ids.shape[1] :].tolist()
        timing.runs.append(time.perf_counter() - start)

    return run


# -- models that count -----------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors are of `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def make_counting_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama whose layers add next to nothing to a token's embedding, and whose output layer names the next one."""
    config = AutoConfig.for_model(
        "llama", **shape, max_position_embeddings=2048, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    with torch.device(device):  # no float32 copy, and none in the host's memory
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(SMALL)
    embeddings = model.get_input_embeddings().weight.normal_()
    # Its logit stands out by PEAK deviations of the others: more would be coarser in bfloat16 than the others differ.
    share = PEAK / shape["hidden_size"] ** 0.5
    model.get_output_embeddings().weight.normal_().add_(embeddings.roll(1, 0), alpha=share)
    return model


@torch.no_grad()
def make_counting_heads(base: BaseModel, shared_blocks: bool) -> DraftHeads:
    """Hydra++ heads of the published shape whose first blocks pass on the last token's embedding."""
    d = base.hidden_size
    with torch.device(base.device), default_dtype(base.dtype):
        heads = new_heads(base, "hydra++", num_heads=4, num_layers=4, shared_blocks=shared_blocks)
        for weight in heads.blocks.parameters():
            weight.normal_(0, SMALL / d**0.5)
        for block in heads.blocks:
            block.first.residual.weight[:, -d:] += torch.eye(d)
    return heads.prepare(base)


def count(model: torch.nn.Module) -> int:
    """Parameters, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_weights_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a step of one token reads: all but the embeddings, of which it reads one row."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    return weights - embeddings.numel() * embeddings.element_size()


def measure_copy(device: torch.device, repeats: int = 20) -> float:
    """Bytes a second, read and written, of a copy within the device's memory that is larger than all of its caches."""
    size = 1 << (31 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats + 3):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[3:])


if __name__ == "__main__":
    typer.run(main)
