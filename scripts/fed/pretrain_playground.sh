#!/usr/bin/env bash
# One federated run on the playground: LLaVA's pre-training flags and the --fed_* ones.
#   bash scripts/fed/pretrain_playground.sh --fed_method fedavg --fed_rounds 3 --output_dir X
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

"$PYTHON" -m fed.train \
    --fed_clients playground/fed/topic.yaml \
    --fed_rounds 5 \
    --fed_method fedcmp \
    --fed_eval_data_path playground/data/emoji/heldout_dev.json \
    --fed_eval_image_folder playground/data/emoji/images \
    --fed_eval_domain topic \
    --model_name_or_path playground/backbones/llm \
    --version plain \
    --vision_tower playground/backbones/vision_tower \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --output_dir runs/playground \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 64 \
    --save_strategy no \
    --learning_rate 4e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 256 \
    "$@"
