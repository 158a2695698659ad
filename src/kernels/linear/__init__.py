"""Linear layers: adapters, quantized weights, several on one input."""
