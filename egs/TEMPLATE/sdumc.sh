#!/usr/bin/env bash
# Usage: ./run.sh [options]        (run.sh passes the recipe's names to this script, then your options, which win)
#
# Stages: 0 corpus, 1 data, 2 text, 3 features, 4 train, 5 decode, 6 report.
# A step is skipped when its outputs exist and neither its inputs nor its settings have changed.
# --max-drop and --max_drop are the same option; --name value and --name=value mean the same.
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
more_train_dirs= #: dump folders to train on as well, with spaces, such as ../mosei/dump/train
train_weights=   #: a weight for the train set and each of these: how often their utterances are drawn; empty: all alike
valid_set=valid  #: set that chooses the model
test_sets="test" #: sets to score, with spaces
projector_set=   #: set with transcripts to train the projector on; empty: the train set
projector_folds=5 #: if that is the train set: parts of its speakers, each simulated by a projector trained without it; 0: off
datadir=data     #: folder of the Kaldi data directories
dumpdir=dump     #: folder of the features
expdir=exp       #: folder of the experiments
label_scale=     #: lowest and highest label and, if wanted, the classes: '1 5', '1 5 nearest', sims, cmu; empty: as scale.yaml says, or cmu
max_drop=0.01    #: largest share of a set that may be left out, or whose media may fail to be read
#: Pretrained models (folders; empty: what needs the model is left out)
encoder=         #: speech encoder, for audio features and the speech LLM
llm=             #: causal LLM, for text features and simulated text
projector=       #: encoder-to-LLM projector; empty: trained in stage 2
asr_model=       #: recogniser, for ASR text
rescorer=        #: recogniser that helps to choose among the hypotheses of simulated text
vision_model=    #: vision model, for video features
#: Settings (YAML files of each command's options; empty: its defaults)
projector_config=conf/projector.yaml    #: projector training
asr_config=conf/asr.yaml                #: recognition
simulation_config=conf/simulation.yaml  #: text simulation
audio_config=conf/audio.yaml            #: audio features
text_config=conf/text.yaml              #: text features
video_config=conf/video.yaml            #: video features
train_config=conf/train.yaml            #: training
missing_text=    #: what the missing flow reads: simulated, asr or none; empty: as in the training's settings file
#: Experiment
exp_tag=         #: name of the experiment; empty: training's settings file [_missing_asr] [_joint]
seeds=1          #: seeds to train, with spaces; each is an experiment of its own
conditions="full missing asr none"  #: conditions to decode, with spaces
protocols=       #: also score incomplete data by: patterns frames modalities
results=RESULTS.md                  #: where the report's tables go
. utils/parse_options.sh

state_dir=.done # of utils/step.py: what each step was made from

die() {
  echo "sdumc.sh: error: $*" >&2
  exit 2
}

# ---- options ---------------------------------------------------------------------------------------------------------

check_options() {
  local name seed
  (($# == 0)) || die "unexpected argument '$1'; --help lists the options"
  for name in stage stop_stage nproc num_nodes nj projector_folds; do
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
  [[ -z ${missing_text} || ${missing_text} =~ ^(simulated|asr|none)$ ]] ||
    die "--missing-text is simulated, asr or none, not '${missing_text}'"
  if [[ -z ${exp_tag} ]]; then
    exp_tag=$(basename "${train_config:-train}" .yaml)
    if [[ ${missing_text} =~ ^(asr|none)$ ]]; then exp_tag+=_missing_${missing_text}; fi
    if [[ -n ${more_train_dirs// /} ]]; then exp_tag+=_joint; fi
  fi
  [[ -z ${train_weights// /} || $(wc -w <<<${train_weights}) -eq $(wc -w <<<"train ${more_train_dirs}") ]] ||
    die "--train-weights '${train_weights}': give one for the train set and one for each of --more-train-dirs"
  # These become parts of paths, patterns and lists.
  [[ -n ${projector_set} ]] || projector_set=${train_set}
  for name in train_set valid_set projector_set exp_tag; do
    [[ ${!name} =~ ^[A-Za-z0-9_.+=@,-]+$ ]] || die "--${name//_/-} '${!name}': letters, digits and _ . + = @ , - only"
  done
  for name in datadir dumpdir expdir; do
    [[ ${!name} =~ ^[A-Za-z0-9_./+=@,-]+$ ]] || die "--${name//_/-} '${!name}': letters, digits and _ . / + = @ , - only"
  done
  [[ ${more_train_dirs} =~ ^[A-Za-z0-9_./+=@,\ -]*$ ]] ||
    die "--more-train-dirs '${more_train_dirs}': folders with spaces between them; letters, digits and _ . / + = @ , - only"
  for name in test_sets conditions; do
    [[ ${!name} =~ ^[A-Za-z0-9_.+=@,\ -]+$ ]] || die "--${name//_/-} '${!name}': names with spaces between them"
  done
}

# Needs the environment: Python knows the conditions.
check_conditions() {
  local problem
  problem=$(python3 -m sdumc.conditions check "${conditions}" 2>&1) || die "--conditions: ${problem#error: }"
  problem=$(python3 -m sdumc.conditions check-protocols "${protocols}" 2>&1) || die "--protocols: ${problem#error: }"
  # What the missing flow reads decides what stage 2 makes.
  reads=${missing_text}
  if [[ -z ${reads} && -n ${train_config} ]]; then
    reads=$(python3 utils/yaml_for_shell.py value missing-text "${train_config}")
  fi
  reads=${reads:-simulated}
  if [[ -n ${label_scale} ]]; then
    problem=$(python3 -m sdumc.scale check "${label_scale}" 2>&1) || die "--label-scale: ${problem#error: }"
  fi
}

# Sets `ngpu` where it is auto, `device`, and `gpu_option`, the runners' option for jobs that use one GPU.
choose_device() {
  local gpus=0
  if [[ ${cmd_backend} == local && ${ngpu} != 0 ]]; then
    gpus=$(python3 -c 'import sys; sys.path.insert(0, "utils"); import run; print(len(run.visible_gpus()))')
  fi
  if [[ ${ngpu} == auto ]]; then
    [[ ${cmd_backend} == local ]] || die "--cmd-backend ${cmd_backend} needs --ngpu N (0: none)"
    ngpu=0
    # A CPU build of torch cannot use a GPU. Its version says so; reading the version is faster than importing torch.
    if ((gpus > 0)) &&
      python3 -c 'from importlib.metadata import version; raise SystemExit("+cpu" in version("torch"))'; then
      ngpu=1
    fi
  fi
  # More jobs would wait for a GPU, and each loads the model anew.
  if ((ngpu > 0 && gpus > 0 && nj > gpus)); then
    echo "sdumc.sh: note: --nj ${gpus} in place of ${nj}: as many jobs as this machine has GPUs"
    nj=${gpus}
  fi
  device=cpu gpu_option=()
  if ((ngpu > 0)); then device=cuda gpu_option=(--gpu 1); fi
  ((num_nodes == 1)) || [[ ${cmd_backend} == slurm ]] || die "--num-nodes ${num_nodes} needs --cmd-backend slurm"
}

# ---- steps -----------------------------------------------------------------------------------------------------------

# step NAME OPTIONS... -- [RUNNER... --] COMMAND... [--then ...]: prints a line, and runs the commands unless the step is
# up to date. utils/step.py explains the options. The recipe's own scripts in local/ can use it too.
step() {
  local name=$1
  shift
  local flags=() # local: the scripts in local/ get this function through the environment, which holds no arrays
  if [[ ${force} == true ]]; then flags=(--force); fi
  python3 -S -E utils/step.py --name "${name}" --state-dir .done "${flags[@]}" "$@"
}

# use_config FILE: sets `config` (the --config option of a command) and `settings` (the --settings option of a step: FILE
# and the files that its `base:` leads to). Both are empty when FILE is.
use_config() {
  config=() settings=()
  if [[ -z $1 ]]; then return; fi
  local files
  files=$(python3 utils/yaml_for_shell.py settings "$1")
  mapfile -t settings <<<"${files}"
  config=(--config "$1") settings=(--settings "${settings[@]}")
}

# Features that stage 1 has imported (their <name>.yaml says so): lines `SET NAME`. They are never replaced.
imported=
find_imported() { imported=$(python3 utils/yaml_for_shell.py imported "${dumpdir}" ${all_sets}); }
is_imported() { [[ $'\n'${imported}$'\n' == *$'\n'"$1 $2"$'\n'* ]]; } # SET NAME

# no_feature NAME SET REASON: says why a feature is not computed, if it has not been imported. SET may be empty: all.
no_feature() {
  local label=$1${2:+ $2}
  if is_imported "${2:-${train_set}}" "$1"; then
    echo "  keep   ${label} (imported)"
  else
    echo "  none   ${label}: $3"
  fi
}

# has_transcripts_alone SET: whether the set has neither sound nor pictures, nor features of them, only text.
has_transcripts_alone() {
  local data=${datadir}/$1 dump=${dumpdir}/$1
  [[ -f ${data}/text && ! -e ${data}/wav.scp && ! -e ${data}/video.scp && ! -e ${dump}/audio.scp && ! -e ${dump}/video.scp ]]
}

# plan_feature NAME SET STEP_OPTIONS... -- MODULE OPTIONS...: plans a step that runs MODULE in nj jobs, each over a shard
# of the set, and joins the shards. run_planned then runs the planned steps of all sets together, so that each job loads
# its models once.
planned=()
plan_feature() {
  local name=$1 set=$2 options=() force_option=() inputs
  shift 2
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  if is_imported "${set}" "${name}"; then
    echo "  keep   ${name} ${set} (imported)"
    return
  fi
  local dump=${dumpdir}/${set} data=${datadir}/${set}
  if [[ ${force} == true ]]; then force_option=(--force); fi
  if has_transcripts_alone "${set}"; then inputs=("${data}/text"); else inputs=("${data}/wav.scp"); fi
  if ((${#planned[@]})); then planned+=(--next); fi
  planned+=("${force_option[@]}" --name "${name} ${set}" --state-dir "${state_dir}" "${options[@]}"
    --inputs "${inputs[@]}" "${data}/utt2spk" --optional-inputs "${data}/segments"
    --stale "${dump}/ark/${name}.*" --ignore device shard num-jobs max-drop
    -- ${decode_cmd} "${gpu_option[@]}" "JOB=1:${nj}" "${dumpdir}/log/${name}.JOB.log" --
    python3 -m "$@" --data-dir "${data}" --dump-dir "${dump}" --shard "JOB/${nj}" --device "${device}"
    --then ${train_cmd} "${dumpdir}/log/${name}.join.log" --
    python3 -m sdumc.bin.finish_dump --data-dir "${data}" --dump-dir "${dump}" --name "${name}" --num-jobs "${nj}"
    --max-drop "${max_drop}")
}
run_planned() {
  if ((${#planned[@]})); then python3 -S -E utils/step.py "${planned[@]}"; fi
  planned=()
}

# ---- stage 0 and 1 ---------------------------------------------------------------------------------------------------

prepare_corpus() {
  if [[ -f local/corpus.sh ]]; then bash local/corpus.sh; fi
}

# Writes scale.yaml into the data directories and dumps that are there, if --label-scale is given.
declare_scale() {
  local set folders=()
  if [[ -z ${label_scale} ]]; then return; fi
  for set in ${all_sets}; do folders+=("${datadir}/${set}" "${dumpdir}/${set}"); done
  python3 -m sdumc.scale write "${label_scale}" "${folders[@]}"
}

prepare_data() {
  local set data inputs
  if [[ -n ${label_scale} ]]; then # before local/data.sh, so that utils/fix_data_dir.py finds it
    for set in ${all_sets}; do mkdir -p "${datadir}/${set}"; done
    declare_scale
  fi
  if [[ -f local/data.sh ]]; then bash local/data.sh; fi
  declare_scale
  for set in ${all_sets}; do
    data=${datadir}/${set}
    inputs=("${data}/wav.scp")
    if has_transcripts_alone "${set}"; then
      echo "  none   sound and pictures ${set}: there are transcripts alone"
      inputs=("${data}/text")
    elif [[ ! -e ${data}/wav.scp && -e ${dumpdir}/${set}/utt2label ]]; then
      echo "  none   check ${set}: there are no media, only features in ${dumpdir}/${set}"
      continue
    fi
    step "check ${data}" --inputs "${inputs[@]}" "${data}/utt2spk" --optional-inputs \
      "${data}"/{segments,video.scp,text,text.absent,utt2label,spk2utt,utt2dur,scale.yaml} \
      -- ${train_cmd} "${data}/log/check.log" -- python3 utils/validate_data_dir.py "${data}"
  done
}

# ---- stage 2: text ---------------------------------------------------------------------------------------------------

# Whether sound can stand before words: with a projector that was given, or that stage 2 trains or has trained.
has_projector() {
  [[ -n ${encoder} && -n ${llm} && (-n ${projector} || ${reads} == simulated || -e ${speech_projector}) ]]
}

make_text() {
  local simulates=false
  find_imported
  if has_transcripts_alone "${train_set}"; then
    no_feature text_sim "" "there is no sound to simulate text from"
    return
  fi
  if [[ ${reads} != simulated ]]; then
    no_feature text_sim "" "the missing flow reads other text (missing-text: ${reads})"
  elif [[ -z ${encoder} || -z ${llm} ]]; then
    no_feature text_sim "" "needs --encoder and --llm"
  elif [[ -z ${projector} && ! -f ${datadir}/${projector_set}/text && ! -e ${speech_projector} ]]; then
    no_feature text_sim "" "needs --projector: there are no transcripts in ${datadir}/${projector_set} to train one"
  else
    simulates=true
    if [[ -z ${projector} ]]; then train_projector; fi
  fi
  if [[ -z ${asr_model} ]]; then
    no_feature text_asr "" "needs --asr-model"
    if [[ ${reads} == asr && ! -f ${datadir}/${train_set}/text_asr && ! -f ${dumpdir}/${train_set}/text_asr.scp ]]; then
      die "--missing-text asr needs --asr-model, or ${datadir}/<set>/text_asr"
    fi
  else
    recognize_speech
  fi
  # After recognition, whose text replaces what the speech LLM refuses to transcribe.
  if [[ ${simulates} == true ]]; then simulate_text; fi
}

train_projector() {
  local learn
  use_config "${projector_config}"
  learn=(python3 -m sdumc.bin.train_projector "${config[@]}" --encoder "${encoder}" --llm "${llm}"
    --train-data-dir "${datadir}/${projector_set}" --valid-data-dir "${datadir}/${valid_set}" --device "${device}")
  step projector --inputs "${datadir}"/{"${projector_set}","${valid_set}"}/{wav.scp,text} "${settings[@]}" \
    --optional-inputs "${encoder}" "${llm}" --outputs "${speech_projector}" \
    --stale "${speech_projector}" "${speech_projector}.partial" \
    --ignore device -- ${cuda_cmd} "${gpu_option[@]}" "${expdir}/log/projector.log" -- \
    "${learn[@]}" --output "${speech_projector}"
  if cross_fits; then train_on_parts "${learn[@]}"; fi
}

# Whether the train set's text is simulated by projectors that have not learned from it, since the one for all other sets
# has. Their folder has `utt2fold`, the part of each utterance, and a projector for each part, trained without it.
cross_fits() { [[ -z ${projector} && ${projector_set} == "${train_set}" ]] && ((projector_folds > 1)); }
parts_of_train() { awk '$2 > n { n = $2 } END { print n + 0 }' "${expdir}/projector_folds/utt2fold"; }

train_on_parts() { # COMMAND... that trains a projector
  local folder=${expdir}/projector_folds data=${datadir}/${train_set} parts
  step "parts of ${train_set}" --inputs "${data}"/{utt2spk,text} --outputs "${folder}/utt2fold" \
    -- ${train_cmd} "${expdir}/log/projector_folds.log" -- \
    python3 utils/split_speakers.py --data-dir "${data}" --parts "${projector_folds}" "${folder}/utt2fold"
  parts=$(parts_of_train)
  if ((parts < 2)); then
    echo "  none   projectors without a part of ${train_set}: it has one transcript"
    return
  fi
  step "projectors without a part of ${train_set}" \
    --inputs "${folder}/utt2fold" "${datadir}"/{"${train_set}","${valid_set}"}/{wav.scp,text} "${settings[@]}" \
    --optional-inputs "${encoder}" "${llm}" --outputs $(seq -f "${folder}/%g/projector.safetensors" "${parts}") \
    --stale "${folder}/[0-9]*" --ignore device \
    -- ${cuda_cmd} "${gpu_option[@]}" "JOB=1:${parts}" "${expdir}/log/projector_without_part.JOB.log" -- \
    "$@" --folds "${folder}/utt2fold" --leave-out JOB --output "${folder}/JOB"
}

# use_folds SET: sets `folds`, the option with which a set's sound is read through the projectors of its parts.
use_folds() {
  folds=()
  if [[ $1 == "${train_set}" && -e ${expdir}/projector_folds/utt2fold ]] && cross_fits && (($(parts_of_train) > 1)); then
    folds=(--projector-folds "${expdir}/projector_folds")
  fi
}

recognize_speech() {
  local set
  use_config "${asr_config}"
  for set in ${all_sets}; do
    plan_feature asr_hyp "${set}" --optional-inputs "${asr_model}" "${settings[@]}" \
      --outputs "${datadir}/${set}/text_asr" -- sdumc.bin.recognize "${config[@]}" --model "${asr_model}"
  done
  run_planned
}

simulate_text() {
  local set data rescoring=()
  use_config "${simulation_config}"
  if [[ -n ${rescorer} ]]; then rescoring=(--rescorer "${rescorer}"); fi
  for set in ${all_sets}; do
    data=${datadir}/${set}
    use_folds "${set}"
    plan_feature text_sim "${set}" "${settings[@]}" \
      --optional-inputs "${encoder}" "${llm}" "${speech_projector}" "${folds[@]:1}" "${rescoring[@]:1}" "${data}/text_asr" \
      --outputs "${data}/text_sim" "${dumpdir}/${set}/text_sim.scp" -- \
      sdumc.bin.simulate_text "${config[@]}" --encoder "${encoder}" --projector "${speech_projector}" --llm "${llm}" \
      "${folds[@]}" "${rescoring[@]}"
  done
  run_planned
}

# ---- stage 3: features -----------------------------------------------------------------------------------------------

extract_features() {
  find_imported
  copy_labels
  if has_transcripts_alone "${train_set}"; then
    no_feature audio "" "there is no sound"
  elif [[ -z ${encoder} ]]; then
    no_feature audio "" "needs --encoder"
  else
    extract_audio
  fi
  extract_text text
  extract_text text_asr
  extract_video
}

copy_labels() {
  local set labels dump
  for set in ${all_sets}; do
    labels=${datadir}/${set}/utt2label dump=${dumpdir}/${set}
    if [[ ! -f ${labels} ]]; then continue; fi
    # shellcheck disable=SC2016  # bash -c expands its own
    step "labels ${set}" --inputs "${labels}" --optional-inputs "${datadir}/${set}/scale.yaml" \
      --outputs "${dump}/utt2label" -- bash -c 'mkdir -p "$2" && rm -f "$2/scale.yaml" &&
        if [[ -e $1/scale.yaml ]]; then cp "$1/scale.yaml" "$2/.copy" && mv "$2/.copy" "$2/scale.yaml"; fi &&
        cp "$1/utt2label" "$2/.copy" && mv "$2/.copy" "$2/utt2label"' copy "${datadir}/${set}" "${dump}"
  done
}

extract_audio() {
  local set
  use_config "${audio_config}"
  for set in ${all_sets}; do
    plan_feature audio "${set}" --optional-inputs "${encoder}" "${settings[@]}" \
      --outputs "${dumpdir}/${set}/audio.scp" -- sdumc.bin.extract_audio "${config[@]}" --model "${encoder}"
  done
  run_planned
}

extract_text() { # NAME: text or text_asr
  local name=$1 set text models=() files=()
  use_config "${text_config}"
  if has_projector && ! has_transcripts_alone "${train_set}"; then
    models=(--encoder "${encoder}" --projector "${speech_projector}") files=("${encoder}" "${speech_projector}")
  elif [[ -z ${text_config} || $(python3 utils/yaml_for_shell.py value context "${text_config}") != none ]]; then
    models=(--context prompt) # there is nothing that could put sound before the words
  fi
  for set in ${all_sets}; do
    text=${datadir}/${set}/${name}
    folds=()
    if ((${#files[@]})); then use_folds "${set}"; fi
    if [[ -z ${llm} ]] || { [[ -z ${encoder} && ${reads} == simulated ]] && ! has_transcripts_alone "${set}"; }; then
      no_feature "${name}" "${set}" "needs --llm and, unless the missing flow reads other text, --encoder"
    elif [[ ! -f ${text} ]]; then
      no_feature "${name}" "${set}" "there is no ${text}"
    else
      plan_feature "${name}" "${set}" --inputs "${text}" --optional-inputs "${text}.absent" "${llm}" "${files[@]}" "${folds[@]:1}" \
        "${settings[@]}" \
        --outputs "${dumpdir}/${set}/${name}.scp" -- sdumc.bin.extract_text "${config[@]}" "${models[@]}" "${folds[@]}" \
        --llm "${llm}" --name "${name}" --text "${text}"
    fi
  done
  run_planned
}

extract_video() {
  local set videos inputs any_set_has_video=false
  use_config "${video_config}"
  for set in ${all_sets}; do
    if [[ -f ${datadir}/${set}/video.scp ]]; then any_set_has_video=true; fi
  done
  for set in ${all_sets}; do
    videos=${datadir}/${set}/video.scp inputs=()
    if [[ -f ${videos} ]]; then inputs=(--inputs "${videos}"); fi
    if [[ -z ${vision_model} ]]; then
      no_feature video "${set}" "needs --vision-model"
    elif [[ ${any_set_has_video} == false ]]; then
      no_feature video "${set}" "there is no ${videos}"
    else # where other sets have video, a set without video.scp gets a feature that records every utterance as absent
      plan_feature video "${set}" "${inputs[@]}" --optional-inputs "${vision_model}" "${settings[@]}" \
        --outputs "${dumpdir}/${set}/video.scp" -- sdumc.bin.extract_video "${config[@]}" --model "${vision_model}"
    fi
  done
  run_planned
}

# ---- stages 4 to 6 ---------------------------------------------------------------------------------------------------

exp_of() { echo "${expdir}/${exp_tag}_seed$1"; } # SEED

train_all_seeds() {
  local seed folder name exp ranks=${ngpu} launcher runner inputs=() optional=() missing=() weights=() missing_feature
  if ((ngpu == 0)); then ranks=${nproc}; fi
  launcher=(${cuda_cmd} --num-nodes "${num_nodes}" --tasks-per-node "${ranks}")
  if ((ngpu > 0)); then launcher+=(--gpu "${ngpu}"); fi
  use_config "${train_config}"
  if [[ -n ${missing_text} ]]; then missing=(--missing-text "${missing_text}"); fi
  case ${reads} in
    simulated) missing_feature=text_sim ;;
    asr) missing_feature=text_asr ;;
    *) missing_feature= ;;
  esac
  declare_scale # of features from elsewhere
  if [[ -n ${train_weights// /} ]]; then weights=(--train-weights ${train_weights}); fi
  for folder in "${dumpdir}/${train_set}" "${dumpdir}/${valid_set}" ${more_train_dirs}; do
    optional+=("${folder}/scale.yaml")
    inputs+=("${folder}/utt2label")
    for name in audio text ${missing_feature} video; do
      optional+=("${folder}/${name}".{scp,frames,absent})
    done
  done
  for seed in ${seeds}; do
    exp=$(exp_of "${seed}")
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
      -- "${runner[@]}" -- sdumc.bin.train "${config[@]}" "${missing[@]}" \
      --train-dir "${dumpdir}/${train_set}" ${more_train_dirs} "${weights[@]}" --valid-dir "${dumpdir}/${valid_set}" --exp-dir "${exp}" --seed "${seed}" \
      --device "${device}"
  done
}

# possible_conditions SET EXP: those of --conditions that the set's features and the model allow.
possible_conditions() { python3 -m sdumc.conditions possible "${dumpdir}/$1" "${conditions}" "${reads}" "$2"; }

decode_all_seeds() {
  local seed set
  for seed in ${seeds}; do
    for set in ${test_sets}; do
      decode_set "$(exp_of "${seed}")" "${set}"
      if [[ -n ${protocols// /} ]]; then decode_protocols "$(exp_of "${seed}")" "${set}"; fi
    done
  done
}

decode_set() { # EXP SET: decodes under all conditions in one process, then scores each
  local exp=$1 set=$2 condition possible outputs=() scores=() speakers=()
  local output=${exp}/decode_${set} decode_output file
  mapfile -t possible < <(possible_conditions "${set}" "${exp}")
  ((${#possible[@]} > 0)) || die "${dumpdir}/${set} has the features for none of the conditions ${conditions}"
  if ((${#possible[@]} < $(wc -w <<<${conditions}))); then
    echo "  none   some conditions ${set}: its features allow only ${possible[*]}"
  fi
  decode_output=${output}
  if ((${#possible[@]} == 1)); then decode_output=${output}/${possible[0]}; fi
  for file in "${dumpdir}/${set}/utt2spk" "${datadir}/${set}/utt2spk"; do
    if [[ -f ${file} && ${#speakers[@]} == 0 ]]; then speakers=(--utt2spk "${file}"); fi
  done
  for condition in "${possible[@]}"; do
    outputs+=("${output}/${condition}"/{predictions.tsv,score.json})
    scores+=(--then ${train_cmd} "${output}/log/score_${condition}.log" -- python3 -m sdumc.bin.score --predictions
      "${output}/${condition}/predictions.tsv" --output "${output}/${condition}/score.json" "${speakers[@]}")
  done
  step "decode ${output}" \
    --inputs "${exp}"/{config.yaml,model.valid-best.safetensors} "${dumpdir}/${set}/utt2label" \
    --optional-inputs "${dumpdir}/${set}"/{audio,text,text_sim,text_asr,video}.{scp,frames,absent} \
    "${dumpdir}/${set}/scale.yaml" --outputs "${outputs[@]}" --ignore device \
    -- ${decode_cmd} "${gpu_option[@]}" "${output}/log/decode.log" -- \
    python3 -m sdumc.bin.decode --exp-dir "${exp}" --data-dir "${dumpdir}/${set}" --condition "${possible[@]}" \
    --output-dir "${decode_output}" --device "${device}" \
    "${scores[@]}"
}

decode_protocols() { # EXP SET: all protocols in one process; the report scores them
  local exp=$1 set=$2 protocol outputs=() output=$1/decode_$2/protocols
  for protocol in ${protocols}; do outputs+=("${output}/${protocol}/protocol.yaml"); done
  step "protocols ${output}" \
    --inputs "${exp}"/{config.yaml,model.valid-best.safetensors} "${dumpdir}/${set}/utt2label" \
    --optional-inputs "${dumpdir}/${set}"/{audio,text,text_sim,text_asr,video}.{scp,frames,absent} \
    --outputs "${outputs[@]}" --ignore device \
    -- ${decode_cmd} "${gpu_option[@]}" "${exp}/decode_${set}/log/protocols.log" -- \
    python3 -m sdumc.bin.decode --exp-dir "${exp}" --data-dir "${dumpdir}/${set}" --protocol ${protocols} \
    --output-dir "${output}" --device "${device}"
}

write_report() {
  local seed set exp exps=() inputs=() optional=() report=${expdir}/${exp_tag}
  for seed in ${seeds}; do
    exp=$(exp_of "${seed}")
    exps+=("${exp}")
    for set in ${test_sets}; do
      inputs+=("${exp}/decode_${set}/*/predictions.tsv")
      optional+=("${exp}/decode_${set}"/*/{score.json,internals.npz,attention.npz}
        "${exp}/decode_${set}"/protocols/*/protocol.yaml)
    done
    optional+=("${exp}/metrics.jsonl")
  done
  for set in ${all_sets}; do optional+=("${dumpdir}/${set}"/{audio,text,text_sim,text_asr,video}.scp); done
  step "report ${results}" --inputs "${inputs[@]}" --optional-inputs "${optional[@]}" \
    --outputs "${results}" "${report}/report.html" -- ${train_cmd} "${report}/log/report.log" -- \
    python3 -m sdumc.bin.report --exp-dirs "${exps[@]}" --data-root "${datadir}" --dump-root "${dumpdir}" \
    --train-set "${train_set}" --valid-set "${valid_set}" --test-sets ${test_sets} \
    --output-dir "${report}" --results "${results}"
}

show_scores() {
  local seed set
  for seed in ${seeds}; do
    for set in ${test_sets}; do utils/show_results.sh "$(exp_of "${seed}")/decode_${set}"; done
  done
}

# ---- all of it -------------------------------------------------------------------------------------------------------

run_stage() { # NUMBER NAME FUNCTION
  if (($1 < stage || stop_stage < $1)); then return; fi
  local start=${SECONDS}
  current_stage="stage $1 ($2)"
  echo "stage $1: $2"
  "$3"
  echo "  ${current_stage}: $((SECONDS - start)) s"
  current_stage=
}

current_stage=
say_where_it_stopped() {
  local code=$?
  if ((code != 0)) && [[ -n ${current_stage} ]]; then
    echo "sdumc.sh: stopped in ${current_stage} after ${SECONDS} s, exit code ${code};" \
      "the same command goes on from here" >&2
  fi
}

main() {
  check_options "$@"
  . ./path.sh
  . ./cmd.sh
  check_conditions
  choose_device
  all_sets=$(printf '%s\n' ${train_set} ${valid_set} ${test_sets} | awk '!seen[$0]++')
  speech_projector=${projector:-${expdir}/projector}
  # For local/*.sh:
  export train_set valid_set test_sets datadir dumpdir expdir nj ngpu device force max_drop label_scale
  export encoder llm projector asr_model vision_model train_cmd decode_cmd cuda_cmd
  export -f step
  mkdir -p "${state_dir}"
  local began=${state_dir}/began
  : >"${began}"
  trap say_where_it_stopped EXIT

  run_stage 0 corpus prepare_corpus
  run_stage 1 data prepare_data
  run_stage 2 text make_text
  run_stage 3 features extract_features
  run_stage 4 train train_all_seeds
  run_stage 5 decode decode_all_seeds
  run_stage 6 report write_report

  if ((stop_stage >= 5)); then show_scores; fi
  if [[ -n $(find "${state_dir}" -name '*.done' -newer "${began}" -print -quit) ]]; then
    echo "done in ${SECONDS} s"
  else
    echo "nothing to do: everything is up to date (${SECONDS} s)"
  fi
}

main "$@"
