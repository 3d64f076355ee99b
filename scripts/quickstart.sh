#!/usr/bin/env bash
# From a fresh clone to a federated LLaVA on real pictures: bash scripts/quickstart.sh
# Eight clients, each with pictures of one topic, train one projector together; the result is
# compared with each client alone and with all data in one place. Ends in runs/quickstart/.
# Flags at the end go to every training run: bash scripts/quickstart.sh --learning_rate 1
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

out=runs/quickstart
data=playground/data/emoji
started=$SECONDS
"$PYTHON" -m playground.tools.unpack_data

run() { # run NAME FLAGS…: one run of fed.train into $out/NAME
    local name=$1
    shift
    echo "== $name"
    bash scripts/fed/pretrain_playground.sh \
        --fed_clients playground/fed/topic.yaml \
        --fed_eval_data_path $data/heldout_test.json $data/unseen.json \
        --feature_cache $out/features \
        --output_dir "$out/$name" \
        "$@"
}

run central --fed_method fedavg --fed_pool True --fed_rounds 1 "$@"
run alone --fed_method local --fed_rounds 1 "$@"
run fedavg --fed_method fedavg --fed_rounds 5 "$@"
run fedcmp --fed_method fedcmp --fed_rounds 5 "$@"

echo "== report"
"$PYTHON" -m fed.report \
    --runs "alone=$out/alone" "FedAvg=$out/fedavg" "Fed-CMP=$out/fedcmp" "centralised=$out/central" \
    --output $out --title "Federated pre-training of a projector on the playground" \
    --note "One seed. heldout_test: pictures that no client has, of concepts that one client has in
other styles. The frozen tower and language model have seen them; the projector between these was
thrown away. unseen: pictures of concepts that neither a client nor the frozen parts have seen."
"$PYTHON" -m fed.gallery \
    --models "objects alone=$out/alone/clients/objects" "FedAvg=$out/fedavg" "Fed-CMP=$out/fedcmp" "central=$out/central" \
    --model_base playground/backbones/llm --data $data/heldout_test.json --image_folder $data/images \
    --output $out/gallery.png

echo
echo "== ask the federated model about a held-out picture: a strawberry"
ask .venv/bin/python -m llava.eval.run_llava --model-path $out/fedcmp \
    --model-base playground/backbones/llm --image-file $data/images/openmoji/1f353.webp \
    --query "What is this?" --temperature 0

echo
echo "done in $((SECONDS - started)) s after the install:"
echo "  $out/report.md, report.json    the table"
echo "  $out/loss.png, cosines.png, gallery.png"
echo "  $out/fedcmp/                   the checkpoint; $out/fedcmp/rounds.jsonl, what happened"
echo "talk to the models, side by side, on a web page: bash scripts/serve/demo.sh"
