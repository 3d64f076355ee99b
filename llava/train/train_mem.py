"""The training entry with flash attention where it can run: what upstream's scripts call."""

from llava.errors import one_clear_error
from llava.train.train import train

if __name__ == "__main__":
    with one_clear_error():
        train(attn_implementation="flash_attention_2")
