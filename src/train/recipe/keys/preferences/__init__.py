"""The keys of training on preferences and rewards.

``preference`` has those of a recipe itself, ``trl`` and ``vllm`` those of the groups of that name.
"""
