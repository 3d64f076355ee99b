"""Ask a LLaVA about pictures.

python -m llava.eval.run_llava --model-path … --image-file … --query …
"""

from __future__ import annotations

import argparse
import re

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.errors import InputError, one_clear_error


def eval_model(args) -> str:
    """Answer one query about the pictures of `args` (upstream's names), print it and return it."""
    import torch

    from llava.conversation import get_template
    from llava.mm_utils import (
        get_model_name_from_path,
        load_image,
        process_images,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    files = args.image_file.split(args.sep) if args.sep else [args.image_file]
    images = [load_image(file) for file in files]
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, device=getattr(args, "device", "cuda")
    )
    if image_processor is None:
        raise InputError(f"{args.model_path}: a language model without pictures")

    mode = args.conv_mode or getattr(model.config, "conversation_template", None)
    conversation = get_template(mode or conv_mode_of(name)).copy()
    conversation.append_message(
        conversation.roles[0], question(args.query, model.config, len(images))
    )
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
    pixels = process_images(images, image_processor, model.config)
    if torch.is_tensor(pixels):
        pixels = pixels.to(device=model.device, dtype=model.dtype)
    else:
        pixels = [p.to(device=model.device, dtype=model.dtype) for p in pixels]
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
    with torch.inference_mode():
        output = model.generate(
            ids.to(model.device),
            images=pixels,
            image_sizes=[image.size for image in images],
            do_sample=args.temperature > 0,
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    answer = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    print(answer)
    return answer


def conv_mode_of(model_name: str) -> str:
    """The template that upstream takes for a model of this name when none is given."""
    name = model_name.lower()
    for part, mode in (
        ("llama-2", "llava_llama_2"),
        ("mistral", "mistral_instruct"),
        ("v1.6-34b", "chatml_direct"),
        ("v1", "llava_v1"),
        ("mpt", "mpt"),
    ):
        if part in name:
            return mode
    return "llava_v0"


def question(query: str, config, pictures: int) -> str:
    """The query with one image token per picture: at its placeholders, else in front."""
    token = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    if IMAGE_PLACEHOLDER in query:
        return re.sub(IMAGE_PLACEHOLDER, token, query)
    return f"{token}\n" * pictures + query


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--image-file", required=True, help="path or address; several with --sep")
    parser.add_argument("--query", required=True)
    parser.add_argument(
        "--conv-mode", default=None, help="else the config's conversation_template, else by name"
    )
    parser.add_argument("--sep", default=",")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda", help="cuda where there is one, else the CPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
