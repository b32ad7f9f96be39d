# Shared by the shell tests: the repository, a work folder for each test, and a recipe whose commands are imitations.
# shellcheck shell=bash

REPO=$(cd "${BATS_TEST_DIRNAME}/../.." && pwd)
export REPO

setup() {
  cd "${BATS_TEST_TMPDIR}" || return 1
}

# Wait for a condition, a command that succeeds; two minutes are only a guard against waiting for ever.
wait_until() {
  local i
  for ((i = 0; i < 1200; i++)); do
    if "$@"; then return 0; fi
    sleep 0.1
  done
  echo "it did not happen: $*"
  return 1
}

# A sleep of an hour by a name that no other test has.
make_nap() {
  NAP=${BATS_TEST_TMPDIR}/nap
  export NAP
  ln -s "$(command -v sleep)" "${NAP}"
}

no_nap_left() { ! pgrep -f "${NAP} 3600" >/dev/null; }

# The commands of sdumc.bin imitated by scripts that write the same files in no time, in a repository of their own, so
# that the stage script can be tried in seconds. Each call is a line of ${FAKE}/calls.
make_fake_recipe() { # [FOLDER]
  FAKE=${1:-${BATS_TEST_TMPDIR}/fake}
  export FAKE
  mkdir -p "${FAKE}"/{utils,sdumc/bin,egs/r/{conf,local,models/{encoder,llm,ctc,vision}}}
  ln -s "${REPO}"/utils/* "${FAKE}/utils/"
  rm "${FAKE}/utils/validate_data_dir.py"
  echo 'import sys' >"${FAKE}/utils/validate_data_dir.py"
  ln -s "${REPO}"/sdumc/{conditions,errors}.py "${FAKE}/sdumc/"
  echo "__version__ = '0'" >"${FAKE}/sdumc/__init__.py"
  touch "${FAKE}/sdumc/bin/__init__.py"
  cp "${REPO}/tests/shell/fake_commands/commands.py" "${FAKE}/sdumc/bin/commands.py"
  local name
  for name in train_projector recognize simulate_text extract_audio extract_text extract_video finish_dump \
    train decode score report; do
    echo "from sdumc.bin.commands import main; main('${name}')" >"${FAKE}/sdumc/bin/${name}.py"
  done
  cd "${FAKE}/egs/r" || return 1
  ln -s "${REPO}"/egs/TEMPLATE/{sdumc.sh,path.sh,cmd.sh} .
  ln -s ../../utils utils
  for name in projector asr simulation audio text video train; do echo "key: 1" >"conf/${name}.yaml"; done
  for name in encoder llm ctc vision; do echo "{}" >"models/${name}/config.json"; done
  cat >local/data.sh <<'EOF'
for set in ${train_set} ${valid_set} ${test_sets}; do
  step "data ${set}" --outputs "${datadir}/${set}"/{wav.scp,utt2spk,utt2label,text,video.scp} -- bash -c '
    mkdir -p "$1"; for f in wav.scp utt2spk utt2label text video.scp; do echo "u1 1" >"$1/$f"; done' make "${datadir}/${set}"
done
EOF
}

# The fake recipe's run.sh.
# shellcheck disable=SC2120 # the tests give it arguments
recipe() {
  ./sdumc.sh --ngpu 0 --nproc 1 --nj 2 --encoder models/encoder --llm models/llm --asr-model models/ctc \
    --vision-model models/vision "$@"
}

# Once for all tests of a file: a recipe as it is when all stages have been run.
make_finished_recipe() {
  make_fake_recipe "${BATS_FILE_TMPDIR}/finished"
  recipe >"${FAKE}/said"
}

# A copy of it, times of files included, in place of the fake recipe; what the first run printed is ${FAKE}/said.
finished_recipe() {
  rm -rf "${FAKE}"
  cp -a "${BATS_FILE_TMPDIR}/finished" "${FAKE}"
  cd "${FAKE}/egs/r" || return 1
  forget_calls
}

calls() { if [[ -f ${FAKE}/calls ]]; then cat "${FAKE}/calls"; fi; }
forget_calls() { rm -f "${FAKE}/calls"; }
