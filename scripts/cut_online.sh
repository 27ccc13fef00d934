#!/usr/bin/env bash
# Online CUT (paper, Table 6): rounds of responses, judgments and training, each from the last model.
#
#   OPENAI_API_KEY=... bash scripts/cut_online.sh                    # configs/cut_online.env
#   CONFIG=configs/cut_online_small.env bash scripts/cut_online.sh   # two CPU cores, no key
#   ROUNDS=1 JUDGE=human ... bash scripts/cut_online.sh              # any variable of the file
#
# Hardware, hours, money and what to expect stand in the two files. Stopped, even killed: the same
# command goes on. scripts/cut_online_iter.sh runs a single round on the authors' own judgments.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source "${CONFIG:-configs/cut_online.env}"

if [ "$MODEL" = smollm2-135m-instruct ]; then python scripts/get_model.py "$MODEL"; fi
if [ "$INSTRUCTIONS" = data/downloads/alpaca/alpaca_data.json ] && [ ! -e "$INSTRUCTIONS" ]; then
    python scripts/download_data.py alpaca
fi
python scripts/online.py --model "$MODEL" --instructions "$INSTRUCTIONS" --output_dir "$OUT" \
    --rounds "$ROUNDS" --per_round "$PER_ROUND" --samples "$SAMPLES" \
    --temperature "$TEMPERATURE" --max_new_tokens "$MAX_NEW_TOKENS" --seed "$SEED" \
    --judge "$JUDGE" --gpus "$GPUS" --train_settings="$TRAIN" \
    ${JUDGE_MODEL:+--judge_model "$JUDGE_MODEL"} ${JUDGING:+--judge_settings="$JUDGING"} \
    ${GENERATION:+--generate_settings="$GENERATION"} \
    ${EVAL_PROMPTS:+--eval_prompts "$EVAL_PROMPTS"} ${ANNOTATOR:+--annotator "$ANNOTATOR"} \
    ${EVALUATION:+--evaluate_settings="$EVALUATION"} "$@"
