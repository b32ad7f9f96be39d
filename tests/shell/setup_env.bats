#!/usr/bin/env bats
# tools/setup_env.sh and tools/check_install.py, as far as they can be tried without installing anything.

load common

setup() {
  cd "${BATS_TEST_TMPDIR}" || return 1
  if [[ -z ${VIRTUAL_ENV-} ]]; then export VIRTUAL_ENV=${REPO}/tools/venv; fi
  [[ -x ${VIRTUAL_ENV}/bin/python3 ]] || skip "no virtual environment"
}

# A repository without an environment.
bare_repository() {
  mkdir -p bare/tools bare/utils
  cp "${REPO}"/tools/{setup_env.sh,check_install.py} bare/tools/
  cp "${REPO}/utils/parse_options.sh" bare/utils/
  cp "${REPO}/setup.py" bare/
}

@test "a complete environment is found complete in under 3 s" {
  "${REPO}/tools/setup_env.sh" --extras test
  start=$(date +%s%N)
  run "${REPO}/tools/setup_env.sh" --extras test
  elapsed=$((($(date +%s%N) - start) / 1000000))
  [[ ${status} == 0 && ${output} == *"is complete" ]]
  ((elapsed < 3000))
}

@test "two set-ups at once" {
  "${REPO}/tools/setup_env.sh" --extras test &
  "${REPO}/tools/setup_env.sh" --extras test
  wait $!
}

@test "wrong options" {
  for words in "--extras nonsense" "--torch rocm" "--python" "--unknown 1" "stray"; do
    # shellcheck disable=SC2086
    run "${REPO}/tools/setup_env.sh" ${words}
    [[ ${status} != 0 && ${output} == *"error: "* ]]
  done
}

@test "no Python, or too old a one, is said in words" {
  bare_repository
  run env -u VIRTUAL_ENV -u CONDA_PREFIX bare/tools/setup_env.sh --python no-such-python
  [[ ${status} == 1 && ${output} == *"no such program"* ]]
  mkdir bin
  printf '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n' >bin/oldpython
  chmod +x bin/oldpython
  run env -u VIRTUAL_ENV -u CONDA_PREFIX PATH="${PWD}/bin:${PATH}" bare/tools/setup_env.sh --python oldpython
  [[ ${status} == 1 && ${output} == *"3.8.1; 3.10 to 3.13 are supported"* ]]
  [[ ! -e bare/tools/venv ]]
}

@test "the check tells what is there and what is missing" {
  run python3 "${REPO}/tools/check_install.py"
  [[ ${status} == 0 && ${output} == *"torch "* && ${output} == *"GPUs "* && ${output} == *"Slurm "* ]]
  bare_repository
  sed -i 's/"jiwer>=3.0"/"jiwer>=300"/' bare/setup.py
  run python3 bare/tools/check_install.py
  [[ ${status} == 1 && ${output} == *"but >=300 is needed"* && ${output} == *"missing: jiwer"* ]]
  sed -i 's/"h5py>=3.10"/"no-such-package"/; s/"jiwer>=300"/"jiwer"/' bare/setup.py
  run python3 bare/tools/check_install.py
  [[ ${status} == 0 ]]
  run python3 bare/tools/check_install.py --extras mosei
  [[ ${status} == 1 ]]
}
