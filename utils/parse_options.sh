#!/usr/bin/env bash
# Command-line options of a shell script; source it after the script's defaults:
#
#     #: Group heading
#     nj=4         #: number of parallel jobs
#     force=false  #: redo what is done already
#     . utils/parse_options.sh
#
# Every line `name=default  #: help` of the sourcing script declares an option. No other variable of the shell can be set
# from outside. `--name value` and `--name=value` mean the same, and so do dashes and underscores.
# An option whose default is true or false is a flag: `--force`, `--force true` and `--force=true` mean the same.
# Values are assigned as they are; none is ever evaluated. A value that begins with `--` needs the form with `=`.
# When an option is given twice, the last value wins. Options end at `--` or at the first word that does not begin with a
# dash; what follows stays in "$@". `--help` prints the script's leading comment and all options with their defaults.
# Errors go to stderr and end the script with status 2.
#
# A script that calls another one with the user's options names it before it sources this file:
#
#     pass_options_to=./sdumc.sh
#     . utils/parse_options.sh
#     ./sdumc.sh "$@"
#
# Options that only ./sdumc.sh declares are then left in "$@", as `--name=value`. An option that neither declares is an
# error, and `--help` shows the options of both.

# The sourcing script's file; its name may be relative to a folder that the script has left by now.
_po_script=${BASH_SOURCE[1]:-$0}
for _po_line in "$(readlink "/proc/$$/fd/255" 2>/dev/null)" "${_po_script}" "${OLDPWD-}/${_po_script}" \
  "${_po_script##*/}"; do
  if [[ ${_po_line##*/} == "${_po_script##*/}" && -f ${_po_line} ]]; then
    _po_script=${_po_line}
    break
  fi
done
# Help of this script's options; names of flags and of options for the other script.
declare -A _po_help=() _po_flag=() _po_other=()
_po_lines=()  # what --help shows, in the script's order: "=Heading" or an option's name
_po_passed=() # options for the other script
_po_declaration="^([a-z][a-z0-9_]*)=('[^']*'|\"[^\"]*\"|[^ ]*) *#: (.*)$" # name, default, help
while IFS= read -r _po_line; do
  if [[ ${_po_line} =~ ^'#: '(.*)$ ]]; then
    _po_lines+=("=${BASH_REMATCH[1]}")
  elif [[ ${_po_line} =~ ${_po_declaration} ]]; then
    _po_help[${BASH_REMATCH[1]}]=${BASH_REMATCH[3]}
    _po_lines+=("${BASH_REMATCH[1]}")
    case ${BASH_REMATCH[2]} in true | false) _po_flag[${BASH_REMATCH[1]}]=yes ;; esac
  fi
done <"${_po_script}"
if [[ -n ${pass_options_to-} ]]; then
  while IFS= read -r _po_line; do
    if [[ ${_po_line} =~ ${_po_declaration} && -z ${_po_help[${BASH_REMATCH[1]}]+set} ]]; then
      _po_other[${BASH_REMATCH[1]}]=yes
      case ${BASH_REMATCH[2]} in true | false) _po_flag[${BASH_REMATCH[1]}]=yes ;; esac
    fi
  done <"${pass_options_to}"
fi

_po_die() {
  printf '%s: error: %s\n' "${_po_script##*/}" "$1" >&2
  exit 2
}

_po_print_help() {
  local line shown
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^# shellcheck/ { sub(/^# ?/, ""); print }' "${_po_script}"
  for line in "${_po_lines[@]}"; do
    if [[ ${line} == =* ]]; then
      printf '\n%s:\n' "${line#=}"
    else
      shown=${!line-}
      printf '  --%-19s %s (default: %s)\n' "${line//_/-}" "${_po_help[${line}]}" "${shown:-none}"
    fi
  done
  if [[ -n ${pass_options_to-} ]]; then
    echo
    "${pass_options_to}" --help
  fi
}

# Number of single-letter edits from one word to another.
_po_distance() {
  local a=$1 b=$2 i j cost
  local -a row next
  for ((j = 0; j <= ${#b}; j++)); do row[j]=${j}; done
  for ((i = 1; i <= ${#a}; i++)); do
    next[0]=${i}
    for ((j = 1; j <= ${#b}; j++)); do
      cost=1
      [[ ${a:i-1:1} != "${b:j-1:1}" ]] || cost=0
      next[j]=$((row[j - 1] + cost))
      ((next[j] <= row[j] + 1)) || next[j]=$((row[j] + 1))
      ((next[j] <= next[j - 1] + 1)) || next[j]=$((next[j - 1] + 1))
    done
    row=("${next[@]}")
  done
  printf '%s\n' "${row[${#b}]}"
}

# The declared option that the user probably meant, if one is similar.
_po_suggest() {
  local wanted=$1 name best='' least=3 distance
  ((${#wanted} <= 40)) || return 0
  for name in "${!_po_help[@]}" "${!_po_other[@]}"; do
    if [[ ${#wanted} -ge 3 && ${name} == "${wanted}"* ]]; then
      distance=0
    else
      distance=$(_po_distance "${wanted}" "${name}")
    fi
    if ((distance < least)); then
      least=${distance} best=${name}
    fi
  done
  [[ -z ${best} ]] || printf '; did you mean --%s?' "${best//_/-}"
}

_po_show_help=false
while (($# > 0)); do
  case $1 in
    --)
      shift
      break
      ;;
    --help | -h)
      _po_show_help=true
      shift
      continue
      ;;
    --?*) ;;
    -?*) _po_die "unknown option '$1'; options begin with two dashes, --help lists them" ;;
    *) break ;;
  esac
  _po_word=${1%%=*}
  _po_name=${_po_word#--}
  _po_name=${_po_name//-/_}
  if [[ ! ${_po_name} =~ ^[a-z][a-z0-9_]*$ || -z ${_po_help[${_po_name}]+set}${_po_other[${_po_name}]+set} ]]; then
    _po_die "unknown option '${_po_word}'$(_po_suggest "${_po_name}"); --help lists the options"
  fi
  if [[ $1 == *=* ]]; then
    _po_value=${1#*=}
    shift
  elif [[ -n ${_po_flag[${_po_name}]+set} ]]; then
    _po_value=true
    shift
    if [[ ${1-} == true || ${1-} == false ]]; then
      _po_value=$1
      shift
    fi
  elif (($# < 2)); then
    _po_die "option '${_po_word}' needs a value"
  elif [[ $2 == --* ]]; then
    _po_die "option '${_po_word}' needs a value, but '$2' follows (if that is the value, write ${_po_word}=$2)"
  else
    _po_value=$2
    shift 2
  fi
  if [[ -n ${_po_flag[${_po_name}]+set} && ${_po_value} != true && ${_po_value} != false ]]; then
    _po_die "option '${_po_word}' is true or false, not '${_po_value}'"
  fi
  if [[ -n ${_po_other[${_po_name}]+set} ]]; then
    _po_passed+=("--${_po_name//_/-}=${_po_value}")
  else
    printf -v "${_po_name}" '%s' "${_po_value}"
  fi
done
if [[ ${_po_show_help} == true ]]; then
  _po_print_help
  exit 0
fi
set -- "${_po_passed[@]}" "$@"
unset _po_script _po_help _po_flag _po_other _po_lines _po_passed _po_declaration _po_line _po_word _po_name _po_value _po_show_help
unset -f _po_die _po_print_help _po_distance _po_suggest
