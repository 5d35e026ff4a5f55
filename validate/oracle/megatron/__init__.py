"""The tape of Megatron-Core's program against the real one, a rank of it, on this CPU."""
