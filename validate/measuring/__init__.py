"""Real training steps, timed and profiled: `perfmodel validate measure`.

A grid is made of cells (model, method, setup). Every cell is visited several times, in a new random order each round; a
visit builds the model, runs the training loop and appends one record.
"""
