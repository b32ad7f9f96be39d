#!/usr/bin/env bash
# Stage 0: make the synthetic corpus, and train the small models that take the place of pretrained ones. sdumc.sh runs
# this in the recipe's folder and exports `step`, train_cmd and expdir. For another size, as in tests, name other settings:
#   corpus_config=conf/corpus_small.yaml pretrain_config=conf/pretrain_small.yaml ./run.sh
# shellcheck disable=SC2154,SC2086  # train_cmd comes from sdumc.sh and is split into words
set -euo pipefail

corpus_config=${corpus_config:-conf/corpus.yaml}
pretrain_config=${pretrain_config:-conf/pretrain.yaml}

step "corpus" --settings "${corpus_config}" --outputs corpus/{corpus.tsv,speakers.json,clips} \
  -- ${train_cmd} "${expdir}/log/corpus.log" -- \
  python3 local/make_corpus.py --config "${corpus_config}" --output-dir corpus

step "pretrained models" --inputs corpus/corpus.tsv corpus/speakers.json --settings "${pretrain_config}" \
  --outputs models/{encoder,ctc,llm,vision}/{config.json,model.safetensors} \
  -- ${train_cmd} "${expdir}/log/pretrain.log" -- \
  python3 local/pretrain.py --config "${pretrain_config}" --corpus-dir corpus --models-dir models
