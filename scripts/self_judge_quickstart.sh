#!/usr/bin/env bash
# SELF-JUDGE on a laptop: two CPU cores, 5 GB of memory, 3 GB of disk, 12 minutes after the installs.
#
#   bash scripts/self_judge_quickstart.sh
#
# SmolLM2-135M-Instruct learns to answer and to judge (JSFT) on rated answers of its own whose true
# winner is known (data/sample/preferences), trains itself on the samples that it prefers, and lets
# samples play a tournament. The judge is measured on held-out pairs, the policy on held-out prompts.
# It runs the same scripts as a full-size run. What is done is not done again; killed, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${MODEL:-smollm2-135m-instruct}
OUT=${OUT:-runs/self_judge_quickstart}
SEED=${SEED:-42}
DATA=${DATA:-data/sample/preferences}
PROMPTS=${PROMPTS:-$DATA/heldout.jsonl}
JSFT_STEPS=${JSFT_STEPS:--1}           # -1: one pass over the data
SELF_JUDGE_STEPS=${SELF_JUDGE_STEPS:-15}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-48}
TEMPLATES=configs/templates/judge_sample.yaml
SECONDS=0

# The held-out pairs and prompts were never used to choose anything.
audit() { # MODEL NAME
    [ -e "$OUT/judge_$2.json" ] && return
    python scripts/evaluate_judge.py --model "$1" --pairs "$DATA/hh_heldout.jsonl" \
        --templates "$TEMPLATES" --output "$OUT/judge_$2.json"
}
answer() { # MODEL NAME FLAGS...
    python scripts/self_reject.py --model "$1" --generator "$2" --templates "$TEMPLATES" \
        --data_path "$PROMPTS" --output_path "$OUT/$2.json" --max_length 256 \
        --max_new_tokens "$MAX_NEW_TOKENS" "${@:3}"
}

mkdir -p "$OUT"
echo "== 1/7 the model"
if [ "$MODEL" = smollm2-135m-instruct ]; then python scripts/get_model.py "$MODEL"; fi

echo "== 2/7 the judge before"
audit "$MODEL" base

echo "== 3/7 JSFT: learning to answer and to judge"
python train_jsft.py --config=configs/sample_jsft.yaml dataset.path="$DATA" \
    model.pretrained_model_name_or_path="$MODEL" training_args.output_dir="$OUT/jsft" \
    training_args.max_steps="$JSFT_STEPS" training_args.seed="$SEED"

echo "== 4/7 the judge after"
audit "$OUT/jsft" jsft

echo "== 5/7 self-training"
python train_self_judge.py --config=configs/sample_self_judge.yaml dataset.path="$DATA" \
    model.pretrained_model_name_or_path="$OUT/jsft" training_args.output_dir="$OUT/self_judge" \
    training_args.max_steps="$SELF_JUDGE_STEPS" training_args.seed="$SEED" \
    self_judge_args.max_new_tokens="$MAX_NEW_TOKENS"

echo "== 6/7 answers before and after, and a tournament among eight samples"
answer "$OUT/jsft" jsft --num_samples 1 --temperature 0
answer "$OUT/self_judge" self-judge --num_samples 1 --temperature 0
answer "$OUT/jsft" best-of --num_samples 8 --nested 1,2,4 --seed "$SEED"

echo "== 7/7 results"
outputs=$OUT/jsft.json,$OUT/self-judge.json
for size in .n1 .n2 .n4 ""; do outputs+=,$OUT/best-of$size.json; done
python scripts/evaluate_constraints.py --prompts "$PROMPTS" --outputs "$outputs" --show 3 \
    --output "$OUT/results.json"
python scripts/plot_self_judge.py --run_dir "$OUT"

cat <<END

done in $((SECONDS / 60)) min $((SECONDS % 60)) s; everything is in $OUT:
  jsft/         the model that answers and judges; self_judge/: the adapter upon it
  judge_base.json, judge_jsft.json       every judgment before and after
  jsft.json, self-judge.json, best-of.n1.json ... best-of.json (of 8)    the answers
  results.json, self_judge.png           the tables and the figure
END
