"""Foreign code: what would run it, and the caller's consent.

A recipe, a run's folder and a dataset may come from anybody, and what they bring is data: their
``trust_remote_code: true`` or ``builder`` runs nothing by itself. Only the caller can allow that,
on the command line (or as an argument of ``train``), and what is not allowed is refused by the name
of the switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CODE_SWITCH = "--trust-remote-code"
BUILDER_SWITCH = "--allow-builders"
FUNCTION_SWITCH = "--allow-code"
URL_SWITCH = "--allow-image-urls"


@dataclass(frozen=True)
class Consent:
    """The foreign code that the caller allows, and whether addresses in rows are asked.

    It is code of the model and its tokenizer, ``builder`` files of datasets, and Python functions
    that the recipe names, as rewards or to change rows.
    """

    trust_remote_code: bool = False
    allow_builders: bool = False
    allow_code: bool = False
    allow_image_urls: bool = False

    def switches(self) -> list[str]:
        """The switches of the command line that allow the same."""
        allowed = {
            CODE_SWITCH: self.trust_remote_code,
            BUILDER_SWITCH: self.allow_builders,
            FUNCTION_SWITCH: self.allow_code,
            URL_SWITCH: self.allow_image_urls,
        }
        return [switch for switch, yes in allowed.items() if yes]


def why_not_run(what: str, switch: str) -> str:
    """The refusal to run foreign code, with the switch that allows it."""
    return f"{what}; it is run only with your permission: pass {switch} if you trust it"


def code_refused(error: BaseException) -> str | None:
    """The message where transformers has refused to run code that comes with a model; else None."""
    if "trust_remote_code" not in str(error):
        return None
    return why_not_run("needs Python code that comes with it", CODE_SWITCH)


def must_build(builder: str | Path, path: str | Path) -> bool:
    """Whether ``path``, which ``builder`` makes, is missing or older than that."""
    target, maker = Path(path), Path(builder)
    return not target.exists() or target.stat().st_mtime < maker.stat().st_mtime


def refused_builder(builder: str | Path, path: str | Path) -> str:
    """The refusal to run a builder."""
    return why_not_run(f"{path} would be made by running {builder}", BUILDER_SWITCH)


def refused_function(name: str) -> str:
    """The refusal to run a function that a recipe names."""
    return why_not_run(f"{name} is Python code", FUNCTION_SWITCH)
