#!/usr/bin/env bash
# CMU-MOSEI in any of the four forms in which it is available. README.md explains what to get and what each stage costs.
#
#   ./run.sh --source raw     --corpus-dir /corpora/CMU-MOSEI/Raw --folds cmu_mosei_std_folds.py
#   ./run.sh --source table   --table MOSEI/label.csv
#   ./run.sh --source toolkit --pickle unaligned_50.pkl
#   ./run.sh --source authors --features-dir features --labels label_official.npz --transcripts transcription.csv
#
# The options below are this recipe's own; those of sdumc.sh, which follow, can be mixed with them. egs/mosi uses this
# script too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

#: Corpus
source=raw    #: raw: videos, transcripts, labels; table: label.csv and clips; toolkit: unaligned_50.pkl or aligned_50.pkl; authors: released features
table=        #: table: the toolkit's label.csv, with Raw/<video_id>/<clip_id>.mp4 beside it; or another CSV or TSV file
media_dir=    #: table: folder of the clips, if it is not the table's
corpus_dir=   #: raw: the folder that holds Raw/; toolkit: the same, if there are media as well
folds=        #: raw: folder of train.txt, valid.txt, test.txt, or the CMU SDK's cmu_mosei_std_folds.py
labels=       #: raw: CSV file or folder, or .csd file (default: Raw/Labels); authors: label_official.npz
media=auto    #: raw: full (clips are cut from whole videos), segmented (a file a clip), or auto
pickle=       #: toolkit: the file
features_dir= #: authors: the folder that holds the feature folders
transcripts=  #: authors: the CSV table of transcripts
counts=mosei  #: published counts to show beside those found: mosei, mosi or none
#: Models
models=large  #: large: the paper's; small: for one consumer GPU or none (a missing flow that reads ASR text)
pass_options_to=./sdumc.sh
. utils/parse_options.sh

die() {
  echo "run.sh: error: $*" >&2
  exit 2
}
case ${source} in
  raw | table | toolkit | authors) ;;
  *) die "--source is raw, table, toolkit or authors, not '${source}'" ;;
esac
case ${models} in
  large) set_of_models=(wavlm-large vicuna-7b-v1.5 whisper-large-v3 clip-vit-large-patch14) ;;
  small) set_of_models=(wavlm-base-plus smollm2-135m-instruct whisper-base clip-vit-base-patch32) ;;
  *) die "--models is large or small, not '${models}'" ;;
esac
export source corpus_dir folds labels media pickle features_dir transcripts counts table media_dir

names=()
# Each source and set of models has its own folders, so that the features of one are not used in the experiments of
# another. Recognised words are in the data folder.
place='' has_media=false
if [[ ${source} =~ ^(raw|table)$ || (${source} == toolkit && -n ${corpus_dir}) ]]; then has_media=true; fi
if [[ ${source} != raw ]]; then place=${source}; fi
if [[ ${models} != large && ${has_media} == true ]]; then place+=${place:+_}${models}; fi
if [[ -n ${place} ]]; then
  names+=(--datadir "data/${place}" --dumpdir "dump/${place}" --expdir "exp/${place}" --results "RESULTS.${place}.md")
fi
if [[ ${models} == small && ${has_media} == true ]]; then
  for name in projector asr simulation audio text video; do names+=("--${name}-config" "conf/small/${name}.yaml"); done
  names+=(--missing-text asr) # no projector is published for these models
fi
# Models are needed only where there are media. Features that stage 1 imports are kept.
if [[ ${has_media} == true ]]; then
  names+=(--encoder "../../tools/models/${set_of_models[0]}" --llm "../../tools/models/${set_of_models[1]}")
  names+=(--asr-model "../../tools/models/${set_of_models[2]}")
fi
if [[ ${source} == raw || ${source} == table ]]; then
  names+=(--vision-model "../../tools/models/${set_of_models[3]}")
fi

../../tools/setup_env.sh --extras mosei --if-needed
./sdumc.sh "${names[@]}" "$@"
