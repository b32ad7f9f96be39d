#!/usr/bin/env bash
# Usage: tests/versions.sh [options]
#
# The bounds of setup.py are promises. This tries them: the unit tests, and a prediction from end to end (a small recipe is
# made, trained, packed and moved, then sdumc.bin.predict scores a clip), with the oldest and with the newest versions allowed.
# tests/run.sh runs everything with the pinned ones.
#
# It is short because each environment is tools/venv with what differs put on top, because whole recipes and tests marked
# slow are left out, and because nothing is run twice: where the newest versions are the pinned ones, tests/run.sh has it all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Options
versions="oldest newest" #: which, with spaces
. utils/parse_options.sh

for name in "$@" ${versions}; do
  [[ ${name} == oldest || ${name} == newest ]] || { echo "versions.sh: error: '${name}' is not oldest or newest" >&2 && exit 2; }
done
unset VIRTUAL_ENV CONDA_PREFIX # these environments are the repository's own
tools/setup_env.sh --extras all

try() {
  local venv=${PWD}/tools/venv-$1
  tools/setup_env.sh --extras all --versions "$1" || return 1
  if [[ $1 == newest && -z $("${venv}/bin/python3" tools/check_install.py --differences) ]]; then
    echo "versions.sh: the newest versions are the pinned ones, with which tests/run.sh runs everything"
    return 0
  fi
  # What old packages say of their own future is no error.
  local options=()
  if [[ $1 == oldest ]]; then
    options=(-o filterwarnings= --deselect tests/unit/test_no_warnings.py::test_what_is_deprecated_is_an_error_in_tests)
  fi
  VIRTUAL_ENV=${venv} PATH=${venv}/bin:${PATH} python3 -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder \
    -m "not slow and not browser" "${options[@]}" \
    tests/integration/test_predict.py::test_{scores_are_those_of_decoding,a_packed_archive_works_elsewhere} tests/unit
}

failed=()
for name in ${versions}; do
  start=${SECONDS}
  echo "---- ${name} versions"
  try "${name}" || failed+=("${name}")
  echo "versions.sh: ${name}: $((SECONDS - start)) s"
done
if ((${#failed[@]})); then
  echo "versions.sh: FAILED: ${failed[*]}"
  exit 1
fi
