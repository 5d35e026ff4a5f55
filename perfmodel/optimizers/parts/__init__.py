"""What optimizers are made of, and the updates that only one method runs."""
