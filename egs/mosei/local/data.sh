#!/usr/bin/env bash
# Stage 1: data directories (and, for --source toolkit and authors, dump folders) from the form that the user has.
# shellcheck disable=SC2154,SC2086,SC2206  # run.sh and sdumc.sh export the variables; the words of train_cmd are to be split
set -euo pipefail

# Stage 0 checks these too, but it may have been skipped.
case ${source} in
  raw) : "${corpus_dir:?--source raw needs --corpus-dir}" "${folds:?--source raw needs --folds}" ;;
  table) : "${table:?--source table needs --table}" ;;
  toolkit) : "${pickle:?--source toolkit needs --pickle}" ;;
  authors) : "${features_dir:?--source authors needs --features-dir}" "${labels:?--source authors needs --labels}" ;;
esac
outputs=("${datadir}"/{train,valid,test}/utt2label "${datadir}/folds.txt")
common=(--data-dir "${datadir}" --max-drop "${max_drop}" --counts "${counts}")
if [[ ${counts} == sims ]]; then common+=(--shared-speakers allow); fi # its published split is like that
log=${datadir}/log/import.log
case ${source} in
  raw)
    options=(--corpus-dir "${corpus_dir}" --folds "${folds}" --media "${media}")
    if [[ -n ${labels} ]]; then options+=(--labels "${labels}"); fi
    raw=${corpus_dir}
    if [[ -d ${raw}/Raw ]]; then raw=${raw}/Raw; fi
    inputs=("${folds}" "${raw}/Transcript" ${labels:+"${labels}"})
    command=(step "import raw" --inputs "${inputs[@]}" --optional-inputs "${raw}/Labels"
      --outputs "${outputs[@]}" "${datadir}"/{train,valid,test}/wav.scp
      -- ${train_cmd} "${log}" -- python3 -m sdumc.bin.prepare_mosei "${options[@]}" "${common[@]}")
    ;;
  table)
    command=(step "import table" --inputs "${table}" --outputs "${outputs[@]}" "${datadir}"/{train,valid,test}/wav.scp
      -- ${train_cmd} "${log}" -- python3 -m sdumc.bin.import_table --table "${table}"
      ${media_dir:+--media-dir "${media_dir}"} --label-scale "${label_scale:-cmu}" "${common[@]}")
    ;;
  toolkit)
    options=(--pickle "${pickle}" --label-scale "${label_scale:-cmu}")
    features=(audio text video) media_tables=()
    if [[ -n ${corpus_dir} ]]; then
      media_tables=(--optional-inputs "${corpus_dir}"{,/Raw}/{Transcript,Labels})
      options+=(--corpus-dir "${corpus_dir}" --media "${media}")
      # Simulated and recognised text are states of the LLM; real text has to be that too, not the pickle's BERT.
      if [[ -n ${llm} && -n ${encoder} ]]; then features=(audio video); fi
    fi
    for feature in "${features[@]}"; do outputs+=("${dumpdir}"/{train,valid,test}/"${feature}.scp"); done
    command=(step "import toolkit" --inputs "${pickle}" "${media_tables[@]}" --outputs "${outputs[@]}"
      -- ${train_cmd} "${log}" -- python3 -m sdumc.bin.import_toolkit "${options[@]}" --features "${features[@]}"
      --dump-dir "${dumpdir}" "${common[@]}")
    ;;
  authors)
    options=(--features-dir "${features_dir}" --labels "${labels}")
    if [[ -n ${transcripts} ]]; then options+=(--transcripts "${transcripts}"); fi
    command=(step "import authors" --inputs "${labels}" ${transcripts:+"${transcripts}"} --ignore num-jobs
      --outputs "${outputs[@]}" "${dumpdir}"/{train,valid,test}/utt2label
      -- ${train_cmd} "${log}" -- python3 -m sdumc.bin.import_authors "${options[@]}" --num-jobs "${nj}"
      --dump-dir "${dumpdir}" "${common[@]}")
    ;;
esac

code=0
"${command[@]}" || code=$?
# What was found per fold, also when it was too little.
if [[ -f ${datadir}/folds.txt ]]; then sed 's/^/    /' "${datadir}/folds.txt"; fi
exit "${code}"
