"""Faster kernels for a graph on a CPU."""
