#!/usr/bin/env bash
# How the quickstart's settings were chosen: trials on data/sample's validation prompts.
#
#   bash scripts/sweep_sample.sh        # about 5 minutes a trial on two cores
#
# A trial is a line of TRIALS, "name flags ...", over the flags common to all. Finished trials are
# kept, so lines can be added. The result is a table over all trials; data/sample/README.md holds
# the one that was made. The held-out prompts play no part here.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${MODEL:-smollm2-135m-instruct}
OUT=${OUT:-runs/sweep}
DATA=${DATA:-data/sample/train.jsonl}
PROMPTS=${PROMPTS:-data/sample/validation.jsonl}
WORKERS=${WORKERS:-2}   # trials at a time, with one thread each
TRIALS=${TRIALS:-configs/sweep_sample.txt}
export MODEL OUT DATA PROMPTS OMP_NUM_THREADS=1

trial() { # NAME FLAGS...
    local name=$1
    shift
    python finetune_unlikelihood.py --base_model "$MODEL" --data_path "$DATA" \
        --output_dir "$OUT/$name/adapter" --batch_size 8 --micro_batch_size 8 \
        --logging_steps 1 "$@"
    python scripts/generate.py --base_model_name_or_path "$MODEL" \
        --peft_model_path "$OUT/$name/adapter" --generator "$name" --data_path "$PROMPTS" \
        --output_path "$OUT/$name/answers.json" --max_new_tokens 64
}
logged() { # NAME FLAGS...
    if [ -n "${DRY_RUN:-}" ]; then trial "$@"; return; fi
    mkdir -p "$OUT/$1"
    trial "$@" > "$OUT/$1/log" 2>&1 && echo "done: $1"
}
export -f trial logged

mkdir -p "$OUT"
python scripts/generate.py --base_model_name_or_path "$MODEL" --generator base \
    --data_path "$PROMPTS" --output_path "$OUT/base.json" --max_new_tokens 64
if [ -n "${DRY_RUN:-}" ]; then WORKERS=1; fi
grep -v '^#' "$TRIALS" | xargs -P "$WORKERS" -I{} bash -c 'logged {}'
outputs=$(grep -v '^#' "$TRIALS" | while read -r name _; do echo -n ",$OUT/$name/answers.json"; done)
python scripts/evaluate_constraints.py --prompts "$PROMPTS" --outputs "$OUT/base.json$outputs" \
    --show 0 --output "$OUT/results.json"
