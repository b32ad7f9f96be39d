#!/usr/bin/env bash
# CMU-MOSI, with the recipe of CMU-MOSEI: cmu.sh is a link to egs/mosei/run.sh. README.md explains the differences.
#
#   ./run.sh --source raw     --corpus-dir /corpora/CMU-MOSI --folds cmu_mosi_std_folds.py
#   ./run.sh --source toolkit --pickle unaligned_50.pkl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./cmu.sh --counts mosi "$@"
