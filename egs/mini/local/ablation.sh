#!/usr/bin/env bash
# Usage: local/ablation.sh [options]
#
# Trains and scores the recipe's default, conf/train.yaml, every change to it in conf/ablation/, and conf/train_paper.yaml
# (every part of the paper). Writes one table and local/ablation_notes.md, what we make of it, to ABLATION.md.
# Stages 0 to 3 must have been run. Work that is up to date is skipped, so this can be interrupted and called again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Ablation
seeds="1 2 3 4 5" #: seeds to train, with spaces
expdir=exp        #: folder of the experiments
pass_options_to=./sdumc.sh
. utils/parse_options.sh
# shellcheck source=../path.sh
. ./path.sh

experiments=()
for config in conf/train.yaml conf/ablation/*.yaml conf/train_paper.yaml; do
  tag=$(basename "${config}" .yaml)
  echo "== ${tag}"
  ./run.sh "$@" --stage 4 --stop-stage 5 --train-config "${config}" --exp-tag "${tag}" --seeds "${seeds}" \
    --expdir "${expdir}" --conditions "full missing none"
  experiments+=("${expdir}/${tag}")
done
python3 -m sdumc.bin.compare --experiments "${experiments[@]}" --title "Ablations on egs/mini" \
  --output "${expdir}/ablation.md"
{
  cat "${expdir}/ablation.md"
  echo
  cat local/ablation_notes.md
} >ABLATION.md
