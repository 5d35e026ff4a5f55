"""What the model must reproduce: `perfmodel validate counts`, `coverage`, and Inductor for `torch.compile`."""
