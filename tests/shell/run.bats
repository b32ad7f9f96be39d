#!/usr/bin/env bats
# utils/run.py: the local job runner.

load common
bats_require_minimum_version 1.5.0

run_py() { python3 "${REPO}/utils/run.py" "$@"; }

@test "arguments reach the command unharmed" {
  printf 'import sys\nprint(sys.argv[1:])\n' >args.py
  run_py JOB=1:2 log/x.JOB.log python3 args.py 'a  b' '$(id)' "it's" '"q"' '*' '' '`id`' 'JOB/2' '\'
  grep -Fx "['a  b', '\$(id)', \"it's\", '\"q\"', '*', '', '\`id\`', '2/2', '\\\\']" log/x.2.log
}

@test "a log has a header and a last line" {
  run_py log/x.log bash -c 'echo out; echo err >&2; printf unfinished'
  [[ $(sed -n 1p log/x.log) == "# command: bash -c 'echo out; echo err >&2; printf unfinished'" ]]
  [[ $(sed -n 2p log/x.log) == "# host:    "* && $(sed -n 3p log/x.log) == "# start:   "* ]]
  grep -qx out log/x.log && grep -qx err log/x.log && grep -qx unfinished log/x.log
  [[ $(tail -n 1 log/x.log) =~ ^"# ended:   ".*", exit code 0, "[0-9.]+" s, peak memory "[0-9]+" MB"$ ]]
}

@test "the first failure stops the others, names its log and shows its last lines" {
  # Job 3 fails when all others are at work.
  run run_py --max-jobs-run 4 JOB=1:4 log/x.JOB.log bash -c 'touch begun.JOB
    if [ JOB = 3 ]; then
      while [ "$(ls begun.* | wc -l)" != 4 ]; do sleep 0.1; done
      echo "bad input"
      exit 7
    fi
    sleep 3600'
  [[ ${status} == 7 && ${output} == *"job 3 of 1:4 failed, exit code 7"* ]]
  [[ ${output} == *"log: log/x.3.log"* && ${output} == *"bad input"* ]]
  [[ $(tail -n 1 log/x.1.log) == *"(stopped)" ]]
}

@test "a command that cannot be started, and one killed by a signal" {
  run -127 run_py log/x.log no-such-command
  [[ ${status} == 127 && ${output} == *"cannot start no-such-command"* ]]
  run run_py log/x.log bash -c 'kill -9 $$'
  [[ ${status} == 137 && ${output} == *"killed"* ]]
}

@test "stopping the runner stops the jobs and what they started" {
  make_nap
  python3 "${REPO}/utils/run.py" --max-jobs-run 2 JOB=1:2 log/x.JOB.log \
    bash -c '"${NAP}" 3600 & touch begun.JOB; "${NAP}" 3600' &
  pid=$!
  wait_until test -e begun.1 -a -e begun.2
  kill -TERM "${pid}"
  code=0
  wait "${pid}" || code=$?
  ((code == 143))
  wait_until no_nap_left
}

@test "killing the runner leaves no job behind" {
  make_nap
  python3 "${REPO}/utils/run.py" log/x.log bash -c 'touch begun; exec "${NAP}" 3600' &
  pid=$!
  wait_until test -e begun
  kill -KILL "${pid}"
  wait_until no_nap_left
}

@test "limits on jobs at once and threads" {
  run_py --max-jobs-run 1 JOB=1:3 log/x.JOB.log bash -c 'mkdir busy && sleep 0.2 && rmdir busy'
  run_py --num-threads 3 log/t.log bash -c 'echo threads $OMP_NUM_THREADS'
  grep -qx "threads 3" log/t.log
}

@test "GPUs are dealt out in turn" {
  export CUDA_VISIBLE_DEVICES=4,5
  run_py --gpu 1 JOB=1:2 log/x.JOB.log bash -c 'touch begun.JOB
    until [ -e begun.1 -a -e begun.2 ]; do sleep 0.1; done
    echo gpu $CUDA_VISIBLE_DEVICES'
  grep -qx "gpu 4" log/x.1.log && grep -qx "gpu 5" log/x.2.log
  run run_py --gpu 3 log/x.log true
  [[ ${status} == 2 && ${output} == *"has 2 GPU(s)"* ]]
}

@test "wrong command lines" {
  for words in "--mem" "--memory 4G x.log true" "JOB=3:1 x.JOB.log true" "JOB=1:2 x.log true" "x.log" "--gpu two x.log true"; do
    # shellcheck disable=SC2086
    run run_py ${words}
    [[ ${status} == 2 && ${output} == *"run.py: error: "* ]]
  done
}

@test "options that a recipe's slurm.conf adds are accepted here too" {
  run run_py --exclusive yes log/x.log true
  [[ ${status} == 2 ]]
  mkdir conf
  printf 'command sbatch\noption exclusive=* --exclusive\n' >conf/slurm.conf
  run_py --exclusive yes log/x.log true
}
