#!/usr/bin/env bash
# Stage 0: check that everything that later stages need is there and complete. Nothing is downloaded.
# shellcheck disable=SC2154  # run.sh and sdumc.sh export the variables
set -euo pipefail

missing=0
given() { # OPTION PATH
  if [[ -z $2 ]]; then
    echo "local/corpus.sh: error: --source ${source} needs $1; see README.md and ./run.sh --help" >&2
    missing=1
  fi
}
case ${source} in
  raw) given --corpus-dir "${corpus_dir}" && given --folds "${folds}" ;;
  table) given --table "${table}" ;;
  toolkit) given --pickle "${pickle}" ;;
  authors) given --features-dir "${features_dir}" && given "--labels (label_official.npz)" "${labels}" ;;
esac
need() { # PATH OPTION WHAT
  if [[ -n $1 && ! -e $1 ]]; then
    echo "local/corpus.sh: error: $2 $1: no such $3; README.md says where to get it" >&2
    missing=1
  fi
}
need "${corpus_dir}" --corpus-dir folder
need "${folds}" --folds "file or folder"
need "${labels}" --labels "file or folder"
need "${table}" --table file
need "${media_dir}" --media-dir folder
need "${pickle}" --pickle file
need "${features_dir}" --features-dir folder
need "${transcripts}" --transcripts file
need "${projector}" --projector "file or folder"
((missing == 0)) || exit 1

models=() folders=()
for model in encoder llm asr_model vision_model; do
  if [[ -n ${!model} ]]; then
    models+=("--${model//_/-}" "${!model}")
    folders+=("${!model}")
  fi
done
if ((${#models[@]})); then
  # shellcheck disable=SC2086  # the words of train_cmd
  step "models" --optional-inputs "${folders[@]}" -- ${train_cmd} "${expdir}/log/models.log" -- \
    python3 local/check_models.py "${models[@]}"
fi
