#!/usr/bin/env bash
# The whole system on a small corpus that is made here; see ./run.sh --help for the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ " $* " != *" --help "* && " $* " != *" -h "* ]]; then
  ../../tools/setup_env.sh --extras mini --if-needed
fi

./sdumc.sh \
  --nj 2 \
  --encoder models/encoder \
  --llm models/llm \
  --asr-model models/ctc \
  --vision-model models/vision \
  "$@"
