"""What is mutated, which tests must notice, and which changes mean nothing."""

from __future__ import annotations

_VERIFY = [
    "tests/test_verify.py",
    "tests/verify/test_wrong_effects.py",
    "tests/verify/test_wrong_values.py",
    "--deselect=tests/test_verify.py::test_small_sizes_fit_every_formula",
    "-knot lora_linear and not rope-",
]
"""What judges rewrites: a whole model, and two ops with the slowest formulas, add little."""

TESTS: dict[str, list[str]] = {
    "verify.py": _VERIFY,
    "verify_runs.py": ["tests/verify/test_runs.py", *_VERIFY],
    "verify_compare.py": ["tests/verify/test_difference.py", *_VERIFY],
    "budget.py": ["tests/verify/test_tolerance.py"],
    "sampling.py": ["tests/verify/test_sampling.py", *_VERIFY],
    "smaller_weights.py": ["tests/verify/test_smaller_weights.py"],
    "match/apply.py": ["tests/match/test_apply.py"],
    "match/conditions.py": ["tests/match/test_conditions.py"],
    "match/matcher.py": [
        "tests/match",
        "tests/passes/test_rms_norm.py",
        "tests/passes/test_rope.py",
    ],
    "graph/effects.py": ["tests/graph/test_effects.py"],
    "graph/canon.py": ["tests/graph/test_canon.py", "tests/match/test_matcher.py"],
    "graph/facts.py": ["tests/graph", "tests/match"],
    "graph/edit.py": ["tests/graph/test_modes.py", "tests/match"],
    "memory/planner.py": ["tests/memory/test_planner.py"],
    "train/data/packing.py": ["tests/train/data/test_packing.py"],
    "train/data/mask.py": ["tests/train/data/test_chat.py", "tests/train/data/test_formats.py"],
    "train/resume.py": ["tests/train/test_resume.py"],
}
"""A file below ``src`` -> tests that are quick, and that must fail when it is wrong."""

EQUIVALENT: dict[str, dict[str, str]] = {
    "any file": {
        "dataclass(frozen=False)": "nothing assigns to its fields: mypy sees to that",
        ", strict=False)": "both are equally long there; the other would be an error of ours",
    },
    "budget.py": {
        "elements: int = ": "how much is looked at at a time is a matter of memory alone",
    },
    "match/apply.py": {
        "default=- 2)": "what has no inputs is used behind the first node at the earliest",
        "default=- 0)": "as above",
        "order[last] >= order[start]": "equal without inputs: behind the output is as good a place",
        "reverse=False": "prune() goes on with the inputs of what it has erased, in any order",
    },
    "match/matcher.py": {
        "depth: int = ": "one that has matched nothing is no near miss: note() asks for more nodes",
        "isinstance(a, torch.dtype)": "a dtype equals nothing but itself, so either test will do",
    },
}
"""A file below ``src`` -> what a surviving change reads -> why it changes nothing that matters."""
