#!/usr/bin/env bash
# Usage: local/ablation.sh [--seeds "1 2 3"] [options of run.sh]
#
# Trains and scores conf/train.yaml and every change to it in conf/ablation/, and writes one table, ABLATION.md.
# Stages 0 to 3 must have been run; what is up to date is skipped, so it can be interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seeds="1 2 3"
if [[ ${1-} == --seeds ]]; then
  seeds=$2
  shift 2
fi
expdir=exp # where run.sh is told to put its experiments
words=("$@")
for i in "${!words[@]}"; do
  case ${words[i]} in
    --expdir) expdir=${words[i + 1]-} ;;
    --expdir=*) expdir=${words[i]#*=} ;;
  esac
done
. ./path.sh

experiments=()
for config in conf/train.yaml conf/ablation/*.yaml; do
  tag=$(basename "${config}" .yaml)
  echo "== ${tag}"
  ./run.sh "$@" --stage 4 --stop-stage 5 --train-config "${config}" --exp-tag "${tag}" --seeds "${seeds}" \
    --conditions "full missing none"
  experiments+=("${expdir}/${tag}")
done
python3 -m sdumc.bin.compare --experiments "${experiments[@]}" --title "Ablations on egs/mini" --output ABLATION.md
