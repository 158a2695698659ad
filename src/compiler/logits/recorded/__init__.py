"""What is asked of lazy logits without their values: rows, scales, and what ends in tiles."""
