"""How to use what a run left behind: commands and code to copy, for the report and the card."""

from __future__ import annotations

import json
import keyword
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..model.chat_prompt import ChatPrompt
from ..recipe.locate import locate

_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer"


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


def snippet(recipe: Mapping[str, Any], folder: str) -> str | None:
    """Python that loads the result and answers a question with nothing of ours.

    Args:
        recipe: of the run.
        folder: where its results are, or their id on the hub.

    Returns:
        The code; None for an adapter whose base model is in a package or a GGUF file that is not
        here.
    """
    base = str(recipe.get("base_model") or "")
    if not recipe.get("adapter"):
        imports, loading = _IMPORTS, "model = AutoModelForCausalLM.from_pretrained(folder)"
    elif not _is_special(base):
        name = "AutoPeftModelForCausalLM"
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
        loading = f"model = {name}.from_pretrained(folder)"
    else:
        found = _base(base)
        if found is None:
            return None
        imports, call = found
        loading = f"base = {call}\nmodel = PeftModel.from_pretrained(base, folder)"
    asking = ChatPrompt.of(recipe)
    asked = json.dumps(asking.question("Your question"), ensure_ascii=False)
    return f"""{imports}

folder = {json.dumps(folder, ensure_ascii=False)}
{loading}
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(
    {asked},
    add_generation_prompt=True, return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _is_special(base: str) -> bool:
    """Whether PEFT needs help to find a base model: it is in a package or a GGUF file."""
    folder = Path(base)
    unpacked = folder.is_dir() and not (folder / "config.json").exists()
    return base.startswith("package:") or base.endswith(".gguf") or unpacked


def _base(name: str) -> tuple[str, str] | None:
    """The imports and the call that load such a base model; None: it is not here."""
    try:
        source = locate(name, [Path.cwd()])
    except RecipeError:
        return None
    imports = f"from peft import PeftModel\n{_IMPORTS}"
    where = json.dumps(Path(source.name).name, ensure_ascii=False) + ",  # its folder"
    if name.startswith("package:"):
        imports = f"from importlib.util import find_spec\n\n{imports}"
        package, *inner = name.removeprefix("package:").split("/")
        below = "".join(f' + "/{part}"' for part in inner if not part.endswith(".gguf"))
        where = f"find_spec({package!r}).submodule_search_locations[0]{below},"
    file = f"\n    gguf_file={json.dumps(source.gguf_file)}," if source.gguf_file else ""
    return imports, f"AutoModelForCausalLM.from_pretrained(\n    {where}{file}\n)"


def _more(variables: Mapping[str, Any]) -> str:
    """Further arguments of a call, on a line of their own; empty when there are none."""
    if not variables:
        return ""
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in variables):
        return "\n    " + " ".join(f"{name}={value!r}," for name, value in variables.items())
    return f"\n    **{dict(variables)!r},"
