#!/usr/bin/env bash
# Stage 0: make or check the corpus and the pretrained models.
#
# sdumc.sh runs this in the recipe's folder. It exports the function `step` (runs commands unless they are up to date),
# the job runners train_cmd, decode_cmd and cuda_cmd, and the variables nj, ngpu, device, force, train_set, valid_set,
# test_sets, datadir, dumpdir, expdir and max_drop.
set -euo pipefail

# For example:
#   step "corpus" --settings conf/corpus.yaml --outputs corpus/corpus.tsv \
#     -- ${train_cmd} "${expdir}/log/corpus.log" -- \
#     python3 local/make_corpus.py --config conf/corpus.yaml --output-dir corpus
echo "local/corpus.sh: nothing to do in this recipe"
