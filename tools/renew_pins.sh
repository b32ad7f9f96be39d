#!/usr/bin/env bash
# Usage: tools/renew_pins.sh [options]
#
# Writes tools/pins.txt anew: exact versions of all that setup.py and its extras need, for Python 3.10 to 3.13, with and
# without CUDA. They are the newest in setup.py's ranges. uv, fetched into a temporary folder, finds them for all
# Pythons at once, which pip cannot. Run tests/run.sh and tests/versions.sh after it, and commit the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Options
keep=false #: keep the versions that the file has and setup.py allows; only add what is missing
. utils/parse_options.sh

(($# == 0)) || { echo "renew_pins.sh: error: unexpected argument '$1'" >&2; exit 2; }
python=tools/venv/bin/python3
[[ -x ${python} ]] || python=python3
scratch=$(mktemp -d)
trap 'rm -rf "${scratch}"' EXIT
"${python}" -m pip install --quiet --disable-pip-version-check --target "${scratch}/uv" uv

if [[ ${keep} == true ]]; then cp tools/pins.txt "${scratch}/pins.txt"; fi
# setuptools builds sdumc. The Pythons and systems to resolve for are in pyproject.toml.
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml >"${scratch}/build.in"
"${scratch}/uv/bin/uv" pip compile setup.py "${scratch}/build.in" --all-extras --universal --python-version 3.10 \
  --no-header --no-annotate --quiet --output-file "${scratch}/pins.txt" >/dev/null
{
  echo "# Exact versions for Python 3.10 to 3.13, as constraints of pip. Made by tools/renew_pins.sh; do not edit."
  # What holds for every line is left out, and so are processors: a constraint asks for nothing by itself.
  sed -E "/^#/d; s/ and sys_platform == 'linux'//g; s/ and \(?\(platform_machine.*//; s/ and (platform_python_)?\
implementation(_name)? != 'PyPy'//; s/ and python_full_version < '3.14'//; s/ ; python_full_version < '3.14'$//" \
    "${scratch}/pins.txt"
} >tools/pins.txt.tmp
mv tools/pins.txt.tmp tools/pins.txt
echo "renew_pins.sh: $(grep -c == tools/pins.txt) lines in tools/pins.txt"
