"""Networks: nodes of GPUs as data with provenance, and what a collective costs on them in seconds."""
