#!/usr/bin/env bash
# Usage: utils/show_results.sh [exp/train_seed1/decode_test ...]
#
# Prints the scores of decoded sets, a line for each condition; all below exp/ when no folder is named.
set -euo pipefail

if (($# == 0)); then
  shopt -s nullglob
  set -- exp/*/decode_*
fi
if (($# == 0)); then
  echo "show_results.sh: nothing is decoded yet: there is no exp/*/decode_*" >&2
  exit 1
fi
# score.json has one `"key": value` a line.
value() { sed -n "s/^ *\"$2\": *\([^,]*\),*\$/\1/p" "$1"; }

for decoded; do
  printf '%s\n' "${decoded}"
  printf '  %-12s %7s %7s %7s %10s %10s %5s\n' condition mae corr acc7 acc2_has0 acc2_non0 n
  for condition in full missing asr none; do
    if [[ -f ${decoded}/${condition}/score.json ]]; then ordered+=("${condition}"); fi
  done
  for file in "${decoded}"/*/score.json; do
    condition=$(basename "$(dirname "${file}")")
    [[ " ${ordered[*]-} " == *" ${condition} "* || ! -f ${file} ]] || ordered+=("${condition}")
  done
  for condition in "${ordered[@]-}"; do
    file=${decoded}/${condition}/score.json
    [[ -n ${condition} && -f ${file} ]] || continue
    row=()
    for key in mae corr acc7 acc2_has0 acc2_non0; do
      number=$(value "${file}" "${key}")
      if [[ ${number} == null || -z ${number} ]]; then row+=(-); else row+=("$(LC_ALL=C printf '%.3f' "${number}")"); fi
    done
    printf '  %-12s %7s %7s %7s %10s %10s %5s\n' "${condition}" "${row[@]}" "$(value "${file}" n)"
  done
  ordered=()
done
