"""Rows of preferences: two answers to a prompt, a judged answer, a prompt alone, judged steps.

In processing order: ``readers`` reads rows of each type (a function of the recipe may change them
before) → ``encoder`` makes tokens → ``limits`` drops or cuts what is too long, and lays the tokens
out as samples, which are cached, split and ordered as all samples are → ``examples`` gives them to
trainers, by TRL's names for their parts.
"""
