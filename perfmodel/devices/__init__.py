"""Devices: profiles with provenance, and what an op costs on them in seconds."""
