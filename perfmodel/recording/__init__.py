"""A step is recorded: forward, backward, clipping, optimizer."""
