"""What a trace notes besides calls: on whose account they run, what the host does beside them, where modules begin."""
