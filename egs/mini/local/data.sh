#!/usr/bin/env bash
# Stage 1: write Kaldi data directories from the corpus's table. sdumc.sh runs this and exports `step`, train_cmd, datadir
# and expdir.
# shellcheck disable=SC2154,SC2086  # train_cmd comes from sdumc.sh and is split into words
set -euo pipefail

step "data" --inputs corpus/corpus.tsv \
  --outputs "${datadir}"/pretrain/{wav.scp,text,utt2spk,spk2utt,utt2dur} \
  "${datadir}"/{train,valid,test}/{wav.scp,video.scp,text,utt2spk,spk2utt,utt2label,utt2dur} \
  -- ${train_cmd} "${expdir}/log/data.log" -- \
  python3 local/make_data.py --corpus-dir corpus --data-dir "${datadir}"
