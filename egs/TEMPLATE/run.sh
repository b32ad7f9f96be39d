#!/usr/bin/env bash
# The recipe's names; everything else is in sdumc.sh, whose options can follow: ./run.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./sdumc.sh \
  --train-set train \
  --valid-set valid \
  --test-sets test \
  --encoder ../../tools/models/wavlm-large \
  --llm ../../tools/models/vicuna-7b-v1.5 \
  --asr-model ../../tools/models/whisper-large-v3 \
  --vision-model ../../tools/models/clip-vit-large-patch14 \
  "$@"
