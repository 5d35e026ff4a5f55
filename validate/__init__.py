"""The validation harness: real PyTorch programs against the model's predictions. Needs the `validate` extra."""
