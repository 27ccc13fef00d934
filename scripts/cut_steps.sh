# Sourced by cut_offline.sh and cut_online_iter.sh: the steps of both, with the settings of the
# paper that both share. The variables are the recipe's own.

# ACCELERATE is a file such as configs/accelerate_fsdp2.yaml, for models too large for one GPU.
launch() { # SCRIPT FLAGS...
    if [ -n "${ACCELERATE:-}" ]; then
        accelerate launch --config_file "$ACCELERATE" --num_processes "$GPUS" "$@"
    else
        torchrun --nproc_per_node="$GPUS" "$@"
    fi
}

shared() { # SCRIPT FLAGS...
    if [ "$GPUS" = 1 ]; then python "$@"; else torchrun --nproc_per_node="$GPUS" "$@"; fi
}

# batch_size = micro_batch_size x GPUS x accumulation: keep 8 when GPUS differ.
train() { # further flags of finetune_unlikelihood.py
    launch finetune_unlikelihood.py \
        --base_model "$BASE_MODEL" --data_path "$DATA" --output_dir "$OUT/adapter" \
        --batch_size 8 --micro_batch_size 1 --num_epochs 1 \
        --learning_rate "${LEARNING_RATE:-4e-4}" \
        --cutoff_len "$CUTOFF_LEN" --warmup_steps 100 --lr_scheduler cosine \
        --lora_r 16 --lora_alpha 16 --lora_dropout 0.05 \
        --lora_target_modules '[gate_proj,down_proj,up_proj]' \
        --threshold "$THRESHOLD" --weight_unlike "$WEIGHT_UNLIKE" \
        --load_in "$LOAD_IN" --gradient_checkpointing True --max_steps "$MAX_STEPS" \
        --save_steps 10 "$@" # a run has 40 to 170: a kill costs a few minutes
}

# A plain checkpoint, and its greedy answers in AlpacaEval's format, a share on each GPU. GENERATE
# holds several words, so it stands without quotes.
merge_and_answer() {
    python merge.py --base_model_name_or_path "$BASE_MODEL" --peft_model_path "$OUT/adapter" \
        --output_dir "$OUT/model" --device "${MERGE_ON:-auto}"
    shared scripts/generate.py --base_model_name_or_path "$OUT/model" \
        --output_path "$OUT/alpaca_eval.json" --max_new_tokens "$MAX_NEW_TOKENS" \
        ${PROMPTS:+--data_path "$PROMPTS"} ${GENERATE:-}
    echo "model: $OUT/model; answers: $OUT/alpaca_eval.json"
}
