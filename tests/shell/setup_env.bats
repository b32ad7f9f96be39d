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
  cp "${REPO}"/tools/{setup_env.sh,check_install.py,pins.txt} bare/tools/
  cp "${REPO}/utils/parse_options.sh" bare/utils/
  cp "${REPO}"/{setup.py,pyproject.toml} bare/
}

# A virtual environment that has what this one has, and a pip that only writes down what it is told.
environment() {
  python3 -m venv --without-pip "$1"
  python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo "$1"/lib/python3*/site-packages)/all.pth"
  mkdir -p imitation/pip
  echo 'import os, sys; print(*sys.argv[1:], file=open(os.environ["CALLS"], "a"))' >imitation/pip/__main__.py
  touch imitation/pip/__init__.py
  CALLS=${PWD}/calls
  export CALLS PYTHONPATH=${PWD}/imitation https_proxy=http://127.0.0.1:9 # no index is reached
}

@test "in a complete environment nothing is installed or imported" {
  "${REPO}/tools/setup_env.sh" --extras test
  mkdir imitation
  for module in pip torch transformers; do echo 'raise SystemExit("imported")' >"imitation/${module}.py"; done
  PYTHONPATH=${PWD}/imitation run "${REPO}/tools/setup_env.sh" --extras test
  [[ ${status} == 0 && ${output} == *"is complete"* && ${output} != *imported* ]]
}

@test "two set-ups at once" {
  "${REPO}/tools/setup_env.sh" --extras test &
  "${REPO}/tools/setup_env.sh" --extras test
  wait $!
}

@test "wrong options" {
  for words in "--extras nonsense" "--torch rocm" "--versions latest" "--python" "--unknown 1" "stray"; do
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
  sed -i 's/"jiwer>=.*"/"jiwer>=300"/' bare/setup.py
  run python3 bare/tools/check_install.py
  [[ ${status} == 1 && ${output} == *"but >=300 is needed"* && ${output} == *"missing: jiwer"* ]]
  sed -i 's/"h5py>=[^"]*"/"no-such-package"/; s/"jiwer>=300"/"jiwer"/' bare/setup.py
  run python3 bare/tools/check_install.py
  [[ ${status} == 0 ]]
  run python3 bare/tools/check_install.py --extras mosei
  [[ ${status} == 1 ]]
}

@test "an environment of the user's own is taken as it is, and told where it differs from the pins" {
  bare_repository
  environment own
  sed -i 's/^tqdm==.*/tqdm==4.60.0/; s/^mdurl==.*/mdurl==0.1.0/' bare/tools/pins.txt
  for _ in first second; do
    run env VIRTUAL_ENV="${PWD}/own" bare/tools/setup_env.sh --extras test
    [[ ${status} == 0 && ${output} == *"own is complete"* && ${output} != *installing* ]]
    [[ ${output} == *"note: other versions than those of tools/pins.txt: "*"(pinned: 4.60.0)"*"(pinned: 0.1.0)"* ]]
    run grep -c ^install calls
    [[ ${output} == 1 ]] # sdumc itself, in the first call
  done
  run python3 bare/tools/check_install.py
  [[ ${status} == 0 && ${output} =~ "tqdm "[^$'\n']*"pinned: 4.60.0" && ${output} =~ "mdurl "[^$'\n']*"pinned: 0.1.0" ]]
  rm calls
  run env VIRTUAL_ENV="${PWD}/own" bare/tools/setup_env.sh --extras test --if-needed
  [[ ${status} == 0 && -z ${output} ]]
  # What is missing comes in the pinned version; the rest stays.
  sed -i 's/"jiwer>=.*"/"jiwer>=300"/' bare/setup.py
  run env VIRTUAL_ENV="${PWD}/own" bare/tools/setup_env.sh --extras test
  grep -q '^jiwer==' own/sdumc-constraints.txt
  run grep '^torch==\|^tqdm==' own/sdumc-constraints.txt
  [[ ${status} == 1 ]]
}

@test "tools/venv gets the pinned versions, oldest and newest an environment each" {
  bare_repository
  environment bare/tools/venv
  sed -i 's/^tqdm==.*/tqdm==4.60.0/' bare/tools/pins.txt
  run env -u VIRTUAL_ENV -u CONDA_PREFIX bare/tools/setup_env.sh
  [[ ${status} == 0 && ${output} == *"installing into ${PWD}/bare/tools/venv "* ]]
  grep -qx 'tqdm==4.60.0' bare/tools/venv/sdumc-constraints.txt
  grep -q -- "install --no-build-isolation -e ${PWD}/bare\[mini\] -c ${PWD}/bare/tools/venv/sdumc-constraints.txt" calls
  # After an interruption pip is asked again, although no requirement of setup.py is missing.
  cp "${REPO}/tools/pins.txt" bare/tools/
  touch bare/tools/venv/.sdumc-installing
  run env -u VIRTUAL_ENV -u CONDA_PREFIX bare/tools/setup_env.sh
  [[ ${status} == 0 && ${output} == *interrupted*installing* && ! -e bare/tools/venv/.sdumc-installing ]]
  stamp=$(cat bare/tools/venv/.sdumc-env)

  rm calls
  run env -u VIRTUAL_ENV -u CONDA_PREFIX bare/tools/setup_env.sh --versions oldest
  [[ ${status} == 0 && ${output} == *"torch==2.13.0 as pinned: the CPU builds of others"*"cannot be reached"* ]]
  cd bare/tools
  grep -q -- "-e ${PWD%/tools}\[mini\] -c ${PWD}/venv-oldest/sdumc-constraints.txt" ../../calls
  sort venv-oldest/sdumc-constraints.txt >../../found
  { python3 check_install.py --constraints oldest | grep -v '^torch=='; grep '^torch==' pins.txt; } | sort >../../wanted
  diff ../../wanted ../../found
  [[ $(venv-oldest/bin/python3 -c 'import sys; print(sys.prefix)') == "${PWD}/venv-oldest" ]]
  # shellcheck disable=SC1091
  [[ $(. venv-oldest/bin/activate && echo "${VIRTUAL_ENV}") == "${PWD}/venv-oldest" ]]
  # shellcheck disable=SC1091
  [[ $(. venv/bin/activate && echo "${VIRTUAL_ENV}") == "${PWD}/venv" && $(cat venv/.sdumc-env) == "${stamp}" ]]

  run env -u VIRTUAL_ENV -u CONDA_PREFIX ./setup_env.sh --versions newest
  [[ ${status} == 0 ]]
  grep -q -- "venv-newest/sdumc-constraints.txt --upgrade --upgrade-strategy eager" ../../calls
  [[ $(cat venv-newest/sdumc-constraints.txt | tr -d '\n') == torch==2.13.0 ]]
}
