"""Training: `train.py` is the entry, `llava_trainer.py` the trainer, `arguments.py` has all flags.

Flags are parsed into dataclasses, from which `session.py` loads the model and `data.py` the
records; the trainer takes `TrainingArguments` as they are.
"""
