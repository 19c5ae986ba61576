"""Triton kernels. Only ops.py imports them; the references they must equal are in nf4.py, int8.py and dynamic8.py."""
