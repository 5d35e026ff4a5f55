"""From a step to a decision: hours, dollars and joules of a whole job, and the GPU to run it on."""
