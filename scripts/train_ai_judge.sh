#!/usr/bin/env bash
# The AI judge (CUT paper): a model that learns to write judgments, in the place of GPT-4.
#
#   bash scripts/train_ai_judge.sh
#   LIMIT=500 OUT=runs/ai_judge-500 bash scripts/train_ai_judge.sh   # less data (Figure 3)
#   python scripts/annotate.py --judge local --model runs/ai_judge/model ...   # put to use
#
# Money     none.
# Hardware  8 GPUs of 80 GB. Hours (an estimate, not measured): 0.5, the check on held-out responses
#           included. Money: none, the judgments are published.
# Data      DATA: files of judgment records, separated by commas; HELD_OUT responses of them are not
#           trained on. The published judgments are GPT-4's on 5 x 1000 responses, so a judge copies
#           it; about three in four find nothing wrong.
# Ends with how many held-out judgments can be read, and how often the judge is right about whether
#           there is a fault; the share that always gives the more frequent answer stands beside it.
# Small     BASE_MODEL=smollm2-135m-instruct DATA=data/sample/train.jsonl GPUS=1 HELD_OUT=40 \
#               NUM_EPOCHS=1 LEARNING_RATE=2e-3 WARMUP_STEPS=3 MAX_NEW_TOKENS=64 bash $0
#           4 minutes of one core. Tried once: all 40 judgments could be read, and all said
#           "perfect", which is right of 60 %: that little training teaches the form, not to judge.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

CUT_ITER=data/downloads/cut_iter/train-alpaca-sample-iter
BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-2-13b-chat-hf}
DATA=${DATA:-${CUT_ITER}1.json,${CUT_ITER}2.json,${CUT_ITER}3.json,${CUT_ITER}4.json,${CUT_ITER}5.json}
OUT=${OUT:-runs/ai_judge}
LIMIT=${LIMIT:-0}                 # responses to train on; 0 is all but the held-out ones
HELD_OUT=${HELD_OUT:-500}
GPUS=${GPUS:-8}
LOAD_IN=${LOAD_IN:-auto}          # 8bit on CUDA, as released
CUTOFF_LEN=${CUTOFF_LEN:-2048}
NUM_EPOCHS=${NUM_EPOCHS:-3}       # ours, as the two below
LEARNING_RATE=${LEARNING_RATE:-2e-4}
WARMUP_STEPS=${WARMUP_STEPS:-10}
MAX_STEPS=${MAX_STEPS:--1}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-512}

# 1. Data: the judge prompt around each response, and the judgment with its decision to learn.
if [[ "$DATA" == "$CUT_ITER"* ]]; then
    for file in ${DATA//,/ }; do
        if [ ! -e "$file" ]; then python scripts/download_data.py cut_iter; break; fi
    done
fi
python scripts/make_judge_data.py --data_path "$DATA" --output_dir "$OUT/data" \
    --held_out "$HELD_OUT" --limit "$LIMIT"

# 2. Plain fine-tuning on the judgments: no record is negative, so nothing is contrasted.
torchrun --nproc_per_node="$GPUS" finetune_unlikelihood.py \
    --base_model "$BASE_MODEL" --data_path "$OUT/data/train.json" --output_dir "$OUT/adapter" \
    --prompt_template_name plain --weight_unlike 0 \
    --batch_size 8 --micro_batch_size 1 --num_epochs "$NUM_EPOCHS" \
    --learning_rate "$LEARNING_RATE" --warmup_steps "$WARMUP_STEPS" --cutoff_len "$CUTOFF_LEN" \
    --load_in "$LOAD_IN" --gradient_checkpointing True --max_steps "$MAX_STEPS" --save_steps 50
python merge.py --base_model_name_or_path "$BASE_MODEL" --peft_model_path "$OUT/adapter" \
    --output_dir "$OUT/model"

# 3. What the judge says of held-out responses, beside what the records say.
torchrun --nproc_per_node="$GPUS" scripts/annotate.py --data_path "$OUT/data/held_out.json" \
    --output_path "$OUT/held_out_judged.json" --judge local --model "$OUT/model" \
    --max_new_tokens "$MAX_NEW_TOKENS" --max_failed 1
python scripts/evaluate_ai_judge.py --truth "$OUT/data/held_out.json" \
    --judged "$OUT/held_out_judged.json" --output "$OUT/held_out_results.json"
echo "judge: $OUT/model"
