"""What runs a rewritten graph: eager PyTorch, or Inductor and its C++ compiler."""
