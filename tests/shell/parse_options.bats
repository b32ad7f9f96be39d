#!/usr/bin/env bats
# utils/parse_options.sh: values arrive as they are, and every mistake is an error.

load common

setup() {
  cd "${BATS_TEST_TMPDIR}" || return 1
  cat >script.sh <<EOF
#!/usr/bin/env bash
# Usage: script.sh [options] words
set -euo pipefail
#: Stages
stage=0         #: first stage to run
force=false     #: redo
#: Data
train_set=train #: name of the set
hidden=1
. "${REPO}/utils/parse_options.sh"
printf '<%s>' "\${stage}" "\${force}" "\${train_set}" "\${hidden}" "\$@"
EOF
}

s() { bash script.sh "$@"; }

@test "defaults stay without options" {
  run s
  [[ ${status} == 0 && ${output} == "<0><false><train><1>" ]]
}

@test "dashes and underscores, with and without =, words after the options" {
  run s --stage 3 --train_set=a --train-set b -- --x y
  [[ ${output} == "<3><false><b><1><--x><y>" ]]
  run s --train-set=a=b=c word
  [[ ${output} == "<0><false><a=b=c><1><word>" ]]
}

@test "flags: bare, true, false; other values are refused" {
  run s --force
  [[ ${output} == "<0><true><train><1>" ]]
  run s --force true --stage 1
  [[ ${output} == "<1><true><train><1>" ]]
  run s --force --force=false word
  [[ ${output} == "<0><false><train><1><word>" ]]
  run s --force=maybe
  [[ ${status} == 2 && ${output} == *"true or false, not 'maybe'"* ]]
}

@test "values are never executed and never changed" {
  for value in '$(touch pwned)' '`touch pwned`' "it's" 'say "x"' 'a  b' '*' '' '\n' '; touch pwned' '${HOME}' '-1' 'a[$(touch pwned)]'; do
    run s --train-set "${value}"
    [[ ${status} == 0 && ${output} == "<0><false><${value}><1>" ]]
    run s --train-set="${value}"
    [[ ${status} == 0 && ${output} == "<0><false><${value}><1>" ]]
  done
  [[ ! -e pwned ]]
}

@test "names are never executed" {
  for name in '--a[$(touch pwned)]' '--$(touch pwned)' '--stage[0]' '--stage;x=1' '--PATH' '--IFS' '--hidden' '--BASH_ENV' '---stage' '-stage' '-s'; do
    run s "${name}" 1
    [[ ${status} == 2 && ${output} == *"unknown option"* ]]
    run s "${name}=1"
    [[ ${status} == 2 && ${output} == *"unknown option"* ]]
  done
  [[ ! -e pwned ]]
}

@test "an option without its value is an error, at the end and before another option" {
  run timeout 300 bash script.sh --stage
  [[ ${status} == 2 && ${output} == *"'--stage' needs a value"* ]]
  run timeout 300 bash script.sh --train-set --stage 3
  [[ ${status} == 2 && ${output} == *"'--train-set' needs a value, but '--stage' follows"* ]]
  run s --train-set=--stage
  [[ ${status} == 0 && ${output} == "<0><false><--stage><1>" ]]
}

@test "a misspelt option is refused with the right one named" {
  run s --stge 3
  [[ ${status} == 2 && ${output} == *"unknown option '--stge'; did you mean --stage?"* ]]
  run s --train x
  [[ ${status} == 2 && ${output} == *"did you mean --train-set?"* ]]
  run s --wholly-different x
  [[ ${status} == 2 && ${output} != *"did you mean"* ]]
}

@test "--help lists groups, options and what their defaults are at that point" {
  run s --train-set other --help
  [[ ${status} == 0 ]]
  [[ ${output} == *"Usage: script.sh"* && ${output} == *"Stages:"* && ${output} == *"Data:"* ]]
  [[ ${output} == *"--train-set "*"name of the set (default: other)"* ]]
  [[ ${output} != *hidden* ]]
}

@test "nothing of the parser is left in the script's variables" {
  echo 'compgen -v | grep "^_po_" || compgen -A function | grep "^_po_" || echo clean' >>script.sh
  run s --stage 1
  [[ ${output} == *clean ]]
}

@test "the script may have gone to another folder before, and be called from anywhere" {
  mkdir -p a/b
  { echo 'cd "$(dirname "${BASH_SOURCE[0]}")/.."' && cat script.sh; } >a/b/moved.sh
  for from in . a a/b /; do
    run bash -c 'cd "$1" && bash "$2" --stage 4' - "${from}" "$(realpath --relative-to="${from}" a/b/moved.sh)"
    [[ ${status} == 0 && ${output} == "<4><false><train><1>" ]]
  done
  run bash -c 'cd / && bash "$1" --help' - "${PWD}/a/b/moved.sh"
  [[ ${status} == 0 && ${output} == *"--train-set"* ]]
}

# outer.sh takes options of its own and passes the others to script.sh.
make_outer() {
  cat >outer.sh <<EOF
#!/usr/bin/env bash
# Usage: outer.sh [options]
set -euo pipefail
#: Corpus
corpus=none   #: where it is
check=false   #: look at it first
stage=corpus  #: the same name as one of the other script: this one wins
pass_options_to=./script.sh
. "${REPO}/utils/parse_options.sh"
printf '(%s)' "\${corpus}" "\${check}" "\${stage}"
./script.sh "\$@"
EOF
  chmod +x script.sh outer.sh
}

@test "options of another script are passed to it, with their values as they are" {
  make_outer
  run ./outer.sh --force --corpus a --train_set 'x  y' --check --train-set='$(touch pwned)*' --stage 2 -- word --more
  [[ ${status} == 0 && ${output} == '(a)(true)(2)<0><true><$(touch pwned)*><1><word><--more>' && ! -e pwned ]]
  run ./outer.sh
  [[ ${output} == "(none)(false)(corpus)<0><false><train><1>" ]]
}

@test "options that neither of two scripts has, or without a value, are refused before either runs" {
  make_outer
  for words in "--nothing-like-it 1" "--corpus a --hidden 1" "--train-set" "--train-set --check" "--force=maybe"; do
    # shellcheck disable=SC2086
    run ./outer.sh ${words}
    [[ ${status} == 2 && ${output} == "outer.sh: error: "* && ${output} != *"("*")("* ]]
  done
  run ./outer.sh --corpse a
  [[ ${status} == 2 && ${output} == *"did you mean --corpus?"* ]]
  run ./outer.sh --trainset a
  [[ ${status} == 2 && ${output} == *"did you mean --train-set?"* ]]
}

@test "--help shows the options of both scripts" {
  make_outer
  run ./outer.sh --corpus b --help
  [[ ${status} == 0 && ${output} == "Usage: outer.sh"*"Corpus:"*"--corpus "*"(default: b)"*"Data:"*"--train-set "* ]]
}
