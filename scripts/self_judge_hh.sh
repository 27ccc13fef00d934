#!/usr/bin/env bash
# SELF-JUDGE on HH-Helpful: Llama-2-7B learns to answer and to judge, then from its own judgments
# of its own answers.
#
#   bash scripts/self_judge_hh.sh
#   METHOD=rso JSFT=runs/self-judge-hh/jsft bash scripts/self_judge_hh.sh
#   DRY_RUN=1 bash scripts/self_judge_hh.sh                     # shows its commands
#
# The second is one of the comparisons; the lines of all are in configs/paper_tables.yaml.
#
# Hardware  8 GPUs of 80 GB. Hours (estimates, not measured): 1 for JSFT, 40 for self-training (the
#           paper's longest run took about 90 on A100s), a quarter for the answers. METHOD rso,
#           raft or rest instead of self-training: 8 for samples and verdicts; LABEL_SAMPLES=4:
#           less than half.
# Money     none; scores by gpt-4 $18 for each file of answers (scripts/evaluate_alpaca.sh).
# Expected  AlpacaEval 44.88, VicunaEval 76.25 against SFT, MT-Bench 4.80, as answered greedily; the
#           win rate of the tournament grows with N = 1 .. 16.
# Stopped?  The same command goes on; only the accuracy of the judge is measured again.
# Small     BASE_MODEL=smollm2-135m-instruct DATA=data/sample/preferences/hh_train.jsonl \
#               EVAL=data/sample/preferences/hh_validation.jsonl GPUS=1 ACCUMULATION=1 \
#               MAX_STEPS=2 MAX_NEW_TOKENS=32 NUM_SAMPLES=4 NESTED=1,2 LOAD_IN=fp32 \
#               PROMPTS=data/sample/heldout.jsonl bash $0
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source scripts/self_judge_steps.sh

BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-Anthropic/hh-rlhf}   # or a folder with the same subfolders, or a file
EVAL=${EVAL:-test}                # the split to measure on; where DATA is a file, another
METHOD=${METHOD:-self_judge}      # jsft|sft|judge|dpo|offline|rso|raft|rest
OUT=${OUT:-runs/${METHOD/_/-}-hh}
JSFT=${JSFT:-$OUT/jsft}           # where it is or goes; METHODs can share one
JUDGE=${JUDGE:-reference}         # frozen; policy is the live variant
ROUNDS=${ROUNDS:-1}               # of self-training, each from the last one's policy
LABEL_SAMPLES=${LABEL_SAMPLES:-8} # of rso, raft and rest, to a prompt (ours)
LABEL_FLAGS=${LABEL_FLAGS:-}      # further ones of label_samples.py: "--thresholds 0.5"
PROMPTS=${PROMPTS:-}              # default: the 805 AlpacaEval instructions, from the Hub
GPUS=${GPUS:-8}
ACCUMULATION=${ACCUMULATION:-$(accumulation)} # 128 rows a step in JSFT, 64 queries in self-training
JSFT_CONFIG=${JSFT_CONFIG:-configs/hh_jsft.yaml}
SELF_JUDGE_CONFIG=${SELF_JUDGE_CONFIG:-configs/hh_self_judge.yaml}
TEMPLATES=${TEMPLATES:-configs/templates/judge_hh.yaml}
SECTION=$TEMPLATES
MAX_STEPS=${MAX_STEPS:--1}        # of each training
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-768}
NUM_SAMPLES=${NUM_SAMPLES:-16}
NESTED=${NESTED:-1,2,4,8}         # further tournaments, among the first so many samples
LOAD_IN=${LOAD_IN:-bf16}          # to judge and to answer; fp32 on a CPU
BATCH_TOKENS=${BATCH_TOKENS:-65536} # sampled at once; lower it if memory is short
OVERRIDES=${OVERRIDES:-}          # of both trainings: section.key=value ...
DATASET=(dataset.path="$DATA" dataset.eval="$EVAL")

learn
answers "${METHOD/_/-}-hh"
