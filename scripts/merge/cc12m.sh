#!/usr/bin/env bash
# Merging on real data: CC12M cut into clusters of pictures, one expert aligned on each, the experts
# merged, the merged projector finetuned as LLaVA-1.5 is, and that model evaluated.
#   CC12M=/data/cc12m OUT=/data/merge bash scripts/merge/cc12m.sh --dry-run    # print the commands
#   CC12M=/data/cc12m OUT=/data/merge bash scripts/merge/cc12m.sh              # on all GPUs
#   CC12M=/data/cc12m OUT=/data/merge METHOD=ties bash scripts/merge/cc12m.sh  # other merge, same experts
# Flags at the end go to every training run: bash scripts/merge/cc12m.sh --gradient_accumulation_steps 2
#
# A step whose folder has its command in command.txt is done and is passed over, so that the same
# call goes on where a killed one stopped (an expert that was being trained goes on from its last
# checkpoint; upstream's flags write one every 24000 steps, ALIGN_FLAGS="--save_steps 1000" more).
# A folder that was made by another command is refused. What a step prints is in FOLDER.log.
#
# Every setting is a variable. Paths are relative to the repository's root. Before: CC12M as
# img2dataset writes it (docs/data.md), and for finetuning and evaluation LLaVA's own data
# in playground/data. On disk, OUT takes as much as CC12M again, and a finetuned model each METHOD.
set -euo pipefail

CC12M=${CC12M:-./playground/data/cc12m}    # the folder of the tar files
OUT=${OUT:-./checkpoints/cc12m}            # everything that is made
LLM=${LLM:-lmsys/vicuna-13b-v1.5}          # language model: a folder or a hub name
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR:-mlp2x_gelu}
K=${K:-8}                                  # clusters, and so experts
COMMON=${COMMON:-20000}                    # pictures of all clusters that no expert gets
START=${START:-brief}                      # brief: experts begin aligned on the common pictures; fresh: as drawn
SEED=${SEED:-42}                           # of the cut, and of the projector as drawn
DEVICE=${DEVICE:-cuda}                     # where the tower runs for the cut
METHOD=${METHOD:-pivotmerge}               # python -m fed.merge --methods lists all
NAME=${NAME:-$METHOD}                      # of the merge; give one of its own to each MERGE_FLAGS
EVALS=${EVALS-pope gqa textvqa sqa mme mmbench}  # of scripts/v1_5/eval; EVALS= for none
DRY_RUN=${DRY_RUN:-}                       # 1: print the commands
# More flags of one step alone, split at spaces, for example:
#   METHOD=ties NAME=ties-0.3 MERGE_FLAGS="--options density=0.3"
#   START=fresh NAME=calibrated MERGE_FLAGS="--model_base lmsys/vicuna-13b-v1.5
#     --calibration_data ./checkpoints/cc12m/clusters/heldout.json
#     --image_folder ./checkpoints/cc12m/clusters/heldout/images --device cuda"
# (pictures that nothing was aligned on: with START=brief, others than these)
align_flags=(${ALIGN_FLAGS:-})
merge_flags=(${MERGE_FLAGS:-})
finetune_flags=(${FINETUNE_FLAGS:-})
eval_flags=(${EVAL_FLAGS:-})

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ $START = brief || $START = fresh ]] || fail "START is $START; brief or fresh is expected"
if [ "${1-}" = --dry-run ]; then
    DRY_RUN=1
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "$DRY_RUN" ]; then
    EXTRAS=data,deepspeed
    . scripts/setup.sh
fi

step() { # step FOLDER COMMAND…: run the command, which fills the folder, unless it has done so
    local folder=$1 command
    shift
    printf -v command '%q ' "$@"
    if [ -f "$folder/command.txt" ]; then
        [ "$(cat "$folder/command.txt")" = "$command" ] || fail "$folder was made by another command,
  $(cat "$folder/command.txt")
and not by
  $command
Remove it to make it anew, or name another OUT (of a merge: NAME)."
        echo "== $folder is there"
        return
    fi
    printf '== %s\n$ %s\n' "$folder" "$command"
    [ -z "$DRY_RUN" ] || return 0
    mkdir -p "$(dirname "$folder")"
    "$@" | tee -a "$folder.log"
    mkdir -p "$folder"
    echo "$command" >"$folder/command.tmp"
    mv "$folder/command.tmp" "$folder/command.txt"
}

model=(--model_name_or_path "$LLM" --vision_tower "$TOWER" --mm_projector_type "$PROJECTOR")

align() { # align FOLDER START DATA IMAGES FLAGS…: a projector trained from START
    local folder=$1 from=$2 data=$3 images=$4
    shift 4
    step "$folder" bash scripts/v1_5/pretrain.sh "${model[@]}" \
        --pretrain_mm_mlp_adapter "$from/mm_projector.bin" \
        --data_path "$data" --image_folder "$images" --output_dir "$folder" \
        "${align_flags[@]}" "$@"
}

# 1. The cut. The common pictures are drawn before it, out of all clusters.
clusters=$OUT/clusters
step "$clusters" python -m fed.data cluster --clusters "$K" \
    --tower "$TOWER" --device "$DEVICE" --batch_size 256 \
    --input "$CC12M/*.tar" --heldout "$COMMON" --seed "$SEED" --output "$clusters"

# 2. The start that all experts share, which is the merge's base, and the experts.
step "$OUT/start-fresh" python scripts/merge/fresh_start.py "${model[@]}" \
    --seed "$SEED" --output_dir "$OUT/start-fresh"
if [ $START = brief ]; then
    align "$OUT/start-brief" "$OUT/start-fresh" \
        "$clusters/heldout.json" "$clusters/heldout/images" "$@"
fi

names=()
if [ -d "$clusters" ]; then
    for file in "$clusters"/*/captions.json; do
        names+=("$(basename "$(dirname "$file")")")
    done
else # a dry run: as the cut will call them
    last=$((K - 1))
    for number in $(seq 0 $last); do
        names+=("$(printf "cluster-%0${#last}d" "$number")")
    done
fi
experts=()
for name in "${names[@]}"; do
    experts+=("$OUT/experts-$START/$name")
    align "$OUT/experts-$START/$name" "$OUT/start-$START" \
        "$clusters/$name/captions.json" "$clusters/$name/images" "$@"
done

# 3. The merge. One that was killed before it had its command.txt is made anew.
merged=$OUT/merged-$START/$NAME
step "$merged" python -m fed.merge --method "$METHOD" --experts "${experts[@]}" \
    --base "$OUT/start-$START" --output "$merged" --overwrite "${merge_flags[@]}"

# 4. LLaVA-1.5's second stage around the merged projector.
finetuned=$OUT/llava-$START/llava-$NAME
step "$finetuned" bash scripts/v1_5/finetune.sh "${model[@]}" \
    --pretrain_mm_mlp_adapter "$merged/mm_projector.bin" --output_dir "$finetuned" \
    "${finetune_flags[@]}" "$@"

# 5. The benchmarks; answers lie with their data in playground/data/eval, by this name.
for benchmark in $EVALS; do
    step "$OUT/eval-$START/$NAME/$benchmark" env CKPT="$(basename "$OUT")-$START-$NAME" \
        bash "scripts/v1_5/eval/$benchmark.sh" --model-path "$finetuned" \
        "${eval_flags[@]}"
done
