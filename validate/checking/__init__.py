"""Predictions against the records of `perfmodel validate measure`: `perfmodel validate check`. Needs no torch."""
