"""Logits that are computed when somebody reads them, and their place in autograd's graph."""
