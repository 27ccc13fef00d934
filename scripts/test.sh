#!/usr/bin/env bash
# Lint and tests, as CI runs them: bash scripts/test.sh [pytest arguments]
# Needs Python >= 3.11 with venv, and no GPU; the network only for the installs. About 10 minutes with them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# One thread a worker: two workers with two threads each make small models ten times slower.
export OMP_NUM_THREADS=1

ruff check .
# A file's tests stay together, as they share what is costly to set up.
python -m pytest -n 2 --dist loadfile "$@"
