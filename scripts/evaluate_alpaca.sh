#!/usr/bin/env bash
# AlpacaEval of a model (paper, Tables 2, 5 and 6): answers, judgments, win rate.
#
#   OPENAI_API_KEY=... bash scripts/evaluate_alpaca.sh runs/cut-offline/model
#   ANNOTATOR=local BASE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME \
#       bash scripts/evaluate_alpaca.sh runs/cut-offline/model        # a server of your own judges
#
# Money     gpt-4: $18 by the published judgments' own account; gpt-4o-mini: 0.10 (an estimate).
# Hours     1 GPU of 80 GB for a 13B model's answers (an estimate), a quarter for the judgments.
# Expected  LLaMA2-13b 1.87, with CUT 61.06; LLaMA2-chat-13b 81.09, with CUT 90.73 (ANNOTATOR as is).
# Stopped?  The same command goes on; nothing is generated or asked twice.
# Small     PROMPTS, REFERENCE: your own prompts and other answers to them; LIMIT: the first so many.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${1:?which model? bash scripts/evaluate_alpaca.sh FOLDER}
MODEL=${MODEL%/}
ANNOTATOR=${ANNOTATOR:-alpaca_eval_gpt4}   # as published; weighted_alpaca_eval_gpt4_turbo; local
JUDGE_MODEL=${JUDGE_MODEL:-}               # default: the annotator's own
BASE_URL=${BASE_URL:-}                     # default: OPENAI_BASE_URL, else OpenAI
FOLDER=${MODEL%/model}                     # of its answers: a recipe leaves them beside RUN/model
[[ -d $MODEL || $MODEL = */*/* ]] || FOLDER=runs/${MODEL##*/} # a name is no folder
OUTPUTS=${OUTPUTS:-$FOLDER/alpaca_eval.json}
PROMPTS=${PROMPTS:-}                       # default: the 805 AlpacaEval instructions, from the Hub
REFERENCE=${REFERENCE:-}                   # default: text-davinci-003's answers, from the Hub
TEMPLATE=${TEMPLATE:-alpaca}
LIMIT=${LIMIT:-0}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MAX_COST=${MAX_COST:-0}                    # dollars; 0 is no limit
PRICE_IN=${PRICE_IN:-}                     # dollars per million tokens of prompts, and of replies,
PRICE_OUT=${PRICE_OUT:-}                   # of a model that configs/prices.yaml lacks
GENERATE=${GENERATE:-}                     # further flags of generate.py: "--load_in 8bit" for 70B

if [[ $REFERENCE = *.json* ]]; then need REFERENCE "$REFERENCE"; fi  # else a name of the Hub's
judge() { # FLAGS...
    python scripts/evaluate_alpaca.py --model_outputs "$OUTPUTS" --annotator "$ANNOTATOR" \
        --max_cost "$MAX_COST" ${JUDGE_MODEL:+--judge_model "$JUDGE_MODEL"} \
        ${PRICE_IN:+--price_in "$PRICE_IN"} ${PRICE_OUT:+--price_out "$PRICE_OUT"} \
        ${BASE_URL:+--base_url "$BASE_URL"} "$@"
}

judge --dry_run # a missing key or price stops here, not after an hour of answers
python scripts/generate.py --base_model_name_or_path "$MODEL" --template "$TEMPLATE" \
    --output_path "$OUTPUTS" --max_new_tokens "$MAX_NEW_TOKENS" --limit "$LIMIT" \
    ${PROMPTS:+--data_path "$PROMPTS"} $GENERATE
judge ${REFERENCE:+--reference_outputs "$REFERENCE"}
