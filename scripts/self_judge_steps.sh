# Sourced by self_judge_hh.sh and self_judge_uf.sh: the steps of both. The variables, and the array
# DATASET of overrides that name the data, are the recipe's own.

launch() { # ACCELERATE_YAML SCRIPT FLAGS...
    if [ "$GPUS" = 1 ]; then python "${@:2}"; else
        accelerate launch --config_file="$1" --num_processes "$GPUS" "${@:2}"
    fi
}

# OVERRIDES holds several words, so it stands without quotes.
train() { # ACCELERATE_YAML SCRIPT CONFIG MODEL FOLDER OVERRIDES...
    launch "$1" "$2" --config="$3" model.pretrained_model_name_or_path="$4" \
        training_args.output_dir="$5" templates="$TEMPLATES" "${DATASET[@]}" \
        training_args.max_steps="$MAX_STEPS" \
        training_args.gradient_accumulation_steps="$ACCUMULATION" $OVERRIDES "${@:6}"
}

# Learn to answer and to judge; then what the judge is worth, on the pairs that were held out.
jsft() {
    train configs/jsft_accelerate.yaml train_jsft.py "$JSFT_CONFIG" "$BASE_MODEL" "$OUT/jsft"
    python scripts/evaluate_judge.py --model "$OUT/jsft" --pairs "$OUT/jsft/config.yaml" \
        --templates "$TEMPLATES" --load_in "$LOAD_IN" --output "$OUT/judge.json"
}

self_training() {
    train configs/self_judge_accelerate.yaml train_self_judge.py "$SELF_JUDGE_CONFIG" "$OUT/jsft" \
        "$OUT/self_judge" self_judge_args.max_new_tokens="$MAX_NEW_TOKENS"
}

# Answers to AlpacaEval: greedy ones, and the winners of tournaments. Greedy decoding is self_reject
# with one sample too: generate.py writes prompts by other templates than JSFT trains with, and
# does not merge an adapter upon an adapter.
answers() { # NAME
    answer "$1" "$OUT/greedy.json" --num_samples 1 --temperature 0
    answer "$1-tournament" "$OUT/tournament.json" --num_samples "$NUM_SAMPLES" --nested "$NESTED"
    echo "policy: $OUT/self_judge; answers: $OUT/greedy.json, $OUT/tournament*.json"
    echo "win rates: python scripts/evaluate_alpaca.py --model_outputs $OUT/greedy.json"
}

answer() { # NAME FILE FLAGS...
    python scripts/self_reject.py --model "$OUT/self_judge" --templates "$TEMPLATES" \
        --generator "$1" --output_path "$2" --max_new_tokens "$MAX_NEW_TOKENS" \
        --load_in "$LOAD_IN" --batch_tokens "$BATCH_TOKENS" \
        ${PROMPTS:+--data_path "$PROMPTS"} "${@:3}"
}
