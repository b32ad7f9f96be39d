# shellcheck shell=bash
# Where things are and which Python is used; sourced by run.sh, sdumc.sh and local/*.sh from the recipe's folder.

SDUMC_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export SDUMC_ROOT

# An active environment that has torch is used as it is; otherwise tools/venv, if tools/setup_env.sh has made it.
if ! { [[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] &&
  python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; }; then
  if [[ -f ${SDUMC_ROOT}/tools/venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    . "${SDUMC_ROOT}/tools/venv/bin/activate"
  elif ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
    echo "path.sh: error: there is no environment to work in; make one with ${SDUMC_ROOT}/tools/setup_env.sh" >&2
    exit 1
  fi
fi

export LC_ALL=C # tables are sorted bytewise
export PYTHONPATH=${SDUMC_ROOT}${PYTHONPATH:+:${PYTHONPATH}}
export PYTHONUNBUFFERED=1 # logs are complete when something is killed
export TOKENIZERS_PARALLELISM=false
# Models are folders on disk; a misspelt folder must not become a download. Set to 0 to allow names from the hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
