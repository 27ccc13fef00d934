# Sourced by self_judge_hh.sh and self_judge_uf.sh: the steps of both. The variables, and the array
# DATASET of overrides that name the data, are the recipe's own. SECTION is what the trainings read
# as their templates.

# Micro-batches a step, so that it has as many examples on GPUS GPUs as on the papers' 8.
accumulation() {
    if [ $((8 % GPUS)) != 0 ]; then
        echo "error: GPUS=$GPUS does not divide 8: set ACCUMULATION too, and the examples of a" \
            "GPU by OVERRIDES=training_args.per_device_train_batch_size=N" >&2
        return 1
    fi
    echo $((8 / GPUS))
}

launch() { # ACCELERATE_YAML SCRIPT FLAGS...
    if [ "$GPUS" = 1 ]; then python "${@:2}"; else
        accelerate launch --config_file="$1" --num_processes "$GPUS" "${@:2}"
    fi
}

# Each GPU answers, or labels, its share of the prompts.
shared() { # SCRIPT FLAGS...
    if [ "$GPUS" = 1 ]; then python "$@"; else torchrun --nproc_per_node="$GPUS" "$@"; fi
}

# OVERRIDES holds several words, so it stands without quotes.
train() { # ACCELERATE_YAML SCRIPT CONFIG MODEL FOLDER OVERRIDES...
    launch "$1" "$2" --config="$3" model.pretrained_model_name_or_path="$4" \
        training_args.output_dir="$5" templates="$SECTION" "${DATASET[@]}" \
        training_args.max_steps="$MAX_STEPS" \
        training_args.gradient_accumulation_steps="$ACCUMULATION" $OVERRIDES "${@:6}"
}

fine_tuning() { # MODEL FOLDER OVERRIDES...
    train configs/jsft_accelerate.yaml train_jsft.py "$JSFT_CONFIG" "$@"
}

preference_training() { # MODEL FOLDER OVERRIDES AND FLAGS...
    train configs/self_judge_accelerate.yaml train_self_judge.py "$SELF_JUDGE_CONFIG" "$@"
}

# What the judge in FOLDER is worth, on the pairs that were held out.
audit() { # FOLDER
    python scripts/evaluate_judge.py --model "$1" --pairs "$1/config.yaml" \
        --templates "$TEMPLATES" --load_in "$LOAD_IN" --output "$(dirname "$1")/judge.json"
}

# Learn to answer and to judge.
jsft() {
    fine_tuning "$BASE_MODEL" "$JSFT"
    audit "$JSFT"
}

# Samples of the JSFT model to the training prompts, chosen by its own judgments. What was sampled
# and judged for one of the three serves the others. LABEL_FLAGS stands without quotes as well.
labels() { # rso|raft|rest
    shared scripts/label_samples.py --model "$JSFT" --data_path "$JSFT/config.yaml" \
        --templates "$TEMPLATES" --num_samples "$LABEL_SAMPLES" --select "$1" \
        --samples_path "$(dirname "$JSFT")/labels.samples.jsonl" --output_path "$OUT/$1.jsonl" \
        --max_new_tokens "$MAX_NEW_TOKENS" --load_in "$LOAD_IN" --batch_tokens "$BATCH_TOKENS" \
        $LABEL_FLAGS
}
labelled=(dataset.eval=null dataset.eval_size=0) # nothing is held out of what was labelled

# What METHOD says; leaves the policy in POLICY. The comparisons with the same judge start from the
# same JSFT model as SELF-JUDGE; SFT and DPO, which have no judge, from the base.
learn() {
    POLICY=$OUT/model
    case "$METHOD" in
    self_judge) # on-policy: samples, verdicts and preferences of one step
        POLICY=$OUT/self_judge
        jsft
        preference_training "$JSFT" "$POLICY" self_judge_args.max_new_tokens="$MAX_NEW_TOKENS" \
            self_judge_args.judge="$JUDGE" --rounds "$ROUNDS"
        if [ "$ROUNDS" -gt 1 ]; then POLICY=$POLICY/round$ROUNDS; fi ;;
    jsft) # without self-training
        POLICY=$JSFT
        jsft ;;
    sft) fine_tuning "$BASE_MODEL" "$POLICY" jsft_args.examples=sft ;;
    judge) # judging alone
        fine_tuning "$BASE_MODEL" "$POLICY" jsft_args.examples=judge
        audit "$POLICY" ;;
    dpo) # the dataset's pairs, after SFT
        fine_tuning "$BASE_MODEL" "$OUT/sft" jsft_args.examples=sft
        preference_training "$OUT/sft" "$POLICY" self_judge_args.pairs=given ;;
    offline) # the dataset's pairs
        jsft
        preference_training "$JSFT" "$POLICY" self_judge_args.pairs=given ;;
    rso) # off-policy: pairs of samples that were drawn before
        jsft
        labels rso
        preference_training "$JSFT" "$POLICY" self_judge_args.pairs=given \
            dataset.path="$OUT/rso.jsonl" "${labelled[@]}" ;;
    raft | rest) # the best samples are learnt as demonstrations are
        jsft
        labels "$METHOD"
        fine_tuning "$JSFT" "$POLICY" jsft_args.examples=sft \
            dataset.path="$OUT/$METHOD.jsonl" "${labelled[@]}" ;;
    *)
        echo "error: METHOD is $METHOD; expected self_judge, jsft, sft, judge, dpo, offline, rso," \
            "raft or rest" >&2
        exit 2 ;;
    esac
}

# Answers to AlpacaEval: greedy ones, and of SELF-JUDGE the winners of tournaments. Greedy decoding
# is self_reject with one sample too: generate.py writes prompts by other templates than JSFT trains
# with, and does not merge an adapter upon an adapter.
answers() { # NAME
    if [ "$METHOD" = judge ]; then return; fi # it has learnt no answers
    answer "$1" "$OUT/greedy.json" --num_samples 1 --temperature 0
    if [ "$METHOD" = self_judge ]; then
        answer "$1-tournament" "$OUT/tournament.json" --num_samples "$NUM_SAMPLES" \
            --nested "$NESTED"
    fi
    echo "policy: $POLICY; answers: $OUT/*.json"
    echo "win rates: python scripts/evaluate_alpaca.py --model_outputs $OUT/greedy.json"
}

answer() { # NAME FILE FLAGS...
    shared scripts/self_reject.py --model "$POLICY" --templates "$TEMPLATES" \
        --generator "$1" --output_path "$2" --max_new_tokens "$MAX_NEW_TOKENS" \
        --load_in "$LOAD_IN" --batch_tokens "$BATCH_TOKENS" \
        ${PROMPTS:+--data_path "$PROMPTS"} "${@:3}"
}
