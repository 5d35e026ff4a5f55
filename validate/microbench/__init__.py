"""Microbenchmarks: kernels and host costs on this machine, the same code on CUDA and on the CPU.

`designs` says what is measured, `kernels` makes it run, `stopwatch` times it, `run` goes through it within a budget
and writes records.
"""
