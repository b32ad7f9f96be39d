#!/usr/bin/env bats
# The shared stage script with imitated commands; tests/integration runs it with the real ones.

load common

setup_file() {
  make_finished_recipe
}

setup() {
  make_fake_recipe
}

@test "--help: groups, every option with its default, fewer than 40" {
  run ./sdumc.sh --nj 7 --help
  [[ ${status} == 0 && ${output} == *"Experiment:"* && ${output} == *"--nj "*"(default: 7)"* ]]
  options=$(grep -c '^  --' <<<"${output}")
  ((options > 20 && options < 40))
  for name in stage stop-stage ngpu nj num-nodes train-config exp-tag train-set valid-set test-sets dumpdir expdir; do
    grep -q "^  --${name} " <<<"${output}"
  done
}

@test "wrong options end with a message before anything is done" {
  for words in "--stag 3" "--nj four" "--nj 0" "--stage 5 --stop-stage 4" "--stop-stage 7" "--ngpu x" "--num-nodes 2" \
    "--cmd-backend pbs" "stray" "--train-set a/b" "--seeds one" "--test-sets=" "--expdir=a;b" "--exp-tag x*y" \
    "--more-train-dirs=a;b" "--projector-folds some" "--conditions fulll" "--missing-text real" "--protocols frame"; do
    # shellcheck disable=SC2086
    run recipe ${words}
    [[ ${status} == 2 && ${output} == *"error: "* ]]
  done
  run recipe --exp-tag '$(touch pwned)'
  [[ ${status} == 2 && ! -e pwned && -z $(calls) ]]
}

@test "all stages, then nothing to do" {
  finished_recipe
  output=$(<"${FAKE}/said")
  for file in data/test/text_asr dump/train/{audio,text,text_sim,text_asr,video}.scp exp/train_seed1/config.yaml \
    exp/train_seed1/decode_test/{full,missing,asr,none}/score.json RESULTS.md exp/train/report.html; do
    [[ -f ${file} ]]
  done
  for stage in 0 1 2 3 4 5 6; do [[ ${output} == *"stage ${stage} ("* ]]; done
  [[ ${output} == *"done in "* && ${output} == *"acc2_non0"* ]]
  run recipe
  [[ ${status} == 0 && -z $(calls) && ${output} == *"nothing to do"* && ${output} != *"  run "* ]]
}

@test "protocols: one step for all of them, and the report again" {
  finished_recipe
  run recipe --protocols "patterns frames"
  [[ ${status} == 0 && $(calls | cut -d' ' -f1 | xargs) == "decode report" ]]
  calls | grep -q -- '--protocol patterns frames --output-dir exp/train_seed1/decode_test/protocols '
  [[ -f exp/train_seed1/decode_test/protocols/frames/protocol.yaml ]]
  forget_calls
  run recipe --protocols "patterns frames"
  [[ ${status} == 0 && -z $(calls) ]]
  touch -d "2001-01-01" exp/train_seed1/model.valid-best.safetensors
  run recipe --protocols "patterns frames"
  [[ ${status} == 0 && $(calls | grep -c '^decode ') == 2 ]]
}

@test "a deleted output is made again, with what depends on it and nothing else" {
  finished_recipe
  rm dump/valid/audio.scp
  run recipe
  [[ ${status} == 0 ]]
  [[ $(calls | cut -d' ' -f1 | sort | uniq -c | xargs) == "1 decode 2 extract_audio 1 finish_dump 1 report 4 score 1 train" ]]
}

@test "a changed setting redoes its step, and more jobs or GPUs redo nothing" {
  finished_recipe
  run recipe --nj 3
  [[ -z $(calls) ]]
  echo "key: 2" >conf/video.yaml
  run recipe --stage 3 --stop-stage 3
  [[ $(calls | cut -d' ' -f1 | sort -u | xargs) == "extract_video finish_dump" ]]
  forget_calls
  recipe --stage 5 --stop-stage 5 --force
  [[ $(calls | cut -d' ' -f1 | sort -u | xargs) == "decode score" ]]
}

@test "--stage and --stop-stage do just those" {
  recipe --stop-stage 2
  [[ ! -e dump/train/audio.scp && -e dump/train/text_sim.scp ]]
  forget_calls
  recipe --stage 3 --stop_stage=3
  [[ $(calls | cut -d' ' -f1 | sort -u | xargs) == "extract_audio extract_text extract_video finish_dump" ]]
}

@test "--missing-text asr: without a projector, from the recogniser's transcripts to the report" {
  run recipe --missing-text asr
  [[ ${status} == 0 && ! -e dump/train/text_sim.scp && ! -e exp/projector ]]
  [[ -f exp/train_missing_asr_seed1/decode_test/missing/score.json && -f dump/train/text_asr.scp ]]
  [[ ${output} == *"none   text_sim: the missing flow reads other text (missing-text: asr)"* ]]
  [[ $(calls) != *projector* && $(calls) != *simulate_text* ]]
  [[ $(calls | grep '^extract_text' | grep -vc -e '--context prompt') == 0 ]]
  [[ $(calls | grep -c '^train .*--missing-text asr') == 1 ]]
  # It depends on the ASR text's features, and on nothing else of the text.
  forget_calls
  rm dump/train/text_asr.scp
  recipe --missing-text asr
  [[ $(calls | cut -d' ' -f1 | sort -u | xargs) == "decode extract_text finish_dump report score train" ]]
  # The encoder is not needed for text; a recogniser is.
  run recipe --missing-text asr --encoder "" --datadir data2 --dumpdir dump2 --stop-stage 3
  [[ ${status} == 0 && -f dump2/train/text_asr.scp && ! -e dump2/train/audio.scp ]]
  run recipe --missing-text asr --asr-model "" --datadir data3 --dumpdir dump3 --stop-stage 3
  [[ ${status} == 2 && ${output} == *"--missing-text asr needs --asr-model"* ]]
}

@test "--rescorer: the recogniser helps in simulation, which depends on it" {
  recipe
  forget_calls
  run recipe --rescorer models/ctc --stop-stage 2
  [[ ${status} == 0 && $(calls | cut -d' ' -f1 | sort -u | xargs) == "finish_dump simulate_text" ]]
  [[ $(calls | grep '^simulate_text' | grep -vc -e '--rescorer models/ctc') == 0 ]]
  forget_calls
  echo "{ }" >models/ctc/config.json
  run recipe --rescorer models/ctc --asr-model "" --stop-stage 2
  [[ $(calls | cut -d' ' -f1 | sort -u | xargs) == "finish_dump simulate_text" ]]
}

@test "simulated and ASR text in the missing flow, beside each other in one recipe" {
  finished_recipe
  echo "missing-text: asr" >conf/asr_text.yaml
  run recipe --train-config conf/asr_text.yaml
  [[ ${status} == 0 && $(calls | cut -d' ' -f1 | sort -u | xargs) == "decode report score train" ]]
  [[ -f exp/asr_text_seed1/config.yaml && -f exp/train_seed1/config.yaml ]]
}

@test "a failing job stops the recipe with its code, its log and the stage" {
  FAIL=extract_video run recipe
  [[ ${status} == 3 && ${output} == *"log: dump/log/video."[12]".log"* ]]
  [[ ${output} == *"this is what went wrong"* && ${output} == *"stopped in stage 3 (features)"* && ! -e exp/train_seed1 ]]
  run recipe
  [[ ${status} == 0 ]]
}

@test "features from elsewhere: stage 4 needs only scp files and labels" {
  for set in train valid test; do
    mkdir -p "dump/${set}"
    echo "u1 a.ark:3" | tee "dump/${set}/audio.scp" >"dump/${set}/text.scp"
    echo "u1 1" >"dump/${set}/utt2label"
  done
  run ./sdumc.sh --ngpu 0 --nproc 1 --stage 4
  [[ ${status} == 0 && ! -e data && ${output} == *"full"* && ! -e exp/train_seed1/decode_test/asr ]]
}

@test "sets without video or text, recipes without models" {
  sed -i 's/ text video.scp/ /; s/,text,video.scp//' local/data.sh
  run recipe --projector models/llm
  [[ ${status} == 0 && ${output} == *"none   video train"* && ${output} == *"none   text test"* ]]
  [[ ! -e exp/train_seed1/decode_test/full && -e exp/train_seed1/decode_test/missing/score.json ]]
}

@test "several seeds, another tag, another settings file" {
  cp conf/train.yaml "conf/my train.yaml"
  run recipe --seeds "1 2" --train-config "conf/my train.yaml" --exp-tag other --conditions none --results R.md
  [[ ${status} == 0 && -f R.md && -f exp/other_seed2/decode_test/none/score.json && ! -e exp/other_seed1/decode_test/full ]]
  grep -q '^train --config conf/my train.yaml .*--seed 2' "${FAKE}/calls"
}

@test "several dumps: options of the training, inputs of its step, an experiment of its own" {
  recipe
  mkdir -p ../other
  cp -r dump/train ../other/
  forget_calls
  run recipe --more-train-dirs "../other/train" --train-weights "1 0.5"
  [[ ${status} == 0 ]]
  calls | grep -q -- '--train-dir dump/train ../other/train --train-weights 1 0.5 --valid-dir dump/valid --exp-dir exp/train_joint_seed1 '
  forget_calls
  run recipe --more-train-dirs "../other/train" --train-weights "1 0.5"
  [[ ${status} == 0 && -z $(calls) ]]
  echo "other 1" >>../other/train/utt2label
  run recipe --more-train-dirs "../other/train" --train-weights "1 0.5" --stop-stage 4
  [[ ${status} == 0 && $(calls | grep -c '^train ') == 1 ]]
  run recipe --more-train-dirs "../other/train" --train-weights "1"
  [[ ${status} == 2 && ${output} == *"give one for the train set and one for each of --more-train-dirs"* ]]
  run recipe --more-train-dirs nowhere
  [[ ${status} != 0 && ${output} == *"nowhere/utt2label"* ]]
}

@test "two test sets, names of the user's own" {
  run recipe --train-set tr --valid-set va --test-sets "te1 te2"
  [[ ${status} == 0 && -f exp/train_seed1/decode_te1/full/score.json && -f exp/train_seed1/decode_te2/full/score.json ]]
  # One more: nothing is trained again.
  run recipe --train-set tr --valid-set va --test-sets "te1 te2 te3"
  [[ ${status} == 0 && -f exp/train_seed1/decode_te3/full/score.json && ${output} == *"skip   train exp/train_seed1"* ]]
}

@test "the projector learns from the train set, or from a set of its own" {
  recipe --stop-stage 2
  grep -q '^train_projector .*--train-data-dir data/train --valid-data-dir data/valid' "${FAKE}/calls"
  forget_calls
  cp -r data/train data/other
  recipe --stop-stage 2 --projector-set other
  grep -q '^train_projector .*--train-data-dir data/other --valid-data-dir data/valid' "${FAKE}/calls"
  [[ ! -e dump/other ]]
  rm -r data/other
  run recipe --stop-stage 2 --projector-set other
  [[ ${status} != 0 ]]
}

@test "cross-fitting: a projector for each part of the train set, which then reads that part" {
  # Six utterances of three speakers; a fake recipe has one utterance, of which no part can be left out.
  run recipe --stop-stage 2
  [[ ${status} == 0 && ${output} == *"none   projectors without a part of train: it has one transcript"* ]]
  [[ $(calls | grep -c '^train_projector') == 1 && $(calls) != *--projector-folds* ]]
  for name in utt2spk text wav.scp; do printf '%s\n' "a-1 a" "a-2 a" "b-1 b" "b-2 b" "c-1 c" "c-2 c" >"data/train/${name}"; done
  forget_calls
  run recipe --stop-stage 3
  [[ ${status} == 0 && ${output} == *"run    projectors without a part of train (new)"* ]]
  [[ $(cut -d' ' -f2 exp/projector_folds/utt2fold | uniq -c | wc -l) == 3 ]]
  [[ $(calls | grep '^train_projector' | grep -c -e '--train-data-dir data/train .*--folds exp/projector_folds/utt2fold --leave-out [123] --output exp/projector_folds/[123]$') == 3 ]]
  [[ $(calls | grep -c '^train_projector .*--output exp/projector$') == 1 && -f exp/log/projector_without_part.3.log ]]
  # Real, ASR and simulated text of train alone, in two jobs each.
  [[ $(calls | grep -e '--projector-folds exp/projector_folds' | grep -c '^\(simulate\|extract\)_text .*--projector exp/projector .*data/train ') == 6 ]]
  [[ $(calls | grep -c -e '--projector-folds') == 6 ]]
  forget_calls
  run recipe --stop-stage 3
  [[ ${status} == 0 && -z $(calls) ]]
  # Fewer parts: all of them anew, what read train too, and nothing else.
  run recipe --stop-stage 3 --projector-folds 2
  [[ ${output} == *"run    projectors without a part of train (changed: exp/projector_folds/utt2fold"* && ! -e exp/projector_folds/3 && $(calls | grep -c '^train_projector') == 2 ]]
  [[ $(calls | grep '^simulate_text\|^extract' | grep -vc 'data/train') == 0 && $(calls | grep -c '^simulate_text') == 2 ]]
  forget_calls
  run recipe --stop-stage 3 --projector-folds 0
  [[ $(calls) != *--projector-folds* && $(calls) != *train_projector* && $(calls | grep -c '^simulate_text') == 2 ]]
  # Not where the projector is given, or learns from another set.
  forget_calls
  cp -r data/train data/other
  recipe --stop-stage 2 --projector-set other --expdir exp2
  recipe --stop-stage 2 --projector models/llm --expdir exp3
  [[ $(calls) != *--projector-folds* && $(calls) != *--leave-out* && ! -e exp2/projector_folds && ! -e exp3 ]]
}

@test "cross-fitting: the part and the log of a training that fails" {
  recipe --stop-stage 1
  for name in utt2spk text wav.scp; do printf '%s\n' "a-1 a" "b-1 b" >"data/train/${name}"; done
  FAIL_WITH="--leave-out 2" run recipe --stop-stage 2
  [[ ${status} == 3 && ${output} == *"log: exp/log/projector_without_part.2.log"* && ${output} == *"job 2 of 1:2 failed"* ]]
  run recipe --stop-stage 2
  [[ ${status} == 0 && ${output} == *"projectors without a part of train (going on)"* ]]
  echo "b-1" >>data/train/utt2spk
  run recipe --stop-stage 2
  [[ ${status} == 1 && ${output} == *"data/train/utt2spk: utterance 'b-1' has no speaker"* ]]
}

@test "a settings file's base counts as a setting, quoted or with a comment" {
  printf '"base": "../shared/video.yaml"  # of all recipes\nkey: 1\n' >conf/video.yaml
  mkdir shared
  echo "key: 2" >shared/video.yaml
  recipe --stop-stage 3
  forget_calls
  recipe --stop-stage 3
  [[ -z $(calls) ]]
  echo "key: 34" >shared/video.yaml
  run recipe --stop-stage 3
  [[ ${output} == *"run    video train, video valid, video test (changed: conf/../shared/video.yaml)"* ]]
}

@test "features that stage 1 has imported are kept" {
  mkdir -p dump/valid
  printf 'dim: 3\nimported: true # by the recipe\n' >dump/valid/audio.yaml
  echo "u1 there.ark:3" >dump/valid/audio.scp
  run recipe --force --stop-stage 3
  [[ ${status} == 0 && ${output} == *"keep   audio valid (imported)"* && $(<dump/valid/audio.scp) == "u1 there.ark:3" ]]
  [[ -f dump/train/audio.scp && $(calls | grep -c '^extract_audio .*data/valid') == 0 ]]
}

@test "scores: conditions in order, NaN as a dash, a damaged file is an error" {
  mkdir -p exp/a/decode_test/{zero,none,full}
  for name in zero none; do
    echo '{"mae": 1.0, "corr": null, "acc7": 0.5, "acc2_has0": 1, "acc2_non0": 0.25, "n": 3}' \
      >"exp/a/decode_test/${name}/score.json"
  done
  run utils/show_results.sh
  [[ ${status} == 0 && ${lines[2]} == "  none "*" 1.000       -   0.500      1.000      0.250     3" ]]
  [[ ${lines[3]} == "  zero "* && ${#lines[@]} == 4 ]]
  echo "{" >exp/a/decode_test/full/score.json
  run utils/show_results.sh exp/a/decode_test
  [[ ${status} == 1 && ${output} == *"full/score.json: not valid JSON"* ]]
}

@test "--help of recipes with options of their own, and a misspelt one of them" {
  for name in mosei mosi sims; do
    run "${REPO}/egs/${name}/run.sh" --nj 3 --help
    [[ ${status} == 0 && ${output} == *"Corpus:"*"--corpus-dir "*"Stages:"*"--stop-stage "* ]]
    run "${REPO}/egs/${name}/run.sh" --corpusdir x
    [[ ${status} == 2 && ${output} == *"did you mean --corpus-dir?"* ]]
  done
}

@test "one GPU: one job at a time, so one job; a hidden GPU is none" {
  mkdir bin site
  printf '#!/bin/sh\necho "GPU 0: of a test"\n' >bin/nvidia-smi
  chmod +x bin/nvidia-smi
  mkdir -p site/torch-2.9.0.dist-info # its version is looked up, not the package
  printf 'Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n' >site/torch-2.9.0.dist-info/METADATA
  export PATH=${PWD}/bin:${PATH} PYTHONPATH=${PWD}/site
  run ./sdumc.sh --nproc 1 --nj 3 --asr-model models/ctc --stop-stage 3
  [[ ${status} == 0 && ${output} == *"note: --nj 1 in place of 3"* ]]
  grep -q -- '^recognize .*--shard 1/1 --device cuda' "${FAKE}/calls"
  rm -r "${FAKE}/calls" data dump
  CUDA_VISIBLE_DEVICES='' run ./sdumc.sh --nproc 1 --nj 3 --asr-model models/ctc --stop-stage 3
  [[ ${status} == 0 && ${output} != *note* ]]
  grep -q -- '^recognize .*--shard 3/3 --device cpu' "${FAKE}/calls"
}
