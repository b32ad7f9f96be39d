# shellcheck shell=bash disable=SC2034
# How jobs are run; sourced by sdumc.sh. `./run.sh --cmd-backend slurm` overrides the next line for one run.
: "${cmd_backend:=local}"

# Three kinds of job: train_cmd works on files (corpus, tables, scores), decode_cmd runs models over a set (features,
# simulated text, predictions), cuda_cmd trains. sdumc.sh adds --gpu, --num-nodes and the number of jobs, and
# conf/slurm.conf says what the options mean to sbatch; the local runner takes and ignores what it has no use for.
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
