# shellcheck shell=bash
# Sets the search path of Python and activates an environment; sourced by sdumc.sh and local/*.sh in the recipe's folder.

SDUMC_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export SDUMC_ROOT

# If an active environment has torch, it is used; otherwise tools/venv, which tools/setup_env.sh makes.
if ! { [[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] &&
  python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; }; then
  if [[ -f ${SDUMC_ROOT}/tools/venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    . "${SDUMC_ROOT}/tools/venv/bin/activate"
  elif ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
    echo "path.sh: error: there is no Python environment with torch; make one with ${SDUMC_ROOT}/tools/setup_env.sh" >&2
    exit 1
  fi
fi

export LC_ALL=C # tables are sorted bytewise
export PYTHONPATH=${SDUMC_ROOT}${PYTHONPATH:+:${PYTHONPATH}}
export PYTHONUNBUFFERED=1 # logs are complete when a process is killed
export TOKENIZERS_PARALLELISM=false
# Models are folders on disk. A misspelt folder must not start a download. Set to 0 to allow names from the hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
