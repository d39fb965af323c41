"""Kernels in Triton: one source for the accelerators of every vendor.

Importing this package imports neither torch nor Triton; its modules do. Triton decides when a
module is imported whether kernels are compiled or interpreted (`TRITON_INTERPRET=1`), so a process
does either the one or the other.
"""
