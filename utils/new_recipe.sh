#!/usr/bin/env bash
# Usage: utils/new_recipe.sh [options] NAME
#
# Makes the recipe egs/NAME from egs/TEMPLATE: files that all recipes share become links, files that you edit become
# copies. docs/new_recipe.md explains the next steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#: Options
features_only=false #: for features from elsewhere: without local/ and the settings of stages 1 to 3
. utils/parse_options.sh

die() {
  echo "new_recipe.sh: error: $*" >&2
  exit 2
}
(($# == 1)) || die "expected one NAME, such as utils/new_recipe.sh reviews; --help explains the options"
name=$1
[[ ${name} =~ ^[a-z][a-z0-9_]*$ ]] ||
  die "'${name}': a recipe's name has small letters, digits and underscores only, and begins with a letter"
[[ ! -e egs/${name} && ! -L egs/${name} ]] || die "egs/${name} exists already; choose another name, or remove it"

new=$(mktemp -d "egs/.${name}.XXXXXX")
trap 'rm -rf "${new}"' EXIT
chmod 755 "${new}"
for file in cmd.sh path.sh sdumc.sh; do ln -s "../TEMPLATE/${file}" "${new}/${file}"; done
ln -s ../../utils "${new}/utils"
mkdir "${new}/conf"
ln -s ../../TEMPLATE/conf/slurm.conf "${new}/conf/slurm.conf"
cp egs/TEMPLATE/conf/train.yaml egs/TEMPLATE/conf/train_paper.yaml "${new}/conf/"
if [[ ${features_only} == true ]]; then
  cat >"${new}/run.sh" <<'EOF'
#!/usr/bin/env bash
# Names the sets and models of this recipe; sdumc.sh does the rest and lists its options: ./run.sh --help
# dump/<set>/ holds features from elsewhere: docs/files.md says which files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./sdumc.sh \
  --stage 4 \
  --train-set train \
  --valid-set valid \
  --test-sets test \
  "$@"
EOF
  chmod 755 "${new}/run.sh"
else
  cp egs/TEMPLATE/run.sh "${new}/"
  cp -R egs/TEMPLATE/local "${new}/"
  for file in egs/TEMPLATE/conf/*.yaml; do cp "${file}" "${new}/conf/"; done
fi
cat >"${new}/README.md" <<EOF
# ${name}

What the corpus is, where to get it, and under which licence.

\`./run.sh\` runs all stages; [docs/stages.md](../../docs/stages.md) explains them.
EOF
mv -T "${new}" "egs/${name}"
trap - EXIT

echo "egs/${name} is made. Next:"
if [[ ${features_only} == true ]]; then
  cat <<EOF
  1. egs/${name}/dump/{train,valid,test}/   your features: <name>.scp with their arks, and utt2label (docs/files.md)
  2. egs/${name}/run.sh                     names of the sets, if they are not these
EOF
else
  cat <<EOF
  1. egs/${name}/local/data.sh   write data/<set>/{wav.scp,video.scp,text,utt2spk,utt2label}
  2. egs/${name}/run.sh          names of the sets; folders of the pretrained models
  3. egs/${name}/local/corpus.sh checks before long work, if there is anything to check; or remove it
EOF
fi
cat <<EOF
  then egs/${name}/conf/*.yaml, egs/${name}/README.md, and a line in docs/recipes.md, which the tests ask for.
  Check the settings without data: python -m sdumc.bin.train --config egs/${name}/conf/train.yaml --dry-run
EOF
