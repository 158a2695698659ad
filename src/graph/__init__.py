"""Reading torch.fx graphs: one spelling per operation, facts about values, printing."""
