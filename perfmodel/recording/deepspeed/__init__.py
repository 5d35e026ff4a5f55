"""What DeepSpeed makes of a step on several GPUs, or with something offloaded on one."""
