"""A recorded step becomes figures: seconds, bytes, counts."""
