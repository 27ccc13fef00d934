#!/usr/bin/env bash
# SELF-JUDGE on UltraFeedback: Llama-2-7B learns to answer and to judge, then from its own
# judgments of its own answers.
#
#   bash scripts/self_judge_uf.sh
#   PRINCIPLES=1 bash scripts/self_judge_uf.sh  # four principles vote; the judge gives its reasons
#   METHOD=sft bash scripts/self_judge_uf.sh    # a comparison
#   DRY_RUN=1 bash scripts/self_judge_uf.sh     # shows its commands
#
# The lines of all comparisons are in configs/paper_tables.yaml.
#
# Hardware  8 GPUs of 80 GB. Hours (estimates, not measured): 3 for JSFT (10 with principles); 90
#           for self-training (the paper's longest run, on A100s; that it was this one is a guess);
#           a quarter for the answers. METHOD rso, raft or rest instead of self-training: 15 (38
#           with principles) for samples and verdicts; LABEL_SAMPLES=4: a third.
# Money     none; scores by gpt-4 $18 for each file of answers (scripts/evaluate_alpaca.sh).
# Expected  Judge accuracy on held-out pairs 80.5 %, with principles and rationales 84.0 %; the win
#           rate of the tournament grows with N = 1 .. 16.
# Stopped?  The same command goes on; only the accuracy of the judge is measured again.
# Small     BASE_MODEL=smollm2-135m-instruct DATA=data/sample/preferences/train.jsonl EVAL_SIZE=20 \
#               GPUS=1 ACCUMULATION=1 MAX_STEPS=2 MAX_NEW_TOKENS=32 NUM_SAMPLES=4 NESTED=1,2 \
#               LOAD_IN=fp32 PROMPTS=data/sample/heldout.jsonl bash $0
#           (For PRINCIPLES=1 bring DATA with all four ratings; the sample's have no honesty.)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source scripts/self_judge_steps.sh

PRINCIPLES=${PRINCIPLES:-}           # 1: a prompt for each of the four; 0 or empty: one prompt
PRINCIPLES=${PRINCIPLES#0}
RATIONALES=${RATIONALES:-1}          # with PRINCIPLES=1; 0: decisions alone are learnt
BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-openbmb/UltraFeedback}  # or a folder, or a file
EVAL_SIZE=${EVAL_SIZE:-1000}         # records held out of it to measure on
METHOD=${METHOD:-self_judge}         # jsft|sft|judge|dpo|offline|rso|raft|rest
OUT=${OUT:-runs/${METHOD/_/-}-uf${PRINCIPLES:+-pr}}
JSFT=${JSFT:-$OUT/jsft}              # where it is or goes; METHODs can share one
JUDGE=${JUDGE:-reference}            # frozen; policy is the live variant
ROUNDS=${ROUNDS:-1}                  # of self-training, each from the last one's policy
LABEL_SAMPLES=${LABEL_SAMPLES:-8}    # of rso, raft and rest, to a prompt (ours)
LABEL_FLAGS=${LABEL_FLAGS:-}         # further ones of label_samples.py: "--thresholds 0.5"
PROMPTS=${PROMPTS:-}                 # default: the 805 AlpacaEval instructions, from the Hub
GPUS=${GPUS:-8}
ACCUMULATION=${ACCUMULATION:-$(accumulation)} # 128 rows a step in JSFT, 64 queries in self-training
JSFT_CONFIG=${JSFT_CONFIG:-configs/uf_jsft${PRINCIPLES:+_pr}.yaml}
SELF_JUDGE_CONFIG=${SELF_JUDGE_CONFIG:-configs/uf_self_judge${PRINCIPLES:+_pr}.yaml}
TEMPLATES=${TEMPLATES:-configs/templates/judge_uf${PRINCIPLES:+_principles}.yaml}
SECTION=$TEMPLATES
if [ "$RATIONALES" = 0 ]; then SECTION="{file: $TEMPLATES, decision_rationale: null}"; fi
MAX_STEPS=${MAX_STEPS:--1}           # of each training
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-768}
NUM_SAMPLES=${NUM_SAMPLES:-16}
NESTED=${NESTED:-1,2,4,8}            # further tournaments, among the first so many samples
LOAD_IN=${LOAD_IN:-bf16}             # to judge and to answer; fp32 on a CPU
BATCH_TOKENS=${BATCH_TOKENS:-65536}  # sampled at once; lower it if memory is short
OVERRIDES=${OVERRIDES:-}             # of both trainings: section.key=value ...
DATASET=(dataset.path="$DATA" dataset.eval_size="$EVAL_SIZE")

learn
answers "${METHOD/_/-}-uf${PRINCIPLES:+-pr}"
