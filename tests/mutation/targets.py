"""What is mutated, which tests must notice, and which changes mean nothing."""

from __future__ import annotations

TESTS: dict[str, list[str]] = {
    "budget.py": ["tests/test_verify.py"],
    "verify.py": ["tests/test_verify.py"],
    "sampling.py": ["tests/test_verify.py"],
    "match/apply.py": ["tests/match", "tests/passes/test_writes.py"],
    "match/matcher.py": [
        "tests/match",
        "tests/passes/test_rms_norm.py",
        "tests/passes/test_rope.py",
    ],
    "graph/canon.py": ["tests/graph", "tests/match"],
    "graph/facts.py": ["tests/graph", "tests/match"],
    "graph/edit.py": ["tests/graph", "tests/passes/test_writes.py"],
    "memory/planner.py": ["tests/memory/test_planner.py"],
    "train/data/packing.py": ["tests/train/data/test_packing.py"],
    "train/data/mask.py": ["tests/train/data/test_chat.py", "tests/train/data/test_formats.py"],
    "train/resume.py": ["tests/train/test_resume.py"],
}
"""A file below ``src`` -> tests that are quick, and that must fail when it is wrong."""

EQUIVALENT: dict[str, dict[str, str]] = {
    "match/matcher.py": {
        "depth: int = ": "one that has matched nothing is no near miss: note() asks for more nodes",
        "isinstance(a, torch.dtype)": "a dtype equals nothing but itself, so either test will do",
    },
}
"""A file below ``src`` -> a line of a surviving change -> why it changes nothing that matters."""
