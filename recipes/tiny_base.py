"""Train tiny-assistant, the small base model that the library ships, from conversations to a model folder.

Usage: python recipes/tiny_base.py --train TRAIN.jsonl.gz --eval EVAL.jsonl.gz --out FOLDER

The shipped model saw three public data sets: Schema-Guided Dialogue, train and dev (CC BY-SA 4.0), Taskmaster-4
(CC BY 4.0), and GSM8K, train (MIT), with the calculator marks (`<<150*1.5=225>>`) removed. It was evaluated on
Schema-Guided Dialogue, test, and GSM8K, test. To train it again, fetch these by name and write them in the ShareGPT
form, one JSON object a line, as JSONL or JSONL.gz:

    {"id": ..., "source": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}

- The dialogue sets: what the user says is `human`, what the system says is `gpt`; turns alternate, begin with `human`
  and end with `gpt`.
- GSM8K: the question is `human`, its solution is `gpt`, ending in "The answer is 42" where the set writes "#### 42".

Shuffled, this made 25,455 conversations (5,198,532 tokens) to train on: 12,174 of Schema-Guided Dialogue train, 2,098
of its dev, 3,710 of Taskmaster-4 and 7,473 of GSM8K; and 4,240 (985,069 tokens) to evaluate on: 2,921 and 1,319. How
the dialogues were picked is not recorded (Schema-Guided Dialogue holds more: 16,142, 2,482 and 4,201), so that another
conversion gives a model like the shipped one, not the same. The training took 70 minutes on one CPU core with bfloat16
autocast and ended at a loss of 1.83 nats a token, 2.43 on the evaluation set.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hydraspec.cli.loading import silence_transformers
from hydraspec.config import TrainingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.text import TextCodec
from hydraspec.train.conversations import read_conversations
from hydraspec.train.forward import pick_autocast
from hydraspec.train.loop import learning_rate
from hydraspec.train.objectives import cross_entropy

SPECIAL_TOKENS = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>"]  # ids 0 … 3
VOCABULARY = 4096
CONTEXT = 1024
WINDOW = 256  # tokens read at once in training
WINDOWS = 16  # in a batch
EVAL_WINDOWS = 256  # spread evenly, so that every evaluation reads the same text
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role']=='user' else '<|assistant|>' }}{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Talk = list[dict[str, str]]  # messages: role and content
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    train: Annotated[Path, typer.Option(help="conversations to train on, in ShareGPT form: JSONL, or JSONL.gz")],
    evaluate: Annotated[Path, typer.Option("--eval", help="held-out conversations, in the same form")],
    out: Annotated[Path, typer.Option(help="folder for the model; it must be new or empty")],
    steps: Annotated[int, typer.Option(help="batches of 16 windows of 256 tokens", min=1)] = 2040,
    seed: Annotated[int, typer.Option(help="seed of the initial weights and of the choice of windows")] = 0,
    autocast: Annotated[
        str, typer.Option(help="bfloat16 or float32; auto: bfloat16 where the CPU has instructions for it")
    ] = "auto",
) -> None:
    """Train a tokenizer and a small Llama on the CPU, and save them in one folder. Ctrl-C ends it and saves nothing."""
    silence_transformers()
    config = TrainingConfig(
        learning_rate=2e-3, warmup_steps=100, final_learning_rate=0.05, weight_decay=0.1, autocast=autocast, seed=seed
    )
    out = out.resolve()  # its parent is written to, and "." names none
    check_paths(train, evaluate, out)
    try:
        train_to_folder(train, evaluate, out, config, steps)
    except KeyboardInterrupt:
        sys.stderr.write("tiny_base: stopped; nothing is saved\n")
        raise typer.Exit(130) from None


def train_to_folder(train: Path, evaluate: Path, out: Path, config: TrainingConfig, steps: int) -> None:
    """From the files of conversations to the model folder."""
    console = Console(highlight=False)
    talks, held_out = ([list(talk.messages) for talk in read_conversations(file)] for file in (train, evaluate))
    with console.status("training the tokenizer"):
        tokenizer = train_tokenizer(talks)
    with console.status("encoding the conversations"):
        tokens, eval_tokens = encode_talks(tokenizer, talks, train), encode_talks(tokenizer, held_out, evaluate)
    torch.manual_seed(config.seed)
    model = make_model()
    console.print(
        f"tiny-assistant: {model.num_parameters():,} parameters; {len(talks):,} conversations of {len(tokens):,} "
        f"tokens to train on, {len(held_out):,} of {len(eval_tokens):,} to evaluate on"
    )
    minutes = estimate_seconds(model, tokens, config, steps) / 60
    trained = steps * WINDOWS * WINDOW
    console.print(f"{trained:,} tokens in {steps:,} steps: about {minutes:.1f} min; Ctrl-C ends and saves nothing")
    fit(model, tokens, config, steps, console)
    with console.status("evaluating"):
        loss = measure_loss(model, eval_tokens, config)
    save(model, tokenizer, out)
    console.print(f"evaluation loss {loss:.3f} nats a token; saved to {out}")


def check_paths(train: Path, evaluate: Path, out: Path) -> None:
    """Refuse what would only fail later: data files that are not there, a folder in use or that cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HydraspecError(f"{out} is there already and not empty: name another folder, or remove it")
    for file in (train, evaluate):
        if not file.is_file():
            raise DataError(f"data file {file} does not exist")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise HydraspecError(f"{out} cannot be made ({error.strerror}): name another folder") from None


def train_tokenizer(talks: list[Talk]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of what is said in `talks`, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((message["content"] for talk in talks for message in talk), trainer)
    pad, end = SPECIAL_TOKENS[0], SPECIAL_TOKENS[3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, model_max_length=CONTEXT, chat_template=TEMPLATE
    )


def encode_talks(tokenizer: PreTrainedTokenizerFast, talks: list[Talk], file: Path) -> Tensor:
    """Every conversation as the chat template writes it, one after the other: `[N]` int64.

    Raises:
        DataError: `file`, where they come from, holds less than one window of tokens.
    """
    codec = TextCodec(tokenizer)
    ids: list[int] = []
    for talk in talks:
        ids += tokenizer(codec.render(talk), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= WINDOW:
        raise DataError(f"{file} holds {len(ids)} tokens; training reads windows of {WINDOW}: add conversations")
    return torch.tensor(ids)


def make_model() -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def cut_windows(tokens: Tensor, starts: Tensor) -> Tensor:
    """Windows of `tokens` at `starts`, each with the token that follows its last: `[R, WINDOW + 1]` int64."""
    return tokens[starts[:, None] + torch.arange(WINDOW + 1)]


def draw_batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of windows that begin anywhere, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield cut_windows(tokens, torch.randint(len(tokens) - WINDOW, (WINDOWS,), generator=generator))


def compute_loss(model: LlamaForCausalLM, windows: Tensor, config: TrainingConfig) -> Tensor:
    """The mean loss of every next token in the windows, whoever says it."""
    with pick_autocast(model.device, config.autocast):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def estimate_seconds(model: LlamaForCausalLM, tokens: Tensor, config: TrainingConfig, steps: int) -> float:
    """What the training will take, from two batches tried and thrown away."""
    spent = []
    for windows in draw_batches(tokens, 2, config.seed):
        start = time.perf_counter()
        compute_loss(model, windows, config).backward()
        spent.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return min(spent) * steps


def fit(model: LlamaForCausalLM, tokens: Tensor, config: TrainingConfig, steps: int, console: Console) -> None:
    """Train `model` in place on random windows of `tokens`."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay)
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, loss=math.nan)
        losses: list[float] = []
        for step, windows in enumerate(draw_batches(tokens, steps, config.seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            loss = compute_loss(model, windows, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise HydraspecError(f"the loss is {losses[-1]} at step {step}: try --autocast float32")
            bar.update(task, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))


@torch.inference_mode()
def measure_loss(model: LlamaForCausalLM, tokens: Tensor, config: TrainingConfig) -> float:
    """The mean loss on windows spread evenly over held-out text."""
    count = min(EVAL_WINDOWS, (len(tokens) - 1) // WINDOW)
    windows = cut_windows(tokens, torch.arange(count) * ((len(tokens) - 1) // count))
    return sum(float(compute_loss(model, batch, config)) * len(batch) for batch in windows.split(WINDOWS)) / count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder whole: under a temporary name first, then renamed."""
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        tokenizer.save_pretrained(temporary)
        model.to(torch.bfloat16).save_pretrained(temporary)
        for path in (temporary, *temporary.iterdir()):  # temporary names are made for their owner's eyes only
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.replace(out)  # an empty folder gives way
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run() -> None:
    """Run the recipe; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except HydraspecError as error:
        sys.stderr.write(f"tiny_base: {' '.join(str(error).split())}\n")
        sys.exit(2)


if __name__ == "__main__":
    run()
