"""The flat optimizer: hundreds of small tensors updated as one."""
