"""What training keeps in memory: predicted for each block, chosen within a budget, measured."""
