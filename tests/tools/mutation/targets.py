"""What is mutated, which tests must notice, and which changes mean nothing."""

from __future__ import annotations

TESTS: dict[str, list[str]] = {
    "rewrite/verify.py": [
        "tests/rewrite/test_verdicts.py",
        "tests/graph/test_modes.py",
        "tests/rewrite/test_smaller_weights.py::"
        "test_what_reads_the_result_is_not_lost_with_the_sizes",
        "tests/rewrite/test_smaller_weights.py::"
        "test_what_is_too_large_to_be_drawn_is_judged_by_a_small_size_alone",
        "tests/rewrite/test_verify.py",
        "tests/rewrite/test_verify_runs.py",
        "tests/rewrite/test_verify_compare.py",
        "tests/rewrite/test_wrong_values.py",
        "-knot small_sizes_fit and (not test_wrong_values or glu- or dtype or first_call or form)",
    ],
    "kernels/tolerance.py": ["tests/rewrite/test_tolerance.py"],
    "rewrite/sample_inputs.py": ["tests/rewrite/test_sample_inputs.py"],
    "rewrite/smaller_weights.py": [
        "tests/rewrite/test_smaller_formulas.py",
        "tests/rewrite/test_smaller_weights.py",
        "tests/rewrite/test_smaller_experts.py",
    ],
    "rewrite/engine.py": ["tests/rewrite/test_engine.py"],
    "rewrite/conditions.py": ["tests/rewrite/test_conditions.py"],
    "rewrite/matcher.py": [
        "tests/rewrite/test_matcher.py",
        "tests/passes/test_rms_norm.py",
        "tests/passes/test_rope.py",
    ],
    "graph/effects.py": [
        "tests/graph/test_effects.py",
        "tests/graph/test_edit.py",
        "tests/graph/test_inputs_of_outputs.py",
    ],
    "graph/canon.py": ["tests/graph/test_views.py", "tests/graph/test_canon.py"],
    "graph/facts.py": ["tests/graph/test_facts.py"],
    "graph/cleanup.py": ["tests/graph/test_edit.py"],
    "memory/planner.py": ["tests/memory/test_planner.py", "tests/memory/test_plan_history.py"],
    "train/data/packing.py": ["tests/train/data/test_packing.py", "-knot million"],
    "train/data/chat/mask.py": [
        "tests/train/data/test_mask.py",
        "tests/train/data/test_chat.py",
        "tests/train/data/test_formats.py",
        "-knot found_and_marked",
    ],
    "train/checkpoint/resume.py": [
        "tests/train/checkpoint/test_resume_record.py",
        "tests/train/checkpoint/test_resume.py::test_a_stream_needs_as_many_workers",
    ],
}
"""A file below ``src`` -> tests that are quick, and that must fail when it is wrong."""

EQUIVALENT: dict[str, dict[str, str]] = {
    "any file": {
        "dataclass(frozen=False)": "nothing assigns to its fields: mypy sees to that",
        ", strict=False)": "both are equally long there; the other would be an error of ours",
    },
    "kernels/tolerance.py": {
        "elements: int = ": "how much is looked at at a time is a matter of memory alone",
    },
    "rewrite/verify.py": {
        "c.interior[ -1].graph": "all its nodes are in one graph",
        "c.interior[- 0]": "all its nodes are in one mode: rewrite/conditions.py",
        "worst[kind] or -1.0": "no error is below 0",
        "_NOISE = 1.5": "where it is nothing but rounding, it is off by many times itself",
        "_figures(ours[ -1]": "both are forms of one op; the figures of either will do",
        "            continue": "the conditions of _verdict and _tried stay as they are",
        "runs(site.exact, wide, site.setting(True, ": "what is found is not looked at",
        "if not torch.cuda.is_available()": "without a GPU there are no devices either way",
        "largest.log2().floor(), 1)": "of a draw of zeros, any scale will do",
        "largest.log2().floor(), -1)": "as above",
        "if a is None and b is None:": "_effects has seen that both have it, or neither",
        "torch.isfinite(eager) * ": "of truth values, the product is the conjunction",
        "upstream: float = ": "another size of what comes from behind; it is always given",
        "outcomes[ -1]": "there is one",
        "torch.empty( 1": "its memory is replaced",
        "manual_seed(seed ": "any seed",
        "_odd(-u) for u in upstream], True)": "nothing runs backward after it",
        "storage.nbytes() * a": "a larger one is as good",
        "t.dim() <= 0": "no tensor has fewer",
        "t.dim() == -1": "transposing what has no dimensions changes nothing",
        "torch.stack([t, t], 1)[:, ": "both columns are the same",
        "o.mul_( ": "all that is compared was taken before",
        "a.itemsize == ": "torch 2.13 compares one-byte floats; older versions do not",
    },
    "rewrite/sample_inputs.py": {
        "_SIZES = (": "other small sizes: tests say what kinds there must be",
        'Regime("far below zero", ': "other numbers of the kind",
        'Regime("near zero", ': "as above",
        "manual_seed( ": "any seed that no other input has",
        "manual_seed(1000 * draw + i + ": "as above",
        "upstream=2.0**- ": "as above",
        "_PEAK = ": "another number of the kind: tests allow a fifth more or less",
        "_LARGE = 1": "as above",
        "default= ": "it is never below _LARGE",
        "return ( ": "some draws more or less",
        "return (16, 6": "as above",
        "else ( 17,)": "as above",
        "else ( 15,)": "as above",
        "torch.finfo(dtype).max / ": "as far from overflow, or nearly",
    },
    "rewrite/smaller_weights.py": {
        "t.dim() > -1": "a number is not large",
        "c.interior[ -1].graph": "all its nodes are in one graph",
    },
    "graph/effects.py": {
        'node.op > "call_function"': "no op comes before it in the alphabet",
        "> False": "of two truth values, only True is greater",
        "grad = node.args[ -1]": "there is one",
        "node.args[: 2] == entered[-1:]": "as above",
    },
    "memory/planner.py": {
        "level in self.allowed else ": "a plan has no others",
        "most_common(1)[ -1]": "there is one",
        "most_common( 2)": "the first of them is taken",
        "setting.allowed[ ": "there is a level from then on",
        "_rows: int = ": "begin() says how many tokens there are before a plan is made",
        "self.trainable()[: ": "some parameters will do",
        "p.numel() // 6": "some numbers of each will do",
        "self._first() == module": "modules are equal by identity",
    },
    "graph/cleanup.py": {
        "queue.pop( -1)": "what is still used comes again when its user is erased",
    },
    "graph/canon.py": {
        "if operation is None or isinstance(target, torch._ops": "no target is in two tables",
        "_from_end(tensors[ ": "all of them have as many dimensions",
        "Canon & None]]": "a type",
    },
    "train/data/chat/mask.py": {
        "turn.content and bare else - 2": "below 0 either way",
        "trained == True": "a list equals no truth value",
        "turn.end <= len(text)": "no token begins behind the text",
    },
    "train/checkpoint/resume.py": {"content}, indent=": "how far lines are set in"},
    "graph/facts.py": {"in paths[ 0:]": "a path and itself have all in common"},
    "train/data/packing.py": {
        "if not TYPE_CHECKING": "torch is only imported sooner",
        "max( 2, sizes.size)": "no sample is beyond the last",
        "manual_seed( ": "any tokens will do",
        "first, second = ": "any lengths will do",
        "ids[0, :first] + 2)": "any other token will do",
        "ids[0, :first] - 1)": "as above",
        "(ids[ 1, :first] + 1)": "as above",
        "+ 1) // vocab_size": "as above",
    },
    "rewrite/engine.py": {
        "default=- 2)": "what has no inputs is used behind the first node at the earliest",
        "default=- 0)": "as above",
        "order[last] >= order[start]": "equal without inputs: behind the output is as good a place",
        "reverse=False": "prune() goes on with the inputs of what it has erased, in any order",
    },
    "rewrite/matcher.py": {
        "depth: int = ": "one that has matched nothing is no near miss: note() asks for more nodes",
        "isinstance(a, torch.dtype)": "a dtype equals nothing but itself, so either test will do",
    },
}
"""A file below ``src`` -> what a surviving change reads -> why it changes nothing that matters."""
