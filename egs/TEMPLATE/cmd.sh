# shellcheck shell=bash disable=SC2034
# How jobs are run; sourced by sdumc.sh. `./run.sh --cmd-backend slurm` overrides the next line for one run.
: "${cmd_backend:=local}"

# There are three kinds of job: train_cmd works on files (corpus, tables, scores), decode_cmd runs models over a set
# (features, simulated text, predictions), cuda_cmd trains. sdumc.sh adds --gpu, --num-nodes and the number of jobs.
# conf/slurm.conf translates the options to sbatch options; the local runner ignores those that it does not need.
case ${cmd_backend} in
  local)
    train_cmd="utils/run.py"
    decode_cmd="utils/run.py"
    cuda_cmd="utils/run.py"
    ;;
  slurm)
    train_cmd="utils/slurm.py --mem 8G"
    decode_cmd="utils/slurm.py --mem 32G --num-threads 4"
    cuda_cmd="utils/slurm.py --mem 64G --num-threads 4 --time 24:00:00 --requeue true"
    ;;
  *)
    echo "cmd.sh: error: cmd_backend is local or slurm, not '${cmd_backend}'" >&2
    exit 2
    ;;
esac
