"""The flat optimizer: hundreds of small tensors stepped as one."""
