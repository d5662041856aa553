#!/usr/bin/env bash
# Train the heads that are shipped for tiny-assistant: three kinds, the same number of tokens each.
#
# Usage: recipes/tiny_assistant.sh TRAIN.jsonl.gz EVAL.jsonl.gz OUT_FOLDER [KIND ...]
#
# The data are conversations in ShareGPT form; recipes/tiny_base.py tells how to make such files. The shipped heads saw
# the first questions of Schema-Guided Dialogue, Taskmaster-4 and GSM8K, answered by tiny-assistant itself.
set -euo pipefail
train=${1:?the training conversations}
eval=${2:?the held-out conversations}
out=${3:?the folder for the heads}
shift 3
kinds=("$@")
[ ${#kinds[@]} -gt 0 ] || kinds=(medusa hydra hydra++)

mkdir -p "$out"
own=$out/own_answers.jsonl.gz
[ -f "$own" ] ||
  hydraspec regenerate "$train" --base tiny-assistant --batch 48 --limit 10776 --out "$own"

for kind in "${kinds[@]}"; do
  # Medusa gets vocabulary layers of its own, as published: with the base model's, frozen, it is much weaker.
  tied=(--tied-vocabulary)
  [ "$kind" != medusa ] || tied=()
  # All learn the base's own distribution, which made each of them guess better than the data's tokens do.
  hydraspec train --base tiny-assistant --recipe "$kind" --data "$own" --eval-data "$eval" \
    --out "$out/tiny-assistant-$kind" "${tied[@]}" --teacher-weight 1 --data-weight 0 \
    --draft-vocabulary 2048 --max-tokens 3500000 --epochs 3 --batch-tokens 2048 --micro-tokens 2048 \
    --dropout 0 --max-length 512 --learning-rate 3e-3 --warmup-steps 100 --final-learning-rate 0.05 --seed 0
done
