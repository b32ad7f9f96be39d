#!/usr/bin/env bats
# utils/step.py: a step is done once, and again when something that matters has changed.

load common

setup() {
  cd "${BATS_TEST_TMPDIR}" || return 1
  echo a >in
  echo c >conf.yaml
}

step() {
  run python3 "${REPO}/utils/step.py" --name "some step" --inputs in --optional-inputs maybe --settings conf.yaml \
    --outputs out --stale 'part*' --ignore device shard "$@"
}
work=(-- bash -c 'echo x >>out')

@test "done once, then up to date" {
  step "${work[@]}"
  [[ ${status} == 0 && ${output} == "  run    some step (new) ... "*" s" ]]
  step "${work[@]}"
  [[ ${status} == 0 && ${output} == "  skip   some step (up to date)" && $(wc -l <out) == 1 ]]
}

@test "again when the output is gone" {
  step "${work[@]}"
  rm out
  step "${work[@]}"
  [[ ${output} == *"(missing: out)"* && -f out ]]
}

@test "again when an input changes, and then what was made from it is deleted" {
  step "${work[@]}"
  touch part.1
  echo b >>in
  step "${work[@]}"
  [[ ${output} == *"(changed: in)"* && ! -e part.1 ]]
  touch maybe
  step "${work[@]}"
  [[ ${output} == *"(changed: maybe)"* ]]
  step "${work[@]}"
  [[ ${output} == *skip* ]]
}

@test "again when settings or options change; parts are left to the command" {
  step "${work[@]}"
  touch part.1
  echo d >>conf.yaml
  step "${work[@]}"
  [[ ${output} == *"(changed: conf.yaml)"* && -e part.1 ]]
  step "${work[@]}" --more
  [[ ${output} == *"(other options)"* && -e part.1 ]]
}

@test "runner, log and ignored options do not matter" {
  step -- env A=1 -- bash -c 'echo x >>out' --device cpu --shard JOB/2
  step -- env -- bash -c 'echo x >>out' --device cuda --shard=JOB/4
  [[ ${output} == *skip* ]]
  step -- env -- bash -c 'echo x >>out' --shard JOB/4 --other 3
  [[ ${output} == *"other options"* ]]
}

@test "--force does it again from the beginning" {
  step "${work[@]}"
  touch part.1
  step --force "${work[@]}"
  [[ ${output} == *"(forced)"* && ! -e part.1 ]]
}

@test "a failing command: its exit code, no skipping, nothing deleted, then it goes on" {
  step -- bash -c 'echo x >part.1; exit 3'
  [[ ${status} == 3 && ${output} == *"failed"* && -e part.1 ]]
  step -- bash -c 'echo x >part.1; exit 3'
  [[ ${status} == 3 && ${output} == *"going on"* ]]
  step -- bash -c 'test -e part.1 && echo x >out'
  [[ ${status} == 0 ]]
}

@test "a step that failed with other options is not up to date with the old ones" {
  step "${work[@]}"
  step -- bash -c 'echo broken >out; exit 1'
  step "${work[@]}"
  [[ ${status} == 0 && ${output} == *" run "* ]]
}

@test "several commands stop at the first that fails" {
  step -- bash -c 'echo 1 >out' --then bash -c 'exit 4' --then bash -c 'echo 3 >out'
  [[ ${status} == 4 && $(cat out) == 1 ]]
  step -- true -- bash -c 'exit 5' --then env B=2 -- bash -c 'echo $B >out'
  [[ ${status} == 0 && $(cat out) == 2 ]]
}

@test "a command that does not make its output has failed" {
  step -- true
  [[ ${status} == 1 && ${output} == *"out is missing"* ]]
}

@test "a missing input is named" {
  rm in
  step "${work[@]}"
  [[ ${status} == 1 && ${output} == *"needs in, which is not there"* && ! -e out ]]
}

@test "folders and patterns count as inputs" {
  mkdir folder
  echo 1 >folder/a
  s() { run python3 "${REPO}/utils/step.py" --name s --inputs folder '*.scp' --outputs out -- touch out; }
  echo 1 >a.scp
  s
  s
  [[ ${output} == *skip* ]]
  echo 1 >folder/b
  s
  [[ ${output} == *"changed: folder/b"* ]]
  echo 1 >b.scp
  s
  [[ ${output} == *"changed: b.scp"* ]]
}

@test "two recipes at the same step do it once" {
  command='touch begun; until [ -e go ]; do sleep 0.1; done; echo x >>out'
  python3 "${REPO}/utils/step.py" --name s --outputs out -- bash -c "${command}" >first &
  wait_until test -e begun
  python3 "${REPO}/utils/step.py" --name s --outputs out -- bash -c "${command}" >second &
  wait_until grep -q wait second
  touch go
  wait
  grep -q run first
  grep -q skip second
  [[ $(wc -l <out) == 1 ]]
}

@test "steps of the same kind are done together, and only those that have to be" {
  printf 'import os, sys\nopen(sys.argv[1], "a").write(str(os.getpid()) + "\\n")\nsys.exit(len(sys.argv) > 2)\n' >append.py
  both() {
    run python3 "${REPO}/utils/step.py" --name one --inputs in --outputs o1 -- env A=1 -- python3 -m append o1 \
      --next --name two --settings conf.yaml --outputs o2 -- env A=2 -- python3 -m append o2 "$@"
  }
  both
  [[ ${status} == 0 && ${output} == "  run    one, two (new) ... "* && $(cat o1) == "$(cat o2)" ]]
  both
  [[ ${output} == "  skip   one, two (up to date)" ]]
  rm o2
  both
  [[ ${output} == *"skip   one (up"* && ${output} == *"run    two (missing: o2)"* && $(wc -l <o1) == 1 ]]
  rm o1
  both fail
  [[ ${status} == 1 && ${output} == *"failed"* ]]
  both
  [[ ${status} == 0 && ${output} == *"run    one, two (going on)"* ]]
}

@test "stopping a step stops its command" {
  make_nap
  python3 "${REPO}/utils/step.py" --name s --outputs out -- bash -c 'touch begun; exec "${NAP}" 3600' >log &
  pid=$!
  wait_until test -e begun
  kill -TERM "${pid}"
  code=0
  wait "${pid}" || code=$?
  ((code == 143))
  wait_until no_nap_left
}
