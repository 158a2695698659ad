"""The Triton kernels: the twin of each op file. Only these files import Triton."""
