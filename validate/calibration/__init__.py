"""Profiles of the machine at hand: `perfmodel calibrate`, `validate host`, `validate fit --records`."""
