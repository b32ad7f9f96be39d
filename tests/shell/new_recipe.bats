#!/usr/bin/env bats
# utils/new_recipe.sh, in a repository of its own.

load common

setup() {
  FAKE=${BATS_TEST_TMPDIR}/fake
  mkdir -p "${FAKE}/egs" "${FAKE}/utils"
  ln -s "${REPO}"/utils/* "${FAKE}/utils/"
  rm "${FAKE}/utils/new_recipe.sh"
  cp "${REPO}/utils/new_recipe.sh" "${FAKE}/utils/"
  cp -R "${REPO}/egs/TEMPLATE" "${FAKE}/egs/"
  cd "${FAKE}" || return 1
}

@test "a recipe: shared files are links, the rest are copies, and what comes next is printed" {
  run utils/new_recipe.sh reviews
  [[ ${status} == 0 && ${output} == *"egs/reviews/local/data.sh"* && ${output} == *"docs/recipes.md"* ]]
  for file in cmd.sh path.sh sdumc.sh; do
    [[ $(readlink "egs/reviews/${file}") == "../TEMPLATE/${file}" && -f egs/reviews/${file} ]]
  done
  [[ $(readlink egs/reviews/utils) == ../../utils && -f egs/reviews/conf/slurm.conf ]]
  for file in run.sh local/data.sh local/corpus.sh; do [[ -x egs/reviews/${file} && ! -L egs/reviews/${file} ]]; done
  diff egs/TEMPLATE/conf egs/reviews/conf
  run egs/reviews/run.sh --help
  [[ ${status} == 0 && ${output} == *"--stop-stage"* ]]
}

@test "it can be called from anywhere" {
  cd "${BATS_TEST_TMPDIR}"
  run "${FAKE}/utils/new_recipe.sh" reviews
  [[ ${status} == 0 && -x ${FAKE}/egs/reviews/run.sh ]]
}

@test "--features-only: starts at stage 4, has no local/" {
  run utils/new_recipe.sh --features-only reviews
  [[ ${status} == 0 && ! -e egs/reviews/local && ! -e egs/reviews/conf/audio.yaml && -f egs/reviews/conf/train.yaml ]]
  [[ -f egs/reviews/conf/train_paper.yaml ]] # its base is the recipe's own train.yaml
  grep -q -- '--stage 4' egs/reviews/run.sh
}

@test "names that are no names are refused, and nothing is made" {
  for name in Reviews 1st a/b .. a.b "a b" '$(touch pwned)' -x TEMPLATE; do
    run utils/new_recipe.sh -- "${name}"
    [[ ${status} == 2 && ${output} == *"error: "* ]]
  done
  run utils/new_recipe.sh
  [[ ${status} == 2 ]]
  run utils/new_recipe.sh a b
  [[ ${status} == 2 ]]
  [[ $(ls -A egs) == TEMPLATE && ! -e pwned ]]
}

@test "what is there is not touched" {
  mkdir egs/mine
  echo precious >egs/mine/run.sh
  run utils/new_recipe.sh mine
  [[ ${status} == 2 && ${output} == *"exists"* && $(cat egs/mine/run.sh) == precious ]]
  ln -s nowhere egs/gone
  run utils/new_recipe.sh gone
  [[ ${status} == 2 && $(echo egs/*) == "egs/TEMPLATE egs/gone egs/mine" ]]
}

@test "a failure on the way leaves nothing behind" {
  rm egs/TEMPLATE/conf/train.yaml
  run utils/new_recipe.sh reviews
  [[ ${status} != 0 && $(ls -A egs) == TEMPLATE ]]
}
