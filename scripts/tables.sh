#!/usr/bin/env bash
# Every table and figure of both papers at small scale, on one machine, without an API key.
#
#   bash scripts/tables.sh --size smoke      # 15 minutes on two cores: does everything run?
#   bash scripts/tables.sh --size cpu        # a night on two cores: results/README.md
#   bash scripts/tables.sh --size gpu        # an hour on one H100 (an estimate: not run yet)
#   bash scripts/tables.sh --size cpu --only "table2|table4" --jobs 2
#   bash scripts/tables.sh --size cpu --go_on  # only what results/cpu.json does not hold
#
# Rows, sizes and commands stand in configs/tables.yaml. Money: none. Memory: 4 GB a core. Killed,
# the same command goes on; scripts/tables.py documents the flags.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

if grep -q '^model: smollm2-135m-instruct' configs/tables.yaml; then
    python scripts/get_model.py smollm2-135m-instruct
fi
python scripts/tables.py "$@"
