"""Programs of several GPUs as one rank runs them: what they add to a step while it is recorded, in a file a form."""
