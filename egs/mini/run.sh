#!/usr/bin/env bash
# The complete system on a small corpus that stage 0 generates; ./run.sh --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# --help needs no environment.
if [[ " $* " != *" --help "* && " $* " != *" -h "* ]]; then
  ../../tools/setup_env.sh --extras mini --if-needed
fi

./sdumc.sh \
  --projector-set pretrain \
  --nj 2 \
  --encoder models/encoder \
  --llm models/llm \
  --asr-model models/ctc \
  --vision-model models/vision \
  "$@"
