#!/usr/bin/env bats
# utils/validate_data_dir.py and utils/fix_data_dir.py: exit codes and messages that name file and utterance.

load common

setup() {
  cd "${BATS_TEST_TMPDIR}" || return 1
  export LC_ALL=C
  mkdir -p data
  for utt in a-1 a-2 b-1; do
    echo "${utt} ${utt}.wav" >>data/wav.scp
    echo "${utt} ${utt%-*}" >>data/utt2spk
    echo "${utt} 0.5" >>data/utt2label
    echo "${utt} some words" >>data/text
  done
}

check() { run python3 "${REPO}/utils/validate_data_dir.py" --no-media data; }

@test "a good directory" {
  check
  [[ ${status} == 0 && ${output} == *"3 utterances of 2 speakers"* ]]
}

@test "every kind of mistake is found, named, and fails" {
  damage() { # FILE, SED PROGRAM, WHAT THE MESSAGE HAS TO NAME
    cp -r data good
    sed -i "$2" "data/$1"
    check
    [[ ${status} == 1 && ${output} == *"$1"* && ${output} == *"$3"* ]]
    rm -r data
    mv good data
  }
  damage utt2label 's/a-2 .*/a-2 7/' a-2
  damage utt2label 's/a-2 .*/a-2 nan/' a-2
  damage utt2label 's/a-2 .*/a-2 good/' a-2
  damage utt2label '/a-2/d' a-2
  damage text 's/a-2 .*/a-2/' a-2
  damage utt2spk '1h;1d;2G' a-1
  damage wav.scp '2p' a-2
  damage wav.scp 's/a-2.wav/cat a-2.wav |/' a-2
}

@test "media that is not there is found" {
  run python3 "${REPO}/utils/validate_data_dir.py" data
  [[ ${status} == 1 && ${output} == *"a-1"* && ${output} == *"a-1.wav"* ]]
}

@test "fixing leaves out little, and lists it; much is refused" {
  sed -i '/a-2/d' data/text
  run python3 "${REPO}/utils/fix_data_dir.py" --no-media data
  [[ ${status} == 1 && $(wc -l <data/wav.scp) == 3 ]]
  run python3 "${REPO}/utils/fix_data_dir.py" --no-media --max-drop 0.5 data
  [[ ${status} == 0 && $(wc -l <data/wav.scp) == 2 ]]
  grep -q '^a-2	' data/dropped.tsv
}
