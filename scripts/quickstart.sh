#!/usr/bin/env bash
# CUT on a laptop: two CPU cores, 4 GB of memory, 3 to 7 minutes after the installs.
#
#   bash scripts/quickstart.sh
#
# Trains SmolLM2-135M-Instruct with CUT on 200 short judged responses (data/sample), then lets the
# model before and after answer 60 held-out prompts whose constraints a program can check. It
# runs the same scripts as a full-size run. What is done is not done again; killed, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${MODEL:-smollm2-135m-instruct}
OUT=${OUT:-runs/quickstart}
SEED=${SEED:-42}
PROMPTS=${PROMPTS:-data/sample/heldout.jsonl}
SECONDS=0

# PROMPTS were never used to choose anything; the settings of step 3 were chosen on
# data/sample/validation.jsonl (see data/sample/README.md).
answer() { # MODEL NAME
    python scripts/generate.py --base_model_name_or_path "$1" --generator "$2" \
        --data_path "$PROMPTS" --output_path "$OUT/$2.json" --max_new_tokens 64
}

echo "== 1/6 the model"
if [ "$MODEL" = smollm2-135m-instruct ]; then python scripts/get_model.py "$MODEL"; fi

echo "== 2/6 answers before"
answer "$MODEL" base

echo "== 3/6 CUT"
python finetune_unlikelihood.py --base_model "$MODEL" --data_path data/sample/train.jsonl \
    --output_dir "$OUT/adapter" --batch_size 8 --micro_batch_size 8 --num_epochs 1 \
    --learning_rate 2e-3 --warmup_steps 3 --threshold 1.1 --weight_unlike 0.25 \
    --logging_steps 1 --save_steps 10 --seed "$SEED"

echo "== 4/6 merging the adapter into the model"
python merge.py --base_model_name_or_path "$MODEL" --peft_model_path "$OUT/adapter" \
    --output_dir "$OUT/model"

echo "== 5/6 answers after"
answer "$OUT/model" cut

echo "== 6/6 results"
python scripts/plot_training.py --run_dir "$OUT/adapter" --output "$OUT/loss.png"
python scripts/evaluate_constraints.py --prompts "$PROMPTS" \
    --outputs "$OUT/base.json,$OUT/cut.json" --output "$OUT/results.json"

cat <<END

done in $((SECONDS / 60)) min $((SECONDS % 60)) s; everything is in $OUT:
  model/        the aligned model: AutoModelForCausalLM.from_pretrained("$OUT/model")
  adapter/      the LoRA adapter, run.json (settings, versions, data hash), trainer_state.json
  base.json, cut.json    the answers before and after; results.json: the table above
  loss.png      the training curves
END
