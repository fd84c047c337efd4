"""Measures the kernels on a GPU, beside what the device can do at most and beside peers."""
