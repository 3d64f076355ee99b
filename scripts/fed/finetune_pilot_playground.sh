#!/usr/bin/env bash
# Pilot on the playground: nine clients with three tasks tune one LLaVA together, and each gets a
# model of its own. A projector is aligned first, briefly, on public pictures. Minutes on two cores.
#   bash scripts/fed/finetune_pilot_playground.sh --fed_clients playground/fed/pilot-b.yaml \
#       --fed_eval_data_path playground/data/tasks/heldout_test_b.json --output_dir runs/pilot-b
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

parts=playground/backbones/instruct
tasks=playground/data/tasks
start=runs/pilot-start
common=(
    --model_name_or_path $parts/llm
    --vision_tower $parts/vision_tower
    --mm_vision_select_layer -2
    --mm_use_im_start_end False
    --mm_use_im_patch_token False
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type cosine
    --model_max_length 256
)
if [ ! -f $start/mm_projector.bin ]; then
    "$PYTHON" llava/train/train.py "${common[@]}" \
        --version plain \
        --data_path $tasks/public.json \
        --image_folder $tasks/images \
        --mm_projector_type mlp2x_gelu \
        --tune_mm_mlp_adapter True \
        --max_steps 12 \
        --per_device_train_batch_size 32 \
        --learning_rate 2e-3 \
        --save_strategy no \
        --logging_steps 10 \
        --output_dir $start
fi
"$PYTHON" -m fed.train "${common[@]}" \
    --fed_method pilot \
    --fed_clients playground/fed/pilot-a.yaml \
    --fed_rounds 2 \
    --fed_one_pass False \
    --fed_eval_data_path $tasks/heldout_dev_a.json \
    --fed_eval_image_folder $tasks/images \
    --fed_eval_domain domain \
    --fed_eval_every 1000 \
    --version v1 \
    --lora_enable True --lora_r 8 --lora_alpha 16 --lora_dropout 0 \
    --pretrain_mm_mlp_adapter $start/mm_projector.bin \
    --mm_projector_type pilot \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 64 \
    --learning_rate 2e-3 \
    --save_strategy no \
    --logging_steps 1 \
    --output_dir runs/pilot \
    "$@"
