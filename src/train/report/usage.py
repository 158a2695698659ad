"""How to use what a run left behind: commands and code to copy, for the report and the card."""

from __future__ import annotations

import json
import keyword
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.chat_prompt import ChatPrompt


def commands(folder: str) -> str:
    """Shell commands for the results in ``folder``."""
    quoted = shlex.quote(folder)
    rows = (
        (f'fusewright generate {quoted} "Your question"', "one answer"),
        (f"fusewright chat {quoted}", "a conversation"),
        (f"fusewright eval {quoted}", "loss on the validation rows"),
        (f"fusewright merge {quoted}", "one model without adapters"),
    )
    width = max(len(command) for command, _ in rows)
    return "\n".join(f"{command:{width}}  # {meaning}" for command, meaning in rows)


def plain(recipe: Mapping[str, Any]) -> bool:
    """Whether plain transformers and PEFT can load the result without help.

    They cannot load an adapter whose base model only we can find: one that an installed package
    ships, or a GGUF file.
    """
    base = str(recipe.get("base_model") or "")
    packed = base.startswith("package:") or base.endswith(".gguf")
    return not (recipe.get("adapter") and (packed or _holds_gguf(base)))


def _holds_gguf(base: str) -> bool:
    folder = Path(base)
    return folder.is_dir() and not (folder / "config.json").exists()


def snippet(recipe: Mapping[str, Any], folder: str) -> str:
    """Python that loads the result and answers a question with nothing of ours.

    Args:
        recipe: of the run.
        folder: where its results are, or their id on the hub.
    """
    package, name = (
        ("peft", "AutoPeftModelForCausalLM")
        if recipe.get("adapter")
        else ("transformers", "AutoModelForCausalLM")
    )
    imports = (
        f"from {package} import {name}\nfrom transformers import AutoTokenizer"
        if package == "peft"
        else f"from {package} import {name}, AutoTokenizer"
    )
    asking = ChatPrompt.of(recipe)
    asked = json.dumps(asking.question("Your question"), ensure_ascii=False)
    return f"""{imports}

folder = {json.dumps(folder, ensure_ascii=False)}
model = {name}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(
    {asked},
    add_generation_prompt=True, return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _more(variables: Mapping[str, Any]) -> str:
    """Further arguments of a call, on a line of their own; empty when there are none."""
    if not variables:
        return ""
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in variables):
        return "\n    " + " ".join(f"{name}={value!r}," for name, value in variables.items())
    return f"\n    **{dict(variables)!r},"
