#!/usr/bin/env bash
# MT-Bench of a model, and VicunaEval against another one (SELF-JUDGE): answers, judgments, scores.
#
#   OPENAI_API_KEY=... bash scripts/evaluate_dialogues.sh runs/cut-offline/model
#   SFT=runs/sft/model bash scripts/evaluate_dialogues.sh runs/cut-offline/model  # VicunaEval too
#   JUDGE=NAME BASE_URL=http://127.0.0.1:8000/v1 \
#       bash scripts/evaluate_dialogues.sh runs/cut-offline/model  # a server of your own judges
#
# Money     with gpt-4 $8 for each of the two, with gpt-4o 0.60 (estimates).
# Hours     1 GPU of 80 GB: 0.2 for a 7B model's answers, 0.2 for the judgments (estimates).
# Expected  SELF-JUDGE on HH-Helpful: MT-Bench 4.80, VicunaEval 76.25 against SFT; the judge's
#           prompt there was another one (see the scripts).
# Stopped?  The same command goes on; nothing is generated or asked twice.
# Small     MT_BENCH, VICUNA: your own questions; LIMIT: the first so many.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${1:?which model? bash scripts/evaluate_dialogues.sh FOLDER}
MODEL=${MODEL%/}
SFT=${SFT:-}                      # the baseline of VicunaEval; empty: MT-Bench alone
FOLDER=${MODEL%/model}            # of the answers: beside a recipe's RUN/model
[[ -d $MODEL || $MODEL = */*/* ]] || FOLDER=runs/${MODEL##*/} # a name is no folder
OUT=${OUT:-$FOLDER}
TEMPLATE=${TEMPLATE:-alpaca}      # or chat; SELF-JUDGE: configs/templates/chat.jinja
JUDGE=${JUDGE:-gpt-4}
BASE_URL=${BASE_URL:-}            # default: OPENAI_BASE_URL, else OpenAI
QUESTIONS=data/downloads/mt_bench/question.jsonl
MT_BENCH=${MT_BENCH:-$QUESTIONS}
VICUNA=${VICUNA:-data/downloads/vicuna/question.jsonl}
LIMIT=${LIMIT:-0}
# GPT-4's answers to math, coding and reasoning; the first 20 questions have none
if [ "$MT_BENCH" = "$QUESTIONS" ] && { [ "$LIMIT" = 0 ] || [ "$LIMIT" -gt 20 ]; }; then
    REFERENCES=${REFERENCES-data/downloads/mt_bench/reference_answer/gpt-4.jsonl}
fi
REFERENCES=${REFERENCES:-}        # empty: the questions' own
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024}
MAX_COST=${MAX_COST:-0}           # dollars, of each of the two; 0 is no limit
PRICE_IN=${PRICE_IN:-}            # dollars per million tokens of prompts, and of replies,
PRICE_OUT=${PRICE_OUT:-}          # of a model that configs/prices.yaml lacks

answer() { # MODEL QUESTIONS OUTPUT FLAGS...
    python scripts/generate_dialogues.py --base_model_name_or_path "$1" --data_path "$2" \
        --output_path "$3" --template "$TEMPLATE" --max_new_tokens "$MAX_NEW_TOKENS" \
        --limit "$LIMIT" "${@:4}"
}

judge() { # mt_bench|vicuna FLAGS...
    python "scripts/evaluate_$1.py" --judge_model "$JUDGE" --max_cost "$MAX_COST" \
        ${PRICE_IN:+--price_in "$PRICE_IN"} ${PRICE_OUT:+--price_out "$PRICE_OUT"} \
        ${BASE_URL:+--base_url "$BASE_URL"} "${@:2}"
}

# a missing key or price stops here, not after an hour of answers
judge mt_bench --answers "$OUT/mt_bench.json" --dry_run
if [ ! -e "$MT_BENCH" ] || [ ! -e "${REFERENCES:-$MT_BENCH}" ]; then
    python scripts/download_data.py mt_bench
fi
need REFERENCES "${REFERENCES:-$MT_BENCH}"
answer "$MODEL" "$MT_BENCH" "$OUT/mt_bench.json"
judge mt_bench --answers "$OUT/mt_bench.json" \
    ${REFERENCES:+--references "$REFERENCES"}

if [ -n "$SFT" ]; then
    if [ ! -e "$VICUNA" ]; then python scripts/download_data.py vicuna; fi
    answer "$MODEL" "$VICUNA" "$OUT/vicuna.json" --temperature 0
    answer "$SFT" "$VICUNA" "$OUT/vicuna_sft.json" --temperature 0
    judge vicuna --answers "$OUT/vicuna.json" --baseline "$OUT/vicuna_sft.json"
fi
