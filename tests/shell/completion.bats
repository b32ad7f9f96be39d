#!/usr/bin/env bats
# Completion of the command `sdumc` in bash, as docs/installation.md sets it up.

load common

# complete_line LINE: what bash would offer after it.
complete_line() {
  COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
  read -ra COMP_WORDS <<<"$1"
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  COMPREPLY=()
  _python_argcomplete sdumc "${COMP_WORDS[COMP_CWORD]}"
  echo "${COMPREPLY[*]}"
}

@test "commands, options, values and files are completed" {
  python3 -c 'import argcomplete' 2>/dev/null || skip "argcomplete is not installed"
  export PYTHONPATH=${REPO}
  mkdir bin
  printf '#!/bin/sh\nexec python3 -m sdumc "$@"\n' >bin/sdumc
  chmod +x bin/sdumc
  PATH=${PWD}/bin:${PATH}
  eval "$(python3 -c 'import argcomplete; print(argcomplete.shellcode(["sdumc"]))')"
  complete -p sdumc
  [[ $(complete_line "sdumc scor") == "score " ]]
  [[ $(complete_line "sdumc score --rou") == "--rounding " ]]
  [[ $(complete_line "sdumc score --rounding a") == "away " ]]
  touch predictions.tsv
  [[ $(complete_line "sdumc score --predictions pred") == "predictions.tsv "* ]]
}
