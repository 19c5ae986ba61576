"""Triton kernels. ops.py and training_ops.py alone call them, and name beside each the reference that it must equal."""
