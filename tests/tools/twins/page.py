"""The page ``docs/axolotl.md``, and README's claim: written from what is in ``outcomes.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .run import LENGTH, OVERRIDES, STEPS, Outcome

OUTCOMES = Path(__file__).parent / "outcomes.json"
PAGE = Path(__file__).parents[3] / "docs" / "axolotl.md"
README = PAGE.parents[1] / "README.md"

_CLAIM = "{accepted} of Axolotl's {all} examples are accepted, {ran} ran on"

_HEAD = """\
# Axolotl's examples

What becomes of Axolotl's own example recipes: all that name a `base_model`, of
[axolotl-ai-cloud/axolotl](https://github.com/axolotl-ai-cloud/axolotl) at {commit}. Written by
`python -m tests.tools.twins AXOLOTL/examples --write` ({versions}).

{totals}

*Accepted*: the recipe is taken as it is, before anything is loaded. Recipes with a `processor_type`
are those with images or sound, all others text recipes; all but those in `examples/archived` are
current.

*Ran*: on a **tiny twin** of its checkpoint, on a CPU. That is a model of the same `model_type` with
a few small layers and random weights in bfloat16, with a small tokenizer and rows of the dataset's
format. It is loaded, the rows are prepared (and packed, where the recipe says so), it is trained
for {steps} steps, and saved. transformers and PEFT alone load what was saved. An adapter is merged
by `fusewright merge`; the merged model, loaded by transformers alone, has the logits of the adapted
one to 1e-4, and the adapter changes them at least ten times as much as the two differ. A whole
model has the logits that it had in memory. Parts that read no text are in the result bit for bit.
The twin of a recipe with images has its family's own processor and rows in the format of its
dataset: images in a column of a Parquet file beside parts of text
(HuggingFaceH4/llava-instruct-mix-vsft), or in the parts (Nanobit's, as Axolotl's page on several
media has them: not seen); its logits are those of a question with an image.
A twin says nothing about speed, memory, GPUs, or several processes.

What is different from the recipe, and nothing else:

{overrides}

The words in bold stand in the table where they apply. A type with a question mark is a likely one:
the checkpoint's configuration has not been seen. Weights that are stored in MXFP4, NVFP4 or GPTQ
are plain in a twin.
"""


def read_outcomes() -> tuple[dict[str, str], list[Outcome]]:
    """What the outcomes are of (``commit``, ``versions``), and the outcomes by name."""
    stored = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return stored["of"], [Outcome(recipe=name, **o) for name, o in stored["recipes"].items()]


def write_outcomes(of: dict[str, str], outcomes: Iterable[Outcome]) -> None:
    """Store outcomes without what differs from run to run."""
    recipes: dict[str, Any] = {}
    for o in sorted(outcomes, key=lambda o: o.recipe):
        values = {key: value for key, value in vars(o).items() if key != "figures"}
        recipes[values.pop("recipe")] = values
    text = json.dumps({"of": of, "recipes": recipes}, indent=1, sort_keys=True)
    OUTCOMES.write_text(text + "\n", encoding="utf-8")


def page(of: dict[str, str], outcomes: list[Outcome]) -> str:
    """The text of the page."""
    refused = [o for o in outcomes if not o.accepted]
    ended = [o for o in outcomes if o.accepted and not o.ran]
    ran = [o for o in outcomes if o.ran]
    head = _HEAD.format(
        **of, totals=_totals(outcomes), steps=STEPS, length=LENGTH,
        overrides="\n".join(f"- {override.text}" for override in OVERRIDES),
    )  # fmt: skip
    parts = [
        head,
        f"## Ran: {len(ran)}\n",
        _table("recipe | twin | different", [[f"`{o.recipe}`", o.kind, _others(o)] for o in ran]),
        f"\n## Accepted, and did not run: {len(ended)}\n",
        _table("recipe | twin | why", [[f"`{o.recipe}`", o.kind, _short(o)] for o in ended]),
        f"\n## Not accepted: {len(refused)}\n",
        _table("recipe | why", [[f"`{o.recipe}`", _short(o)] for o in refused]),
    ]
    return "\n".join(parts) + "\n"


def write_pages() -> None:
    """Write the page anew, and the claim in README."""
    of, outcomes = read_outcomes()
    PAGE.write_text(page(of, outcomes), encoding="utf-8")
    pattern = re.sub(r"\\{\w+\\}", r"\\d+", re.escape(_CLAIM))
    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(pattern, claim(outcomes), text), encoding="utf-8")


def claim(outcomes: list[Outcome]) -> str:
    """How many recipes were accepted, and ran, in README's words."""
    accepted, ran = sum(o.accepted for o in outcomes), sum(o.ran for o in outcomes)
    return _CLAIM.format(accepted=accepted, all=len(outcomes), ran=ran)


def _totals(outcomes: list[Outcome]) -> str:
    groups = {
        "all": outcomes,
        "current": [o for o in outcomes if o.current],
        "current text recipes": [o for o in outcomes if o.current and o.text],
        "recipes with images or sound": [o for o in outcomes if not o.text],
    }
    rows = [[name, len(group), sum(o.accepted for o in group), sum(o.ran for o in group)]
            for name, group in groups.items()]  # fmt: skip
    return _table(" | recipes | accepted | ran", rows)


def _table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell).strip() for cell in row) + " |" for row in lines)


def _others(outcome: Outcome) -> str:
    return ", ".join(outcome.overrides)


_MOST = 220


def _short(outcome: Outcome) -> str:
    why = outcome.why.replace("|", "\\|")
    if outcome.accepted and outcome.stage not in ("twin", "train"):
        why = f"{outcome.stage}: {why}"
    return why if len(why) <= _MOST else why[:_MOST].rsplit(" ", 1)[0] + " ..."
