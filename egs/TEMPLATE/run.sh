#!/usr/bin/env bash
# Names the sets and models of this recipe; sdumc.sh does the rest and lists its options: ./run.sh --help
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
