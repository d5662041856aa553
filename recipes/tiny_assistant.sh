#!/usr/bin/env bash
# Train the heads that are shipped for tiny-assistant: three kinds, the same number of tokens each.
#
# Usage: recipes/tiny_assistant.sh TRAIN.jsonl.gz EVAL.jsonl.gz OUT_FOLDER [KIND ...]
#
# The data are conversations in ShareGPT form. The shipped heads saw Schema-Guided Dialogue, Taskmaster-4 and GSM8K;
# recipes/tiny_base.py tells how to make such a file. 22 to 35 minutes a kind on one core of a 2.8 GHz Xeon.
set -euo pipefail
train=${1:?the training conversations}
eval=${2:?the held-out conversations}
out=${3:?the folder for the heads}
shift 3
kinds=("$@")
[ ${#kinds[@]} -gt 0 ] || kinds=(medusa hydra hydra++)

for kind in "${kinds[@]}"; do
  # Medusa gets vocabulary layers of its own, as published: with the base model's, frozen, it is much weaker.
  tied=(--tied-vocabulary)
  [ "$kind" != medusa ] || tied=()
  hydraspec train --base tiny-assistant --recipe "$kind" --data "$train" --eval-data "$eval" \
    --out "$out/tiny-assistant-$kind" "${tied[@]}" --draft-vocabulary 2048 --max-tokens 3500000 \
    --batch-tokens 2048 --micro-tokens 2048 \
    --dropout 0 --max-length 512 --learning-rate 3e-3 --warmup-steps 100 --final-learning-rate 0.05 --seed 0
done
