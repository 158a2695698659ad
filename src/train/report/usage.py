"""How to use what a run left behind: commands and code to copy, for the report and the card."""

from __future__ import annotations

import json
import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..model.chat_prompt import ChatPrompt
from ..recipe.locate import ModelSource, locate
from ..recipe.preferences import HEADS, LANGUAGE_HEAD, Head

_LANGUAGE = """\
fusewright generate . "Your question"  # one answer
fusewright chat .                      # a conversation
"""
_ALL = """\
fusewright eval .                      # loss on the validation rows
fusewright merge .                     # one model without adapters"""


def commands(recipe: Mapping[str, Any]) -> str:
    """Shell commands for the results in the current folder.

    Args:
        recipe: of the run.
    """
    return _ALL if _head(recipe).classifies else _LANGUAGE + _ALL


def _head(recipe: Mapping[str, Any]) -> Head:
    trained = (head for head in HEADS.values() if head.key and recipe.get(head.key))
    return next(trained, LANGUAGE_HEAD)


def snippet(recipe: Mapping[str, Any], folder: str) -> str | None:
    """Python that loads the result and uses it with nothing of ours.

    A language model answers a question; a reward model judges an answer.

    Args:
        recipe: of the run.
        folder: where its results are, or their id on the hub.

    Returns:
        The code; None for an adapter whose base model is not here.
    """
    base = str(recipe.get("base_model") or "")
    head = _head(recipe)
    labels = f", num_labels={head.labels}" if head.labels else ""
    plain = f"from transformers import {head.auto}, AutoTokenizer"
    imports, loading = plain, f"model = {head.auto}.from_pretrained(folder)"
    if recipe.get("adapter"):
        try:
            source = locate(base, [Path.cwd()])
        except RecipeError:
            return None
        name = head.auto.replace("AutoModel", "AutoPeftModel")
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
        loading = f"model = {name}.from_pretrained(folder{labels})"
        if source.gguf_file or base.startswith("package:"):
            find = "from importlib.util import find_spec\n\n" * base.startswith("package:")
            imports = f"{find}from peft import PeftModel\n{plain}"
            call = _load_base(base, source, head)
            loading = f"base = {call}\nmodel = PeftModel.from_pretrained(base, folder)"
    loaded = f"""{imports}

folder = {json.dumps(folder, ensure_ascii=False)}
{loading}
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
    return loaded + (_judging(recipe) if head.classifies else _answering(recipe))


def _judging(recipe: Mapping[str, Any]) -> str:
    asking = ChatPrompt.of(recipe)
    answer = {"role": "assistant", "content": "An answer"}
    asked = json.dumps([*asking.question("Your question"), answer], ensure_ascii=False)
    return f"""inputs = tokenizer.apply_chat_template(
    {asked},
    return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
print(model(**inputs).logits)"""


def _answering(recipe: Mapping[str, Any]) -> str:
    asking = ChatPrompt.of(recipe)
    asked = json.dumps(asking.question("Your question"), ensure_ascii=False)
    return f"""inputs = tokenizer.apply_chat_template(
    {asked},
    add_generation_prompt=True, return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _load_base(base: str, source: ModelSource, head: Head) -> str:
    """The call that loads a base model which only ``locate`` can find."""
    where = json.dumps(Path(source.name).name, ensure_ascii=False) + ",  # its folder"
    if base.startswith("package:"):
        package, *inner = base.removeprefix("package:").split("/")
        below = "".join(f' + "/{part}"' for part in inner if not part.endswith(".gguf"))
        where = f"find_spec({package!r}).submodule_search_locations[0]{below},"
    file = f"\n    gguf_file={json.dumps(source.gguf_file)}," if source.gguf_file else ""
    labels = f"\n    num_labels={head.labels}," if head.labels else ""
    return f"{head.auto}.from_pretrained(\n    {where}{file}{labels}\n)"


def _more(variables: Mapping[str, Any]) -> str:
    """Further arguments of a call, on a line of their own; empty when there are none."""
    if not variables:
        return ""
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in variables):
        return "\n    " + " ".join(f"{name}={value!r}," for name, value in variables.items())
    return f"\n    **{dict(variables)!r},"
