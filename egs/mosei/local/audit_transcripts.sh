#!/usr/bin/env bash
# Usage: local/audit_transcripts.sh [options]
#
# Compares each clip's transcript with what the recogniser heard in it (data/<set>/text_asr, from stage 2), to find clips
# and whole videos whose times are wrong. Writes exp/audit/<set>/audit.tsv, worst first, and videos.tsv. With --leave-out, also data/<set>_clean and dump/<set>_clean without the suspicious clips:
#
#   local/audit_transcripts.sh --sets "train valid" --leave-out
#   ./run.sh --stage 4 --train-set train_clean --valid-set valid_clean ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: What is compared
sets="train valid test" #: sets, with spaces
datadir=data            #: folder of the data directories
dumpdir=dump            #: folder of the features
output=exp/audit        #: where the lists go
#: What is suspicious (all three must hold)
max_wer=0.8             #: word error rate above this
min_overlap=0.4         #: overlap of letter triples below this
min_words=3             #: at least so many words in the transcript
#: Leaving out
leave_out=false         #: make <set>_clean without the suspicious clips; a test set so changed is not comparable any more
. utils/parse_options.sh

(($# == 0)) || {
  echo "audit_transcripts.sh: error: unexpected argument '$1'" >&2
  exit 2
}
# shellcheck source=../path.sh
. ./path.sh
for set in ${sets}; do
  options=()
  if [[ ${leave_out} == true ]]; then
    options+=(--clean-data-dir "${datadir}/${set}_clean")
    if [[ -f ${dumpdir}/${set}/utt2label ]]; then
      options+=(--dump-dir "${dumpdir}/${set}" --clean-dump-dir "${dumpdir}/${set}_clean")
    fi
  fi
  python3 -m sdumc.bin.audit_transcripts --data-dir "${datadir}/${set}" --output-dir "${output}/${set}" \
    --max-wer "${max_wer}" --min-overlap "${min_overlap}" --min-words "${min_words}" "${options[@]}"
done
