#!/usr/bin/env bash
# Usage: ./run.sh [options]        (run.sh gives this script the recipe's names; later options win)
#
# Stages: 0 corpus, 1 data, 2 text, 3 features, 4 train, 5 decode, 6 report.
# A stage's steps are skipped when their outputs are there and their inputs and settings have not changed.
# Dashes and underscores are the same; --name value and --name=value too.
# shellcheck disable=SC2086,SC2206  # the words of *_cmd and of lists are meant to be split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

#: Stages
stage=0          #: first stage to run
stop_stage=6     #: last stage to run
force=false      #: redo the stages that are run, from the beginning
#: Jobs
ngpu=auto        #: GPUs of each node for training; other stages use one a job; 0: none; auto: one if there is one
nproc=2          #: training processes (ranks) of each node without GPU
num_nodes=1      #: nodes for training; more than one need --cmd-backend slurm
nj=4             #: parallel jobs over a set in stages 2 and 3
cmd_backend=     #: local or slurm; empty: as in cmd.sh
#: Sets and folders
train_set=train  #: set to train on
valid_set=valid  #: set that chooses the model
test_sets="test" #: sets to score, with spaces
datadir=data     #: folder of the Kaldi data directories
dumpdir=dump     #: folder of the features
expdir=exp       #: folder of the experiments
max_drop=0.01    #: largest share of a set that may be left out, or whose media may fail to be read
#: Pretrained models (folders; empty: what needs the model is left out)
encoder=         #: speech encoder, for audio features and the speech LLM
llm=             #: causal LLM, for text features and simulated text
projector=       #: encoder-to-LLM projector; empty: trained in stage 2
asr_model=       #: recogniser, for ASR text
vision_model=    #: vision model, for video features
#: Settings (YAML files of each command's options; empty: its defaults)
projector_config=conf/projector.yaml    #: projector training
asr_config=conf/asr.yaml                #: recognition
simulation_config=conf/simulation.yaml  #: text simulation
audio_config=conf/audio.yaml            #: audio features
text_config=conf/text.yaml              #: text features
video_config=conf/video.yaml            #: video features
train_config=conf/train.yaml            #: training
#: Experiment
exp_tag=         #: name of the experiment; empty: name of the training's settings file
seeds=1          #: seeds to train, with spaces; each is an experiment of its own
conditions="full missing asr none"  #: conditions to decode, with spaces
results=RESULTS.md                  #: where the report's tables go
. utils/parse_options.sh

die() {
  echo "sdumc.sh: error: $*" >&2
  exit 2
}

(($# == 0)) || die "unexpected argument '$1'; --help lists the options"
for name in stage stop_stage nproc num_nodes nj; do
  [[ ${!name} =~ ^[0-9]+$ ]] || die "--${name//_/-} is a whole number, not '${!name}'"
done
for name in nproc num_nodes nj; do
  ((${!name} > 0)) || die "--${name//_/-} is at least 1"
done
((stop_stage <= 6)) || die "--stop-stage: the last stage is 6"
((stage <= stop_stage)) || die "--stage ${stage} is after --stop-stage ${stop_stage}"
[[ ${ngpu} == auto || ${ngpu} =~ ^[0-9]+$ ]] || die "--ngpu is a whole number or auto, not '${ngpu}'"
[[ -n ${train_set} && -n ${valid_set} && -n ${test_sets// /} && -n ${seeds// /} && -n ${conditions// /} ]] ||
  die "--train-set, --valid-set, --test-sets, --seeds and --conditions cannot be empty"
for seed in ${seeds}; do
  [[ ${seed} =~ ^[0-9]+$ ]] || die "--seeds are whole numbers, not '${seed}'"
done
[[ -n ${exp_tag} ]] || exp_tag=$(basename "${train_config:-train}" .yaml)
# These become parts of paths, also in patterns and lists.
for name in train_set valid_set exp_tag; do
  [[ ${!name} =~ ^[A-Za-z0-9_.+=@,-]+$ ]] || die "--${name//_/-} '${!name}': letters, digits and _ . + = @ , - only"
done
for name in datadir dumpdir expdir; do
  [[ ${!name} =~ ^[A-Za-z0-9_./+=@,-]+$ ]] || die "--${name//_/-} '${!name}': letters, digits and _ . / + = @ , - only"
done
for name in test_sets conditions; do
  [[ ${!name} =~ ^[A-Za-z0-9_.+=@,\ -]+$ ]] || die "--${name//_/-} '${!name}': names with spaces between them"
done

. ./path.sh
. ./cmd.sh
problem=$(python3 -m sdumc.conditions check "${conditions}" 2>&1) || die "--conditions: ${problem#error: }"

if [[ ${ngpu} == auto ]]; then
  [[ ${cmd_backend} == local ]] || die "--cmd-backend ${cmd_backend} needs --ngpu N (0: none)"
  ngpu=0
  # A CPU build of torch cannot use a GPU; its version tells, and reading that is quicker than importing it.
  if command -v nvidia-smi >/dev/null && [[ -n $(nvidia-smi -L 2>/dev/null) ]] &&
    python3 -c 'from importlib.metadata import version; raise SystemExit("+cpu" in version("torch"))'; then
    ngpu=1
  fi
fi
device=cpu
gpu_option=()
if ((ngpu > 0)); then
  device=cuda
  gpu_option=(--gpu 1)
fi
((num_nodes == 1)) || [[ ${cmd_backend} == slurm ]] || die "--num-nodes ${num_nodes} needs --cmd-backend slurm"
all_sets=$(printf '%s\n' ${train_set} ${valid_set} ${test_sets} | awk '!seen[$0]++')
state=.done
mkdir -p "${state}"
export train_set valid_set test_sets datadir dumpdir expdir nj ngpu device force max_drop train_cmd decode_cmd cuda_cmd
export encoder llm projector asr_model vision_model

# step NAME OPTIONS... -- [RUNNER... --] COMMAND... [--then ...]: a line of output, and the work if it is not done yet;
# utils/step.py explains the options. The recipe's own scripts in local/ can use it too.
step() {
  local name=$1
  shift
  local flags=() # not an array from outside: those are not exported
  if [[ ${force} == true ]]; then flags=(--force); fi
  python3 -S -E utils/step.py --name "${name}" --state-dir .done "${flags[@]}" "$@"
}
export -f step

# use_config FILE: sets `config`, the option for a command, and `settings`, the one for step; both empty without a file.
# The settings are those of the file and of the files that its `base:` leads to.
use_config() {
  config=() settings=()
  if [[ -z $1 ]]; then return; fi
  config=(--config "$1") settings=(--settings)
  local file=$1 base depth
  for ((depth = 0; depth < 8; depth++)); do
    settings+=("${file}")
    base=$(sed -n 's/^base: *//p' "${file}" 2>/dev/null) || true
    if [[ -z ${base} ]]; then break; fi
    file=$(dirname "${file}")/${base}
  done
}

# over_set SET NAME STEP_OPTIONS... -- MODULE OPTIONS...: a command that runs in nj jobs over a set, and the joining of
# their shards. It is only noted; over_sets then runs what was noted for all sets together.
force_option=()
if [[ ${force} == true ]]; then force_option=(--force); fi
noted=()
over_set() {
  local set=$1 name=$2 options=()
  shift 2
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  local dump=${dumpdir}/${set} data=${datadir}/${set}
  if is_imported "${set}" "${name}"; then
    echo "  keep   ${name} ${set} (imported)"
    return
  fi
  if ((${#noted[@]})); then noted+=(--next); fi
  noted+=("${force_option[@]}" --name "${name} ${set}" --state-dir "${state}" "${options[@]}"
    --inputs "${data}/wav.scp" "${data}/utt2spk" --optional-inputs "${data}/segments"
    --stale "${dump}/ark/${name}.*" --ignore device shard num-jobs max-drop
    -- ${decode_cmd} "${gpu_option[@]}" "JOB=1:${nj}" "${dumpdir}/log/${name}.JOB.log" --
    python3 -m "$@" --data-dir "${data}" --dump-dir "${dump}" --shard "JOB/${nj}" --device "${device}"
    --then ${train_cmd} "${dumpdir}/log/${name}.join.log" --
    python3 -m sdumc.bin.finish_dump --data-dir "${data}" --dump-dir "${dump}" --name "${name}" --num-jobs "${nj}"
    --max-drop "${max_drop}")
}
over_sets() {
  if ((${#noted[@]})); then python3 -S -E utils/step.py "${noted[@]}"; fi
  noted=()
}

# A feature that stage 1 has taken from elsewhere (the importers say so in its yaml) is never replaced.
is_imported() { grep -qs '^imported: true' "${dumpdir}/$1/$2.yaml"; } # SET NAME
# left_out "NAME[ SET]" REASON: stages make what the recipe's models and the sets allow, and say what they leave out.
left_out() {
  local set=${1#* }
  if [[ ${set} == "$1" ]]; then set=${train_set}; fi
  if is_imported "${set}" "${1%% *}"; then echo "  keep   $1 (imported)"; else echo "  none   $1: $2"; fi
}

running=
begin_stage() { # NUMBER NAME
  running="stage $1 ($2)"
  stage_start=${SECONDS}
  echo "stage $1: $2"
}
end_stage() {
  echo "  ${running}: $((SECONDS - stage_start)) s"
  running=
}
finish() {
  local code=$?
  if ((code != 0)) && [[ -n ${running} ]]; then
    echo "sdumc.sh: stopped in ${running} after ${SECONDS} s, exit code ${code}; the same command goes on from here" >&2
  fi
}
trap finish EXIT
chosen() { ((stage <= $1 && $1 <= stop_stage)); }
began=${state}/began
: >"${began}"

if chosen 0; then
  begin_stage 0 corpus
  if [[ -f local/corpus.sh ]]; then bash local/corpus.sh; fi
  end_stage
fi

if chosen 1; then
  begin_stage 1 data
  if [[ -f local/data.sh ]]; then bash local/data.sh; fi
  for set in ${all_sets}; do
    data=${datadir}/${set}
    if [[ ! -e ${data}/wav.scp && -e ${dumpdir}/${set}/utt2label ]]; then
      left_out "check ${set}" "there are no media, only features in ${dumpdir}/${set}"
      continue
    fi
    step "check ${data}" --inputs "${data}/wav.scp" "${data}/utt2spk" --optional-inputs \
      "${data}"/{segments,video.scp,text,utt2label,spk2utt,utt2dur} \
      -- ${train_cmd} "${data}/log/check.log" -- python3 utils/validate_data_dir.py "${data}"
  done
  end_stage
fi

speech_projector=${projector:-${expdir}/projector}

if chosen 2; then
  begin_stage 2 text
  if [[ -z ${encoder} || -z ${llm} ]]; then
    left_out text_sim "needs --encoder and --llm"
  elif [[ -z ${projector} ]]; then
    use_config "${projector_config}"
    step projector --inputs "${datadir}"/{"${train_set}","${valid_set}"}/{wav.scp,text} "${settings[@]}" \
      --optional-inputs "${encoder}" "${llm}" --outputs "${speech_projector}" \
      --stale "${speech_projector}" "${speech_projector}.partial" \
      --ignore device -- ${cuda_cmd} "${gpu_option[@]}" "${expdir}/log/projector.log" -- \
      python3 -m sdumc.bin.train_projector "${config[@]}" --encoder "${encoder}" --llm "${llm}" \
      --train-data-dir "${datadir}/${train_set}" --valid-data-dir "${datadir}/${valid_set}" \
      --output "${speech_projector}" --device "${device}"
  fi
  if [[ -z ${asr_model} ]]; then
    left_out text_asr "needs --asr-model"
  else
    use_config "${asr_config}"
    for set in ${all_sets}; do
      over_set "${set}" asr_hyp --optional-inputs "${asr_model}" "${settings[@]}" \
        --outputs "${datadir}/${set}/text_asr" -- sdumc.bin.recognize "${config[@]}" --model "${asr_model}"
    done
    over_sets
  fi
  if [[ -n ${encoder} && -n ${llm} ]]; then
    use_config "${simulation_config}"
    for set in ${all_sets}; do
      data=${datadir}/${set}
      over_set "${set}" text_sim "${settings[@]}" \
        --optional-inputs "${encoder}" "${llm}" "${speech_projector}" "${data}/text_asr" \
        --outputs "${data}/text_sim" "${dumpdir}/${set}/text_sim.scp" -- \
        sdumc.bin.simulate_text "${config[@]}" --encoder "${encoder}" --projector "${speech_projector}" --llm "${llm}"
    done
    over_sets
  fi
  end_stage
fi

if chosen 3; then
  begin_stage 3 features
  for set in ${all_sets}; do
    data=${datadir}/${set} dump=${dumpdir}/${set}
    if [[ -f ${data}/utt2label ]]; then
      # shellcheck disable=SC2016  # bash -c expands its own
      step "labels ${set}" --inputs "${data}/utt2label" --outputs "${dump}/utt2label" -- \
        bash -c 'mkdir -p "$2" && cp "$1" "$2/.copy" && mv "$2/.copy" "$2/utt2label"' copy "${data}/utt2label" "${dump}"
    fi
  done
  if [[ -z ${encoder} ]]; then
    left_out audio "needs --encoder"
  else
    use_config "${audio_config}"
    for set in ${all_sets}; do
      over_set "${set}" audio --optional-inputs "${encoder}" "${settings[@]}" \
        --outputs "${dumpdir}/${set}/audio.scp" -- sdumc.bin.extract_audio "${config[@]}" --model "${encoder}"
    done
    over_sets
  fi
  use_config "${text_config}"
  for name in text text_asr; do
    for set in ${all_sets}; do
      text=${datadir}/${set}/${name}
      if [[ -z ${llm} || -z ${encoder} ]]; then
        left_out "${name} ${set}" "needs --llm and --encoder"
      elif [[ ! -f ${text} ]]; then
        left_out "${name} ${set}" "there is no ${text}"
      else
        over_set "${set}" "${name}" --inputs "${text}" --optional-inputs "${encoder}" "${llm}" "${speech_projector}" \
          "${settings[@]}" --outputs "${dumpdir}/${set}/${name}.scp" -- sdumc.bin.extract_text "${config[@]}" \
          --encoder "${encoder}" --projector "${speech_projector}" --llm "${llm}" --name "${name}" --text "${text}"
      fi
    done
    over_sets
  done
  use_config "${video_config}"
  any_video=
  for set in ${all_sets}; do
    if [[ -f ${datadir}/${set}/video.scp ]]; then any_video=true; fi
  done
  for set in ${all_sets}; do
    videos=${datadir}/${set}/video.scp inputs=()
    if [[ -f ${videos} ]]; then inputs=(--inputs "${videos}"); fi
    if [[ -z ${vision_model} ]]; then
      left_out "video ${set}" "needs --vision-model"
    elif [[ -z ${any_video} ]]; then
      left_out "video ${set}" "there is no ${videos}"
    else # a set without video beside others that have it is recorded as absent throughout
      over_set "${set}" video "${inputs[@]}" --optional-inputs "${vision_model}" "${settings[@]}" \
        --outputs "${dumpdir}/${set}/video.scp" -- sdumc.bin.extract_video "${config[@]}" --model "${vision_model}"
    fi
  done
  over_sets
  end_stage
fi

if chosen 4; then
  begin_stage 4 train
  ranks=${ngpu}
  if ((ngpu == 0)); then ranks=${nproc}; fi
  launcher=(${cuda_cmd} --num-nodes "${num_nodes}" --tasks-per-node "${ranks}")
  if ((ngpu > 0)); then launcher+=(--gpu "${ngpu}"); fi
  use_config "${train_config}"
  inputs=() optional=()
  for set in "${train_set}" "${valid_set}"; do
    inputs+=("${dumpdir}/${set}/utt2label")
    for name in audio text text_sim video; do
      optional+=("${dumpdir}/${set}/${name}".{scp,frames,absent})
    done
  done
  for seed in ${seeds}; do
    exp=${expdir}/${exp_tag}_seed${seed}
    runner=("${launcher[@]}" "${exp}/log/train.log")
    if [[ ${cmd_backend} == slurm ]]; then
      runner+=(srun --kill-on-bad-exit=1 python3 -m)
    elif ((ranks == 1)); then
      runner+=(python3 -m)
    else
      runner+=(python3 -S -E utils/ranks.py "${ranks}" python3 -m)
    fi
    step "train ${exp}" --inputs "${inputs[@]}" --optional-inputs "${optional[@]}" "${settings[@]}" \
      --outputs "${exp}"/{config.yaml,model.valid-best.safetensors,model.averaged.safetensors} \
      --stale "${exp}/checkpoint*" "${exp}/model.*" "${exp}/metrics.jsonl" --ignore device \
      -- "${runner[@]}" -- sdumc.bin.train "${config[@]}" \
      --train-dir "${dumpdir}/${train_set}" --valid-dir "${dumpdir}/${valid_set}" --exp-dir "${exp}" --seed "${seed}" \
      --device "${device}"
  done
  end_stage
fi

# possible_conditions SET: those of --conditions that the set's features allow.
possible_conditions() { python3 -m sdumc.conditions possible "${dumpdir}/$1" "${conditions}"; }

if chosen 5; then
  begin_stage 5 decode
  for seed in ${seeds}; do
    exp=${expdir}/${exp_tag}_seed${seed}
    for set in ${test_sets}; do
      mapfile -t possible < <(possible_conditions "${set}")
      ((${#possible[@]} > 0)) || die "${dumpdir}/${set} has the features for none of the conditions ${conditions}"
      if ((${#possible[@]} < $(wc -w <<<${conditions}))); then
        left_out "some conditions ${set}" "its features allow only ${possible[*]}"
      fi
      output=${exp}/decode_${set}
      decode_output=${output} outputs=() scores=()
      if ((${#possible[@]} == 1)); then decode_output=${output}/${possible[0]}; fi
      for condition in "${possible[@]}"; do
        outputs+=("${output}/${condition}"/{predictions.tsv,score.json})
        scores+=(--then ${train_cmd} "${output}/log/score_${condition}.log" -- python3 -m sdumc.bin.score --predictions
          "${output}/${condition}/predictions.tsv" --output "${output}/${condition}/score.json")
      done
      step "decode ${output}" \
        --inputs "${exp}"/{config.yaml,model.valid-best.safetensors} "${dumpdir}/${set}/utt2label" \
        --optional-inputs "${dumpdir}/${set}"/{audio,text,text_sim,text_asr,video}.{scp,frames,absent} \
        --outputs "${outputs[@]}" --ignore device \
        -- ${decode_cmd} "${gpu_option[@]}" "${output}/log/decode.log" -- \
        python3 -m sdumc.bin.decode --exp-dir "${exp}" --data-dir "${dumpdir}/${set}" --condition "${possible[@]}" \
        --output-dir "${decode_output}" --device "${device}" \
        "${scores[@]}"
    done
  done
  end_stage
fi

if chosen 6; then
  begin_stage 6 report
  exps=() inputs=() optional=()
  for seed in ${seeds}; do
    exp=${expdir}/${exp_tag}_seed${seed}
    exps+=("${exp}")
    for set in ${test_sets}; do
      inputs+=("${exp}/decode_${set}/*/predictions.tsv")
      optional+=("${exp}/decode_${set}"/*/{score.json,internals.npz,attention.npz})
    done
    optional+=("${exp}/metrics.jsonl")
  done
  for set in ${all_sets}; do optional+=("${dumpdir}/${set}"/{audio,text,text_sim,text_asr,video}.scp); done
  report=${expdir}/${exp_tag}
  step "report ${results}" --inputs "${inputs[@]}" --optional-inputs "${optional[@]}" \
    --outputs "${results}" "${report}/report.html" -- ${train_cmd} "${report}/log/report.log" -- \
    python3 -m sdumc.bin.report --exp-dirs "${exps[@]}" --data-root "${datadir}" --dump-root "${dumpdir}" \
    --train-set "${train_set}" --valid-set "${valid_set}" --test-sets ${test_sets} \
    --output-dir "${report}" --results "${results}"
  end_stage
fi

if ((stop_stage >= 5)); then
  for seed in ${seeds}; do
    for set in ${test_sets}; do utils/show_results.sh "${expdir}/${exp_tag}_seed${seed}/decode_${set}"; done
  done
fi
if [[ -n $(find "${state}" -name '*.done' -newer "${began}" -print -quit) ]]; then
  echo "done in ${SECONDS} s"
else
  echo "nothing to do: everything is up to date (${SECONDS} s)"
fi
