"""Write the model cards of the shipped models, from their configs and from measured acceptance lengths.

python recipes/model_cards.py models benchmarks/results/acceptance.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydraspec.files import write_whole
from hydraspec.heads.checkpoint import read_config

DATA = """\
Made from English conversations, cut to what an assistant of this size can learn:

- Schema-Guided Dialogue, train and dev (CC BY-SA 4.0)
- Taskmaster-4 (CC BY 4.0)
- GSM8K, train, without its calculator marks (MIT)

Schema-Guided Dialogue test and GSM8K test were never trained on; figures are measured on those."""

BASE = f"""\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# tiny-assistant

A small but real assistant, to decode with where nothing can be downloaded: it books tables, hotels, cinema seats and
coffee, and imitates school arithmetic. Its answers are coherent in form and often wrong in fact; use it to try decoding
methods, for nothing else.

Llama, 6 layers, d 256, 4 heads, vocabulary 4096 (byte-level BPE), context 1024, tied embeddings: 5.87 M parameters,
stored in bf16.

{DATA}

Recipe: `recipes/tiny_base.py`; about 2,040 steps of 16 windows of 256 tokens (8.4 M tokens),
70 minutes on one CPU core.
Training loss 1.83, evaluation loss 2.43 nats a token.
"""


HEADS = """\
---
license: apache-2.0
base_model: tiny-assistant
---
# {name}

Draft heads ({kind}) for `tiny-assistant`: they guess tokens ahead, the base model checks them; what is written is the
base model's own. {num_heads} heads of {blocks}; vocabulary layer: {vocabulary};
the {draft_vocabulary} most frequent tokens are proposed.

```python
llm = hydraspec.load("tiny-assistant", heads="{kind}")
```

{data}

The heads learned from the base model's own greedy answers to the questions of 10,776 of these conversations
(`hydraspec regenerate`), with the base model's distribution as the target.

Recipe: `recipes/tiny_assistant.sh`. {trained_on}, {steps} steps,
{minutes:.0f} minutes on one busy core of an AMD EPYC ({tokens_per_second} tokens/s).

How often a head is right about the base model's own choice, on held-out text, given the true tokens before:

| head | top-1 | top-5 |
|---|---|---|
{accuracy}

Acceptance length, greedy, on 100 held-out prompts:

| tree | tokens a step |
|---|---|
{lengths}
"""


def describe_heads(folder: Path, rows: list[dict[str, Any]]) -> str:
    config, provenance = read_config(folder)
    measured = provenance.measured
    lengths = [f"| {row['tree']} | {row['acceptance length']:.2f} |" for row in rows if row["heads"] == config.kind]
    accuracy = [
        f"| {head} | {one:.1%} | {five:.1%} |"
        for head, (one, five) in enumerate(zip(measured["top1"], measured["top5"], strict=True))
    ]
    return HEADS.format(
        name=folder.name,
        kind=config.kind,
        num_heads=config.num_heads,
        blocks="1 block" if config.num_layers == 1 else f"{config.num_layers} blocks",
        vocabulary="the base model's" if config.tied_vocabulary else "one a head",
        draft_vocabulary=config.draft_vocabulary or config.vocab_size,
        data=DATA,
        trained_on=provenance.data,
        steps=provenance.recipe["steps"],
        minutes=measured["training_seconds"] / 60,
        tokens_per_second=measured["tokens_per_second"],
        accuracy="\n".join(accuracy),
        lengths="\n".join(lengths),
    )


def main(models: Path, acceptance: Path) -> None:
    rows = json.loads(acceptance.read_text(encoding="utf-8"))["rows"]
    for folder in sorted(models.iterdir()):
        card = BASE if folder.name == "tiny-assistant" else describe_heads(folder, rows)
        write_whole(folder / "README.md", lambda file, card=card: file.write_text(card, encoding="utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
