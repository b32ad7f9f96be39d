#!/usr/bin/env bats
# tests/run.sh with imitated tools, in a repository of its own: what is run, what is told, and how it ends.

load common

setup() {
  FAKE=${BATS_TEST_TMPDIR}/fake
  export FAKE
  mkdir -p "${FAKE}"/{bin,utils,tools,tests/{shell,unit,integration,slurm},egs/TEMPLATE}
  cd "${FAKE}" || return 1
  # This machine's Slurm does not count.
  sed 's/slurmctld slurmd munged sbatch/imitated-slurm/' "${REPO}/tests/run.sh" >tests/run.sh
  cp "${REPO}/utils/parse_options.sh" utils/
  touch egs/TEMPLATE/path.sh
  imitate tools/setup_env.sh 'exit 0'
  for tool in ruff mypy shellcheck bats; do imitate "bin/${tool}" 'echo "$(basename "$0") $*" >>calls'; done
  imitate bin/python3 '
    if [[ $1 == tests/helpers/browser.py ]]; then [[ -e bin/imitated-browser ]]; exit; fi
    echo "$*" >>calls
    echo "=== 3 passed in 0.10s ==="
    exit "${PYTEST_ENDS:-0}"'
  PATH=${FAKE}/bin:${PATH}
}

imitate() {
  printf '#!/bin/bash\n%s\n' "$2" >"$1"
  chmod +x "$1"
}

@test "all parts are run; what is left out is told in one line, and the last line is pytest's" {
  run bash tests/run.sh
  [[ ${status} == 0 && ${lines[-1]} == "=== 3 passed in 0.10s ===" ]]
  [[ ${lines[-2]} == "tests/run.sh: passed: "*pytest* ]]
  for name in format lint types shellcheck bats; do [[ ${lines[-2]} == *"${name} ("* ]]; done
  [[ ${lines[-3]} == "tests/run.sh: left out: "*"(tests/run.sh --with-slurm)"*"(tests/run.sh --with-browser)" ]]
  grep -q -- '-m pytest .*--strict-skips .*-m not browser tests/integration tests/unit$' calls
}

@test "what is there is used without being asked for" {
  touch bin/imitated-slurm bin/imitated-browser
  chmod +x bin/imitated-*
  run bash tests/run.sh
  [[ ${status} == 0 && ${output} != *"left out"* ]]
  grep -q -- ' tests/slurm tests/integration tests/unit$' calls
  run grep -q browser calls
  [[ ${status} == 1 ]]
}

@test "one part, and words for pytest" {
  run bash tests/run.sh --unit -- -k sampler
  [[ ${status} == 0 && ${output} != *Slurm* ]]
  grep -q -- '-k sampler tests/unit$' calls
  run grep -E '^(ruff|mypy|shellcheck|bats)' calls
  [[ ${status} == 1 ]]
  run bash tests/run.sh --lint
  [[ ${status} == 0 && ${lines[-1]} == "tests/run.sh: passed: format ("*"), shellcheck ("* ]]
}

@test "a part that fails is named, the others are run, and the exit code is 1" {
  imitate bin/mypy 'echo "what is wrong"; exit 2'
  run bash tests/run.sh
  [[ ${status} == 1 && ${output} == *"what is wrong"*"FAILED: types ("*"; passed: "*pytest* ]]
  imitate bin/mypy 'exit 0'
  PYTEST_ENDS=1 run bash tests/run.sh
  [[ ${status} == 1 && ${output} == *"FAILED: pytest ("* ]]
}

@test "packages are installed when asked for and absent" {
  imitate bin/sudo '[[ $2 == true ]] || exec "${@:2}"'
  imitate bin/apt-get 'echo "apt-get $*" >>calls
    if [[ $* == *install*munge* ]]; then touch bin/imitated-slurm; chmod +x bin/imitated-slurm; fi
    if [[ $* == *install*chromium* ]]; then touch bin/imitated-browser; fi'
  run bash tests/run.sh --with-slurm --with-browser
  [[ ${status} == 0 && ${output} != *"left out"* ]]
  grep -q -- ' tests/slurm tests/integration tests/unit$' calls
  [[ $(grep -c "apt-get .* install" calls) == 2 ]]
  run bash tests/run.sh --with-slurm --with-browser
  [[ ${status} == 0 && $(grep -c "apt-get .* install" calls) == 2 ]]
}

@test "where packages cannot be had the run passes and says why" {
  imitate bin/sudo '[[ $2 == true ]] || exec "${@:2}"'
  imitate bin/apt-get 'echo "no network"; exit 100'
  run bash tests/run.sh --with-slurm
  [[ ${status} == 0 && ${output} == *"no network"* ]]
  [[ ${lines[-3]} == "tests/run.sh: left out: "*"(apt-get install slurm-wlm munge failed)"*"--with-browser)" ]]
}
