"""Rows of preferences: two answers to a prompt, a judged answer, a prompt alone, judged steps.

In processing order: ``messages``, ``texts``, ``prompts`` and ``steps`` read rows of each type into
what ``rows`` defines (a function of the recipe may change them before: ``own_type``) → ``encoder``
chooses between them, and makes tokens → ``limits`` drops or cuts what is too long, and lays the
tokens out as samples, which are cached, split and ordered as all samples are → ``examples`` gives
them to trainers, by the names that TRL has for their parts.
"""
