#!/usr/bin/env bash
# Pilot: federated multimodal instruction tuning across tasks, from a pre-trained projector to a
# model of its own for each client. clients.yaml names each client's data and its `task`. The first
# round has stages 1 and 2, later rounds stage 2. Killed, the same command goes on.
# Any flag can be given again at the end: bash scripts/fed/finetune_pilot.sh --fed_clients mine.yaml
set -euo pipefail

deepspeed --module fed.train \
    --fed_method pilot \
    --fed_clients ./clients.yaml \
    --fed_rounds 3 \
    --fed_one_pass False \
    --fed_lr_schedule round \
    --lora_enable True --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path lmsys/vicuna-7b-v1.5 \
    --version v1 \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin \
    --mm_projector_type pilot \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir ./checkpoints/llava-v1.5-7b-pilot \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 500 \
    --save_total_limit 1 \
    --pilot_stage1_learning_rate 2e-5 \
    --learning_rate 4e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to tensorboard \
    "$@"
