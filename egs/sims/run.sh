#!/usr/bin/env bash
# CH-SIMS and CH-SIMS v2 (Chinese), with the recipe of CMU-MOSEI: cmu.sh is a link to egs/mosei/run.sh. README.md explains
# the differences.
#
#   ./run.sh --table /corpora/CH-SIMS/label.csv                     (with Raw/<video_id>/<clip_id>.mp4 beside it)
#   ./run.sh --table /corpora/CH-SIMS/label.csv --models small      (one consumer GPU or none)
#   ./run.sh --source toolkit --pickle unaligned_39.pkl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The source as the user gives it decides whether there are media, and with them models.
source=table set_of_models=large
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --source=*) source=${!i#*=} ;;
    --source) next=$((i + 1)) && source=${!next:-} ;;
    --models=*) set_of_models=${!i#*=} ;;
    --models) next=$((i + 1)) && set_of_models=${!next:-} ;;
  esac
done
models=()
if [[ ${source} == table && ${set_of_models} == small ]]; then
  models=(--encoder ../../tools/models/whisper-base --llm ../../tools/models/qwen2.5-0.5b-instruct)
elif [[ ${source} == table ]]; then
  models=(--encoder ../../tools/models/whisper-large-v3 --llm ../../tools/models/qwen2.5-7b-instruct)
fi
./cmu.sh --counts sims --source "${source}" --label-scale sims "${models[@]}" "$@"
