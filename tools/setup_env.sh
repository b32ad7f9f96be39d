#!/usr/bin/env bash
# Usage: tools/setup_env.sh [options]
#
# Makes the Python environment of this repository, or completes it: tools/venv, or the virtual or conda environment that
# is active. Can be called again at any time, also after it was interrupted; when nothing is missing it returns at once.
#
# The versions are those of tools/pins.txt. --versions oldest and newest, for tests, make tools/venv-oldest and
# tools/venv-newest. In an active environment what is installed and in setup.py's ranges stays, and a line tells of it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

#: Options
extras=mini    #: what to install beyond the core, with commas: mini (egs/mini), mosei (egs/mosei), demo, test, or all
versions=pinned #: pinned (tools/pins.txt), or the oldest or newest that setup.py allows
python=        #: the Python to make tools/venv with, 3.10 to 3.13; found by itself otherwise
torch=auto     #: build of torch: cpu, cuda, or auto (cuda where an NVIDIA driver is found, cpu elsewhere)
if_needed=false #: accept a complete tools/venv although another environment is active
. "${root}/utils/parse_options.sh"

die() {
  printf 'setup_env.sh: error: %s\n' "$*" >&2
  exit 1
}

(($# == 0)) || die "unexpected argument '$1'; --help shows the options"
[[ ${torch} == auto || ${torch} == cpu || ${torch} == cuda ]] || die "--torch is auto, cpu or cuda, not '${torch}'"
[[ ${versions} == pinned || ${versions} == oldest || ${versions} == newest ]] ||
  die "--versions is pinned, oldest or newest, not '${versions}'"
for extra in ${extras//,/ }; do
  [[ " mini mosei demo test all " == *" ${extra} "* ]] ||
    die "--extras: there is no '${extra}', only mini, mosei, demo, test and all"
done

# The stamp in an environment says for which clone, versions and Python it is complete, and with which extras.
stamp=.sdumc-env
fingerprint="$(cat "${root}/setup.py" "${root}/tools/pins.txt" | cksum) ${versions} ${root}"

python_version() { "$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null; }
complete() {
  local prefix=$1 made_for has extra
  [[ ${versions} != newest ]] || return 1 # that is another every day
  [[ -f ${prefix}/${stamp} && ! -f ${prefix}/.sdumc-installing && -x ${prefix}/bin/python3 ]] || return 1
  { IFS= read -r made_for && IFS= read -r has; } <"${prefix}/${stamp}" || return 1
  [[ ${made_for} == "${fingerprint} $(python_version "${prefix}/bin/python3")" ]] || return 1
  for extra in ${extras//,/ }; do
    [[ ",${has}," == *",${extra},"* || ",${has}," == *,all,* ]] || return 1
  done
}

check() { "${prefix}/bin/python3" "${root}/tools/check_install.py" "$@"; }
report_complete() {
  echo "setup_env.sh: ${prefix} is complete${1-}"
  local others
  if [[ ${versions} == pinned ]] && others=$(check --differences) && [[ -n ${others} ]]; then
    echo "setup_env.sh: note: other versions than those of tools/pins.txt: ${others}"
  fi
}

pinned_venv=${root}/tools/venv
venv=${pinned_venv}
[[ ${versions} == pinned ]] || venv+=-${versions}
if [[ -n ${VIRTUAL_ENV-} && -d ${VIRTUAL_ENV-} ]]; then
  prefix=${VIRTUAL_ENV}
elif [[ -n ${CONDA_PREFIX-} && -d ${CONDA_PREFIX-} && ${CONDA_DEFAULT_ENV-} != base ]]; then
  prefix=${CONDA_PREFIX}
else
  prefix=${venv}
fi
if [[ ${if_needed} == true ]] && complete "${venv}"; then exit 0; fi
# With --torch given the packages themselves are looked at: someone may have taken torch out to get the other build.
if [[ ${torch} == auto ]] && complete "${prefix}"; then
  [[ ${if_needed} == true ]] || report_complete
  exit 0
fi

# One at a time: a second call waits for the first and then finds everything done.
if command -v flock >/dev/null; then
  exec 9<"${root}/tools"
  if ! flock --nonblock 9; then
    echo "setup_env.sh: another set-up is running, waiting for it"
    flock 9
  fi
  if [[ ${torch} == auto ]] && complete "${prefix}"; then
    report_complete
    exit 0
  fi
fi

right_version() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n ${python} ]]; then
    command -v "${python}" >/dev/null || die "--python ${python}: no such program"
    right_version "${python}" || die "--python ${python} is $("${python}" --version 2>&1); 3.10 to 3.13 are supported"
    command -v "${python}"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if command -v "${candidate}" >/dev/null && right_version "${candidate}"; then
      command -v "${candidate}"
      return
    fi
  done
  die "no Python from 3.10 to 3.13 found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or make a \
conda environment (conda create -n sdumc python=3.11), activate it and call this script again"
}

# Debian keeps the part of venv that installs pip in a package of its own. Without it pip can come from the pip of the
# system, or as a single file from pip's own site.
venv_without_ensurepip() {
  local base=$1
  "${base}" -m venv --without-pip "${venv}" || die "${base} cannot make a virtual environment; see the message above"
  "${base}" -m pip --python "${venv}/bin/python3" install --quiet pip 2>/dev/null && return
  "${base}" - "${venv}/pip.pyz" <<'EOF' && "${venv}/bin/python3" "${venv}/pip.pyz" install --quiet pip && return
import sys, urllib.request
try:
    urllib.request.urlretrieve("https://bootstrap.pypa.io/pip/pip.pyz", sys.argv[1])
except OSError:
    sys.exit(1)
EOF
  rm -rf "${venv}"
  die "${base} has no ensurepip, and pip could not be had otherwise. Debian, Ubuntu: apt-get install python3-venv; \
without root: make a conda environment, activate it and call this script again"
}

# Oldest and newest begin with the files of tools/venv, linked rather than copied where that is possible: pip replaces
# files and never changes them. So only what differs is fetched and unpacked.
copy_of_pinned() {
  [[ -z ${python} && ${venv} != "${pinned_venv}" && ! -f ${pinned_venv}/.sdumc-installing ]] || return 1
  "${pinned_venv}/bin/python3" -m pip --version >/dev/null 2>&1 || return 1
  rm -rf "${venv}" "${venv}.partial"
  mkdir "${venv}.partial"
  cp -al "${pinned_venv}/." "${venv}.partial" 2>/dev/null || cp -a "${pinned_venv}/." "${venv}.partial" || return 1
  rm -f "${venv}.partial"/{"${stamp}",sdumc-install.log,sdumc-constraints.txt}
  grep -rlIF --null "${pinned_venv}" "${venv}.partial"/{bin,pyvenv.cfg} | xargs -0 sed -i "s|${pinned_venv}|${venv}|g"
  mv "${venv}.partial" "${venv}"
}

if [[ ${prefix} == "${venv}" ]] && ! "${venv}/bin/python3" -m pip --version >/dev/null 2>&1 && ! copy_of_pinned; then
  base=$(find_python)
  echo "setup_env.sh: making ${venv} with $("${base}" --version 2>&1)"
  if "${base}" -c 'import ensurepip' 2>/dev/null; then
    "${base}" -m venv --clear "${venv}" || die "${base} -m venv failed; see the message above"
  else
    venv_without_ensurepip "${base}"
  fi
fi
py=${prefix}/bin/python3
[[ -x ${py} ]] || die "${prefix} has no bin/python3"
right_version "${py}" || die "${prefix} has $("${py}" --version 2>&1); 3.10 to 3.13 are supported"
"${py}" -m pip --version >/dev/null 2>&1 || die "${prefix} has no pip (conda install pip, or python3 -m ensurepip)"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# An install that was cut short can leave packages that pip believes complete: their list of files is written last.
if [[ -f ${prefix}/.sdumc-installing ]]; then
  echo "setup_env.sh: the last set-up was interrupted, looking for broken packages"
  "${py}" - <<'EOF'
import pathlib, shutil, sysconfig
site = pathlib.Path(sysconfig.get_paths()["purelib"])
for entry in [*site.glob("~*"), *(d for d in site.glob("*.dist-info") if not (d / "RECORD").exists())]:
    print(f"setup_env.sh: removing {entry.name}")
    shutil.rmtree(entry, ignore_errors=True)
EOF
fi

log=${prefix}/sdumc-install.log
install() {
  # pip's progress is for a terminal; elsewhere it goes to a log, of which an error shows the end.
  if [[ -t 1 ]]; then
    "${py}" -m pip install "$@" 9<&-
  elif ! "${py}" -m pip install "$@" >>"${log}" 2>&1 9<&-; then
    tail -n 15 "${log}" >&2
    return 1
  fi
}

# Where pip's index has both builds, the CPU one comes from torch's own index: its versions end in +cpu, which pip
# prefers to the same version without. That index must not be named where it cannot be reached: pip would try for hours.
cpu_index=https://download.pytorch.org/whl/cpu
torch_build() {
  case ${torch} in
    auto)
      if [[ -e /proc/driver/nvidia/version ]] || command -v nvidia-smi >/dev/null; then echo cuda; else echo cpu; fi
      ;;
    *) echo "${torch}" ;;
  esac
}
reachable() { "${py}" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$1" >/dev/null 2>&1; }

torch_version() { "${py}" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }
if [[ ${torch} == cuda && $(torch_version) == *+cpu ]]; then
  die "${prefix} has the CPU build of torch; ${py} -m pip uninstall torch, then call this script again"
fi
# In tools/venv the pins must hold; an environment of the user's own keeps what setup.py allows. After an interruption
# pip looks at every package.
nothing_missing() {
  [[ ${versions} == pinned && ! -f ${prefix}/.sdumc-installing ]] && check --extras "${extras}" --quiet &&
    [[ ${prefix} != "${venv}" || -z $(check --differences) ]]
}
if nothing_missing; then
  # Everything is there (a shared or prepared environment): no network is needed.
  "${py}" -m pip install --quiet --no-deps --no-build-isolation -e "${root}" >>"${log}" 2>&1 9<&- ||
    echo "setup_env.sh: note: sdumc itself could not be installed into ${prefix}; recipes find it through path.sh"
else
  echo "setup_env.sh: installing into ${prefix} (extras: ${extras:-none}); this takes minutes"
  : >"${log}"
  touch "${prefix}/.sdumc-installing"
  wanted=${versions}
  if [[ ${versions} == pinned && ${prefix} != "${venv}" ]]; then wanted=missing; fi
  constraints=${prefix}/sdumc-constraints.txt
  check --constraints "${wanted}" >"${constraints}"
  upgrade=()
  if [[ ${versions} == newest ]]; then upgrade=(--upgrade --upgrade-strategy eager); fi
  if [[ $(torch_build) == cpu ]]; then
    if reachable "${cpu_index}/torch/"; then
      install "$(check --requirement torch)" -c "${constraints}" "${upgrade[@]}" --extra-index-url "${cpu_index}" ||
        die "torch could not be installed; see above"
    elif [[ ${versions} != pinned ]]; then
      pinned_torch=$(check --constraints pinned | grep '^torch==')
      sed -i "s/^torch==.*/${pinned_torch}/" "${constraints}"
      [[ ${versions} == oldest ]] || echo "${pinned_torch}" >>"${constraints}"
      echo "setup_env.sh: note: ${pinned_torch} as pinned: the CPU builds of others, ${cpu_index}, cannot be reached"
    fi
  fi
  # sdumc is built in this environment, not in a separate one, for which pip would fetch the newest setuptools.
  builder=$(sed -n 's/^requires = \["\(.*\)"\]$/\1/p' "${root}/pyproject.toml")
  if ! install "${builder}" -c "${constraints}" ||
    ! install --no-build-isolation -e "${root}[${extras}]" -c "${constraints}" "${upgrade[@]}"; then
    die "pip failed, see above; call this script again to go on"
  fi
  "${py}" -c 'import torch, transformers, soundfile, av, kaldiio' ||
    die "the packages are installed, but cannot be imported; see above"
  rm -f "${prefix}/.sdumc-installing"
fi

# What was asked for before stays in the list.
known=${extras}
if [[ -f ${prefix}/${stamp} ]] && [[ $(sed -n 1p "${prefix}/${stamp}") == "${fingerprint} "* ]]; then
  known=$(sed -n 2p "${prefix}/${stamp}"),${extras}
fi
{
  echo "${fingerprint} $(python_version "${py}")"
  echo "${known}"
} >"${prefix}/${stamp}.tmp" 2>/dev/null && mv "${prefix}/${stamp}.tmp" "${prefix}/${stamp}" ||
  echo "setup_env.sh: note: ${prefix} cannot be written to; it will be checked again next time"
report_complete ": $("${py}" --version), torch $(torch_version)"
if [[ ${prefix} != "${venv}" ]]; then
  echo "setup_env.sh: (this is the environment that was active)"
fi
