#!/usr/bin/env bash
# Offline CUT (paper, Table 2): LLaMA2-13b learns from Shepherd's human judgments. Its baselines and
# ablations (Tables 2 to 4), other models (Table 5) and rewards (Figure 4) too: the line of each row
# is the `recipe` in configs/paper_tables.yaml.
#
#   bash scripts/cut_offline.sh
#   OBJECTIVE=hindsight OUT=runs/hindsight bash scripts/cut_offline.sh        # a baseline
#   WITHOUT=l1 AS_IN_PAPER=True OUT=runs/without-l1 bash scripts/cut_offline.sh   # an ablation
#   DRY_RUN=1 bash scripts/cut_offline.sh                                     # shows its commands
#
# Hardware  8 GPUs of 80 GB. Hours (an estimate, not measured): about 1 for training, a
#           quarter for answers.
# Money     none; scores by gpt-4 $18 (scripts/evaluate_alpaca.sh). Judgments of UltraFeedback by
#           gpt-4: $90 for 4000 responses (an estimate).
# Expected  AlpacaEval win rate against text-davinci-003 with GPT-4 as judge: 1.87 before, 61.06
#           after for LLaMA2-13b; 81.09 before, 90.73 after for LLaMA2-13b-chat.
# Other data: DATA=my.json (records as in data/README.md). Fetched and converted if they are not
#           there: data/summary-train.json, the summarization critiques of Table 3; and of Figure 4
#           data/ultrafeedback-1000.json, four responses each to 1000 (or another number of)
#           instructions of UltraFeedback with their ratings, and
#           data/ultrafeedback-1000-judged.json, the same with judgments (OPENAI_API_KEY).
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
ACCELERATE=${ACCELERATE:-}        # with configs/accelerate_fsdp2.yaml also LOAD_IN=bf16
LOAD_IN=${LOAD_IN:-auto}          # 8bit on CUDA, as released; bf16 takes 26 GB and is faster (estimate)
CUTOFF_LEN=${CUTOFF_LEN:-2048}
MAX_STEPS=${MAX_STEPS:--1}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MERGE_ON=${MERGE_ON:-auto}        # cpu where no GPU holds the whole model
GENERATE=${GENERATE:-}            # further flags of scripts/generate.py, such as "--load_in 8bit"
OBJECTIVE=${OBJECTIVE:-}          # cut, or mle|forward|hindsight|ilf_mle|ilf_dpo|dpo|unlikelihood
WITHOUT=${WITHOUT:-}              # of CUT: l1, align_p, align_n, detection, weight
case "$OBJECTIVE" in              # CUT's rate is the paper's; that of DPO is ours, 4e-4 is too fast
*dpo) LEARNING_RATE=${LEARNING_RATE:-5e-5} ;;
*) LEARNING_RATE=${LEARNING_RATE:-4e-4} ;;
esac
AS_IN_PAPER=${AS_IN_PAPER:-False} # the paper's equations, for its ablations; else as released
THRESHOLD=${THRESHOLD:-1.1}       # lambda, searched in {1.1, 1.2}
WEIGHT_UNLIKE=${WEIGHT_UNLIKE:-1} # alpha, searched in {0.25, 0.5, 1}
GAMMA=${GAMMA:-0}                 # searched in {0.25, 0.5, 1, 2}; 0 as released, or 1 AS_IN_PAPER

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
    data/ultrafeedback-[0-9]*.json)
        rated=${DATA/-judged/}
        if [ ! -e "$rated" ]; then
            python scripts/download_data.py ultrafeedback
            python scripts/convert2alpaca.py --ultrafeedback data/downloads/ultrafeedback \
                --limit "${rated//[^0-9]/}" --output "$rated"
        fi
        if [ "$DATA" != "$rated" ]; then # 1 in 10 may fail; they are left out, and told
            # Where more fail, annotate.py writes the others and stops: no DATA to train on
            part=${DATA%.json}.part.json
            python scripts/annotate.py --data_path "$rated" --output_path "$part" \
                --judge server --model gpt-4 --max_cost 300 --max_failed 0.1
            for more in .judgments.jsonl .summary.json ""; do mv "$part$more" "$DATA$more"; done
        fi ;;
    *)
        echo "error: $DATA is not there" >&2
        exit 1 ;;
    esac
fi
case "$OBJECTIVE" in # the model refines what has no refinement; Shepherd and the critiques have
ilf_*)
    shared scripts/refine.py --base_model_name_or_path "$BASE_MODEL" --data_path "$DATA" \
        --output_path "$OUT/refined.jsonl"
    DATA=$OUT/refined.jsonl ;;
esac

# 2. CUT, or what it is compared with.
train ${OBJECTIVE:+--objective "$OBJECTIVE"} ${WITHOUT:+--without "$WITHOUT"} \
    --gamma "$GAMMA" --as_in_paper "$AS_IN_PAPER"

# 3. The model and its answers.
merge_and_answer
