# Sourced by the scripts beside it.

# in_chunks ANSWERS MODULE FLAGS…: `python -m llava.eval.MODULE FLAGS` in one process for each GPU of
# CUDA_VISIBLE_DEVICES (one process where it is not set or there is no GPU); their answers, in order,
# become the file ANSWERS. Fails if one of them does; the same call then goes on from there, and asks
# nothing that a process has answered to its end.
in_chunks() {
    local answers=$1 module=$2 gpus index call failed=0 files=() processes=()
    shift 2
    IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES-0}"
    [ ${#gpus[@]} -gt 0 ] || gpus=("")
    for index in "${!gpus[@]}"; do
        files+=("${answers%/*}/${#gpus[@]}_$index.jsonl")
    done
    printf -v call '%q ' "$module" "$@"
    mkdir -p "${answers%/*}"
    [ "$(cat "$answers.unfinished" 2> /dev/null)" = "$call" ] || rm -f "${files[@]}"
    echo "$call" > "$answers.unfinished"
    for index in "${!gpus[@]}"; do
        [ ! -f "${files[index]}" ] || continue
        CUDA_VISIBLE_DEVICES=${gpus[index]} python -m "llava.eval.$module" "$@" \
            --answers-file "${files[index]}" --num-chunks ${#gpus[@]} --chunk-idx "$index" &
        processes+=($!)
    done
    for index in "${processes[@]}"; do
        wait "$index" || failed=1
    done
    [ $failed = 0 ] || return 1
    cat "${files[@]}" > "$answers.tmp"
    mv "$answers.tmp" "$answers"
    rm "$answers.unfinished"
}
