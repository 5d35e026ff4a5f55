"""Predictions against what others measured: `perfmodel validate published`, `tuners`, `layers`."""
