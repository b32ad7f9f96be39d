#!/usr/bin/env bash
# Usage: tests/run.sh [options] [-- pytest arguments]
#
# Installs what the tests need (without root) and runs them: format, lint and types, shellcheck, bats, then pytest, of which the
# last line is the last line here. All parts run, also when one fails; the exit code is 1 when any has failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Parts (all of them when none is chosen)
lint=false        #: format, lint and types of Python, shellcheck
shell=false       #: tests of the shell scripts (bats)
unit=false        #: unit tests (pytest)
integration=false #: whole recipes at reduced size, minutes (pytest)
#: Other
with_slurm=false  #: also the tests on a real Slurm, which apt installs if it can; else they are skipped
quick=false       #: lint, shell and unit, without the tests that are marked slow
. utils/parse_options.sh

if [[ ${quick} == true ]]; then
  lint=true shell=true unit=true
elif [[ ${lint}${shell}${unit}${integration} != *true* ]]; then
  lint=true shell=true unit=true integration=true
fi

tools/setup_env.sh --extras all
. egs/TEMPLATE/path.sh

failed=() passed=()
part() { # NAME COMMAND...
  local name=$1 start=${SECONDS}
  shift
  echo "---- ${name}"
  if "$@"; then passed+=("${name} ($((SECONDS - start)) s)"); else failed+=("${name}"); fi
}

shell_files() { git ls-files -z --cached --others --exclude-standard '*.sh' '*.bats' '*.bash' .ci/run 2>/dev/null; }
check_shell() {
  local files
  mapfile -d '' files < <(shell_files)
  # A source archive has no git.
  ((${#files[@]})) || mapfile -d '' files < \
    <(find .ci egs utils tests tools -name venv -prune -o \( -name '*.sh' -o -name '*.bats' -o -name '*.bash' \) -print0)
  local file kept=()
  for file in "${files[@]}"; do
    if [[ -f ${file} && ! -L ${file} && ${file} != */utils/*/* ]]; then kept+=("${file}"); fi
  done
  for file in "${kept[@]}"; do
    [[ ${file} == *.bats ]] || bash -n "${file}" || return 1
  done
  shellcheck -x -P SCRIPTDIR:SCRIPTDIR/.. "${kept[@]}"
}

# Debian's Slurm and munge, not started by the system: the tests start their own. Without them the tests are skipped, so
# nothing here is an error.
get_slurm() {
  local program absent=() root=() output
  for program in slurmctld slurmd munged sbatch; do
    PATH=${PATH}:/usr/sbin:/sbin command -v "${program}" >/dev/null || absent+=("${program}")
  done
  ((${#absent[@]})) || return 0
  if ! command -v apt-get >/dev/null; then
    echo "tests/run.sh: no ${absent[*]} and no apt-get: the tests on Slurm will be skipped"
    return 0
  fi
  if ((EUID != 0)); then
    if ! sudo -n true 2>/dev/null; then
      echo "tests/run.sh: no ${absent[*]} and no right to install them: the tests on Slurm will be skipped"
      return 0
    fi
    root=(sudo -n)
  fi
  echo "tests/run.sh: installing slurm-wlm and munge with apt-get"
  local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 timeout 240 apt-get
    -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 -q)
  if ! output=$({ "${apt[@]}" update || true; "${apt[@]}" install -y --no-install-recommends slurm-wlm munge; } 2>&1); then
    printf '%s\n' "tests/run.sh: apt-get failed, the tests on Slurm will be skipped:" "$(tail -n 5 <<<"${output}")"
  fi
}

if [[ ${lint} == true ]]; then
  part format ruff format --check .
  part lint ruff check .
  part types mypy
  part shellcheck check_shell
fi
if [[ ${shell} == true ]]; then
  part bats bats --print-output-on-failure tests/shell
fi

pytest_paths=() pytest_options=()
if [[ ${unit} == true && -d tests/unit ]]; then pytest_paths+=(tests/unit); fi
if [[ ${integration} == true && -d tests/integration ]]; then pytest_paths+=(tests/integration); fi
if [[ ${with_slurm} == true ]]; then
  get_slurm
  pytest_paths+=(tests/slurm)
fi
if [[ ${quick} == true ]]; then pytest_options+=(-m "not slow"); fi
last_line=
if ((${#pytest_paths[@]})); then
  output=$(mktemp)
  trap 'rm -f "${output}"' EXIT
  run_pytest() { python3 -m pytest --durations=10 "${pytest_options[@]}" "$@" "${pytest_paths[@]}" 2>&1 | tee "${output}"; }
  part pytest run_pytest "$@"
  last_line=$(grep -E '^=+ .* in [0-9.]+s.* =+$' "${output}" | tail -n 1) || true
fi

echo
if ((${#failed[@]})); then
  echo "tests/run.sh: FAILED: ${failed[*]}; passed: ${passed[*]-none}"
else
  echo "tests/run.sh: passed: ${passed[*]}"
fi
if [[ -n ${last_line} ]]; then echo "${last_line}"; fi
((${#failed[@]} == 0))
