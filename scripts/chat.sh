#!/usr/bin/env bash
# Chat with a model in the terminal, on `transformers serve` and `transformers chat`.
#
#   bash scripts/chat.sh runs/quickstart/model
#   bash scripts/chat.sh smollm2-135m-instruct --template chat --generate "do_sample=False"
#
# Flags are those of scripts/chat.py. !help shows the commands of the chat, !exit leaves it.
# Hardware  as the model needs: 135M runs on two CPU cores, 7B on a GPU of 24 GB. No account.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${1:?which model? bash scripts/chat.sh FOLDER}
shift
if [ "$MODEL" = smollm2-135m-instruct ]; then python scripts/get_model.py "$MODEL"; fi
exec python scripts/chat.py --model "$MODEL" "$@"
