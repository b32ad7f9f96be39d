#!/usr/bin/env bash
# Stage 1: write ${datadir}/<set>/{wav.scp,video.scp,text,utt2spk,spk2utt,utt2label} for every set of the recipe, all
# sorted bytewise; docs/stages.md describes the files. utils/fix_data_dir.py sorts them and removes incomplete utterances
# (at most a share of max_drop); sdumc.sh then checks every set. local/corpus.sh lists what this script can use.
set -euo pipefail

# For example:
#   step "data" --inputs corpus/labels.csv --outputs "${datadir}"/{train,valid,test}/wav.scp \
#     -- ${train_cmd} "${expdir}/log/data.log" -- python3 local/make_data.py --corpus-dir corpus --data-dir "${datadir}"
echo "local/data.sh: error: write this script for your corpus; docs/stages.md describes its output" >&2
exit 1
