#!/usr/bin/env bash
# Usage: tools/fetch_models.sh [options]
#
# Downloads pretrained models into tools/models, where the recipes look for them, with the hub client's own command
# (`hf download`: it goes on after an interruption and checks what it has). After that, everything works offline.
# On a machine without network, run it elsewhere and copy tools/models.
#
# Not on the hub: SLAM-LLM's projector for WavLM-large and Vicuna-7B-v1.5 (a link in SLAM-LLM's LibriSpeech recipe); without
# it stage 2 trains one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

#: Options
profile=large #: those of the recipes' --models: large (20 GB) or small (1.5 GB)
models=       #: others, with spaces; --list shows all
dir=          #: where to put them (default: tools/models)
list=false    #: show the models, their size and what they are for, and stop
dry_run=false #: show the commands and stop
. "${root}/utils/parse_options.sh"

die() {
  echo "fetch_models.sh: error: $*" >&2
  exit 2
}
(($# == 0)) || die "unexpected argument '$1'; --help lists the options"
dir=${dir:-${root}/tools/models}
case ${profile} in
  large) chosen="wavlm-large vicuna-7b-v1.5 whisper-large-v3 clip-vit-large-patch14" ;;
  small) chosen="wavlm-base-plus smollm2-135m-instruct whisper-base clip-vit-base-patch32" ;;
  *) die "--profile is large or small, not '${profile}'" ;;
esac
models=${models:-${chosen}}

# name  repository  size in GB of what is fetched  weights (safetensors or bin)  use
table() {
  cat <<'TABLE'
wavlm-large              microsoft/wavlm-large              1.3   bin          audio features, and the ears of the speech LLM
wavlm-base-plus          microsoft/wavlm-base-plus          0.4   bin          audio features, small
vicuna-7b-v1.5           lmsys/vicuna-7b-v1.5               13.5  bin          text features and simulated text
qwen2.5-7b-instruct      Qwen/Qwen2.5-7B-Instruct           15.2  safetensors  text in many languages (egs/sims)
qwen2.5-0.5b-instruct    Qwen/Qwen2.5-0.5B-Instruct         1.0   safetensors  text in many languages, small (egs/sims)
smollm2-135m-instruct    HuggingFaceTB/SmolLM2-135M-Instruct 0.3  safetensors  text features, small
smollm2-360m-instruct    HuggingFaceTB/SmolLM2-360M-Instruct 0.7  safetensors  text features, between the two
whisper-large-v3         openai/whisper-large-v3            3.1   safetensors  recognised text
whisper-small            openai/whisper-small               1.0   safetensors  recognised text, quicker
whisper-base             openai/whisper-base                0.3   safetensors  recognised text, small
clip-vit-large-patch14   openai/clip-vit-large-patch14      1.7   safetensors  video features
clip-vit-base-patch32    openai/clip-vit-base-patch32       0.6   bin          video features, small
vit-face-expression      trpakov/vit-face-expression        0.3   safetensors  video features, trained on facial expressions
TABLE
}
if [[ ${list} == true ]]; then
  printf '%-24s %-34s %5s  %s\n' name repository GB use
  while read -r name repository size _ use; do
    printf '%-24s %-34s %5s  %s\n' "${name}" "${repository}" "${size}" "${use}"
  done < <(table)
  exit 0
fi

hf=hf
if [[ -x ${root}/tools/venv/bin/hf ]]; then hf=${root}/tools/venv/bin/hf; fi
if [[ ${dry_run} == false ]] && ! command -v "${hf}" >/dev/null; then
  die "the hub client's command hf is not there; tools/setup_env.sh installs it with transformers"
fi
for wanted in ${models}; do
  line=$(table | awk -v name="${wanted}" '$1 == name')
  [[ -n ${line} ]] || die "--models: there is no '${wanted}'; --list shows all"
  read -r name repository size weights _ <<<"${line}"
  # One kind of weights, and none of those for other frameworks.
  exclude=("*.h5" "*.msgpack" "*.onnx" "*.ot" "*.fp32*" "onnx/*" "runs/*")
  if [[ ${weights} == safetensors ]]; then exclude+=("*.bin" "*.pt"); else exclude+=("*.safetensors*"); fi
  command=("${hf}" download "${repository}" --local-dir "${dir}/${name}")
  for pattern in "${exclude[@]}"; do command+=(--exclude "${pattern}"); done
  if [[ ${dry_run} == true ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  echo "fetch_models.sh: ${repository} (${size} GB) -> ${dir}/${name}"
  # The recipes set HF_HUB_OFFLINE=1; here is the one place where the network is wanted.
  HF_HUB_OFFLINE=0 "${command[@]}" || die "${repository} could not be fetched; the same command goes on where it stopped"
done
