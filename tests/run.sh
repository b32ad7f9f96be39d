#!/usr/bin/env bash
# Usage: tests/run.sh [options] [-- pytest arguments]
#
# Installs what the tests need (without root) and runs them: pytest, and beside it format, lint and types, shellcheck and
# bats. Pytest's last line is the last line here. All parts run, also when one fails; the exit code is 1 when any has
# failed, or when a test was skipped for a reason that is not in tests/allowed_skips.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Parts (all of them when none is chosen)
lint=false        #: format, lint and types of Python, shellcheck
shell=false       #: tests of the shell scripts (bats)
unit=false        #: unit tests (pytest)
integration=false #: whole recipes at reduced size, minutes; also on a real Slurm where one is installed (pytest)
#: Other
with_slurm=false   #: have apt install Slurm, if it can and there is none
with_browser=false #: have apt install chromium, if it can and there is none, for the tests of the report's page
quick=false        #: lint, shell and unit, without the tests that are marked slow
. utils/parse_options.sh

if [[ ${quick} == true ]]; then
  lint=true shell=true unit=true
elif [[ ${lint}${shell}${unit}${integration} != *true* ]]; then
  lint=true shell=true unit=true integration=true
fi

work=$(mktemp -d)
side=0 # process group of what runs beside
clean_up() {
  ((side == 0)) || kill -- "-${side}" 2>/dev/null || true
  rm -rf "${work}"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ------------------------------------------------------------------------------------------- what the machine may lack

has_slurm() {
  local program
  for program in slurmctld slurmd munged sbatch; do
    PATH=${PATH}:/usr/sbin:/sbin command -v "${program}" >/dev/null || return 1
  done
}
has_browser() { python3 tests/helpers/browser.py >/dev/null; }

# Packages of Debian; says in a few words why not. Daemons that come with them are not started by the system: the tests
# start their own.
get() { # PACKAGE...
  local root=() output
  command -v apt-get >/dev/null || { echo "there is no apt-get to install $*" && return; }
  if ((EUID != 0)); then
    sudo -n true 2>/dev/null || { echo "as root: apt-get install $*" && return; }
    root=(sudo -n)
  fi
  local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 timeout 900 apt-get -q -o Acquire::Retries=3
    -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=300)
  if ! output=$({ "${apt[@]}" update || true; "${apt[@]}" install -y --no-install-recommends "$@"; } 2>&1); then
    printf '%s\n' "tests/run.sh: apt-get install $* failed:" "$(tail -n 5 <<<"${output}")" >&2
    echo "apt-get install $* failed"
  fi
}

# Sets ${left_out}: what cannot be run, and how to get it.
left_out=() expression=()
find_out() {
  local why
  if has_slurm; then
    [[ ${integration} == true ]] && pytest_paths=(tests/slurm "${pytest_paths[@]}")
  elif [[ ${integration} == true ]]; then
    why="tests/run.sh --with-slurm"
    [[ ${with_slurm} == true ]] && why=$(cat "${work}/slurm")
    left_out+=("Slurm (${why})")
  fi
  if [[ ${unit} == true ]] && ! has_browser; then
    why="tests/run.sh --with-browser"
    [[ ${with_browser} == true ]] && why=$(cat "${work}/browser")
    left_out+=("the page in a browser (${why})")
    expression+=("not browser")
  fi
  return 0
}

# --------------------------------------------------------------------------------------------------------------- parts

part() { # NAME COMMAND...
  local name=$1 start=${SECONDS} code=0
  shift
  echo "---- ${name}"
  "$@" || code=$?
  echo "${code} ${name} ($((SECONDS - start)) s)" >>"${work}/ended"
}

shell_files() { git ls-files -z --cached --others --exclude-standard '*.sh' '*.bats' '*.bash' .ci/run 2>/dev/null; }
check_shell() {
  local files
  mapfile -d '' files < <(shell_files)
  # A source archive has no git.
  ((${#files[@]})) || mapfile -d '' files < \
    <(find .ci egs utils tests tools -name 'venv*' -prune -o \( -name '*.sh' -o -name '*.bats' -o -name '*.bash' \) -print0)
  local file kept=()
  for file in "${files[@]}"; do
    if [[ -f ${file} && ! -L ${file} && ${file} != */utils/*/* ]]; then kept+=("${file}"); fi
  done
  for file in "${kept[@]}"; do
    [[ ${file} == *.bats ]] || bash -n "${file}" || return 1
  done
  shellcheck -x -P SCRIPTDIR:SCRIPTDIR/.. "${kept[@]}"
}

run_bats() { bats --timing --print-output-on-failure tests/shell; }

beside() {
  if [[ ${lint} == true ]]; then
    part format ruff format --check .
    part lint ruff check .
    part types mypy
    part shellcheck check_shell
  fi
  if [[ ${shell} == true ]]; then part bats run_bats; fi
}

run_pytest() {
  # One more than there are cores, as some tests only wait. The files in this order: those that take longest come first.
  local workers=$(($(nproc) + 1)) joined
  printf -v joined ' and %s' "${expression[@]}"
  python3 -m pytest --durations=10 --strict-skips -n $((workers < 9 ? workers : 8)) --dist loadfile --no-loadscope-reorder \
    -m "${joined# and }" "$@" "${pytest_paths[@]}" 2>&1 | tee "${work}/pytest"
}

# ------------------------------------------------------------------------------------------------------------- the run

set -m # each with a process group of its own, to be ended with all its processes
if [[ ${with_slurm} == true || ${with_browser} == true ]]; then
  {
    if [[ ${with_slurm} == true ]] && ! has_slurm; then get slurm-wlm munge >"${work}/slurm"; fi
    if [[ ${with_browser} == true ]] && ! has_browser; then get chromium >"${work}/browser"; fi
  } </dev/null &
  side=$!
fi
set +m
tools/setup_env.sh --extras all
. egs/TEMPLATE/path.sh
((side == 0)) || { wait "${side}" && side=0; }

pytest_paths=()
if [[ ${integration} == true ]]; then pytest_paths+=(tests/integration); fi
if [[ ${unit} == true ]]; then pytest_paths+=(tests/unit); fi
if [[ ${quick} == true ]]; then expression+=("not slow"); fi
find_out
if ((${#pytest_paths[@]})); then
  set -m
  beside </dev/null >"${work}/beside" 2>&1 &
  side=$!
  set +m
  part pytest run_pytest "$@"
  wait "${side}" || true
  side=0
  cat "${work}/beside"
else
  beside
fi

echo
failed=$(sed -n 's/^[1-9][0-9]* //p' "${work}/ended" | paste -sd, | sed 's/,/, /g')
passed=$(sed -n 's/^0 //p' "${work}/ended" | paste -sd, | sed 's/,/, /g')
if ((${#left_out[@]})); then
  printf -v line '%s, ' "${left_out[@]}"
  echo "tests/run.sh: left out: ${line%, }"
fi
if [[ -n ${failed} ]]; then
  echo "tests/run.sh: FAILED: ${failed}; passed: ${passed:-none}"
else
  echo "tests/run.sh: passed: ${passed}"
fi
if [[ -f ${work}/pytest ]]; then grep -E '^=+ .* in [0-9.]+s.* =+$' "${work}/pytest" | tail -n 1 || true; fi
[[ -z ${failed} ]]
