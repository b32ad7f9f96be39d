#!/usr/bin/env bash
# Usage: local/decode_released.sh --checkpoint RELEASED.pt [options]
#
# Scores the authors' checkpoint on the features that `./run.sh --source authors --stop-stage 1` has imported, to be
# compared with the MAE they publish: 0.5060 with text, 0.5503 without. Both were chosen on the test set, at two epochs
# independent of each other; the file is one of them.
#
# The released network attends over padding, so its predictions depend on the batch: --batch-size 1 is free of padding,
# 96 is what its code used. --mask-padding true and --imagination both undo what differs from the paper.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Options
checkpoint=                   #: the released file
dump=dump/authors/test        #: features to score
exp=exp/authors/released      #: folder to write
conditions="full missing"     #: conditions to decode, with spaces
batch_size=1                  #: utterances at once
imagination=none              #: where MIA acts: none (as in the public code), both, utterance, content
mask_padding=false            #: false: attend over padding (as in the public code)
device=auto                   #: auto, cpu, cuda or cuda:N
. utils/parse_options.sh

die() {
  echo "decode_released.sh: error: $*" >&2
  exit 2
}
(($# == 0)) || die "unexpected argument '$1'"
[[ -n ${checkpoint} ]] || die "--checkpoint is not given"
[[ -d ${dump} ]] || die "${dump}: no such folder; first: ./run.sh --source authors --stop-stage 1 ..."
# shellcheck source=../path.sh
. ./path.sh

exp=${exp}_${imagination}_${mask_padding}
if [[ ! -f ${exp}/model.valid-best.safetensors ]]; then
  python3 "${SDUMC_ROOT}/tools/import_checkpoint.py" "${checkpoint}" "${exp}" --imagination "${imagination}" \
    --mask-padding "${mask_padding}"
fi
output=${exp}/decode_$(basename "${dump}")_batch${batch_size}
for condition in ${conditions}; do
  python3 -m sdumc.bin.decode --exp-dir "${exp}" --data-dir "${dump}" --condition "${condition}" \
    --output-dir "${output}/${condition}" --batch-size "${batch_size}" --device "${device}"
  python3 -m sdumc.bin.score --predictions "${output}/${condition}/predictions.tsv" \
    --output "${output}/${condition}/score.json"
done
utils/show_results.sh "${output}"
echo "published (chosen on test): MAE 0.5060 with text (full), 0.5503 without (missing)"
