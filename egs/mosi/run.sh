#!/usr/bin/env bash
# CMU-MOSI with the recipe of CMU-MOSEI, egs/mosei/run.sh, which is cmu.sh here; README.md says what differs.
#
#   ./run.sh --source raw     --corpus-dir /corpora/CMU-MOSI --folds cmu_mosi_std_folds.py
#   ./run.sh --source toolkit --pickle unaligned_50.pkl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./cmu.sh --counts mosi "$@"
