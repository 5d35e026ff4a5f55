"""The validation harness: real PyTorch programs against the model's predictions. Needs the `validate` extra."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is first imported
