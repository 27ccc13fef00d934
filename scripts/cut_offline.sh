#!/usr/bin/env bash
# Offline CUT (paper, Table 2): LLaMA2-13b learns from Shepherd's human judgments.
#
#   bash scripts/cut_offline.sh
#
# Hardware  8 GPUs of 80 GB. Hours (an estimate, not measured): about 1 for training, 1 for answers.
# Money     none; scores by gpt-4 $18 (scripts/evaluate_alpaca.sh).
# Expected  AlpacaEval win rate against text-davinci-003 with GPT-4 as judge: 1.87 before, 61.06
#           after for LLaMA2-13b; 81.09 before, 90.73 after for LLaMA2-13b-chat.
# Other data: DATA=my.json (records as in data/README.md); DATA=data/summary-train.json: the
#           summarization critiques of Table 3, fetched and converted if they are not there.
# Small     BASE_MODEL=smollm2-135m-instruct DATA=data/sample/train.jsonl GPUS=1 bash $0
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source scripts/cut_steps.sh

BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-2-13b-hf}
SHEPHERD=${SHEPHERD:-data/downloads/shepherd}
DATA=${DATA:-data/shepherd.json}
OUT=${OUT:-runs/cut-offline}
PROMPTS=${PROMPTS:-}              # default: the 805 AlpacaEval instructions, from the Hub
GPUS=${GPUS:-8}
LOAD_IN=${LOAD_IN:-auto}          # 8bit on CUDA, as released
CUTOFF_LEN=${CUTOFF_LEN:-2048}
MAX_STEPS=${MAX_STEPS:--1}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
THRESHOLD=${THRESHOLD:-1.1}       # lambda, searched in {1.1, 1.2}
WEIGHT_UNLIKE=${WEIGHT_UNLIKE:-1} # alpha, searched in {0.25, 0.5, 1}

# 1. Data, unless it is there. Shepherd: 1317 records, every one judged unsatisfactory.
if [ ! -e "$DATA" ]; then
    case "$DATA" in
    data/shepherd.json)
        python scripts/download_data.py shepherd
        python scripts/convert2alpaca.py --shepherd_model "$SHEPHERD/human_data_for_model.jsonl" \
            --shepherd_raw "$SHEPHERD/human_data_raw.jsonl" --output "$DATA" ;;
    data/summary-train.json)
        python scripts/download_data.py critiques
        for split in test train; do # the first is what evaluate_summarization.py measures on
            python scripts/convert2alpaca.py --output "data/summary-$split.json" \
                --critiques "data/downloads/critiques/$split.jsonl.gz"
        done ;;
    *)
        echo "error: $DATA is not there" >&2
        exit 1 ;;
    esac
fi

# 2. CUT.
train

# 3. The model and its answers.
merge_and_answer
