"""Runs the notebooks of docs/notebooks, each in a new folder, as a reader would.

python -m tests.docs.notebooks [NAME ...]           # runs them
python -m tests.docs.notebooks [NAME ...] --write   # and stores what the cells print

What is stored belongs to the code that is there: it has the code's hash, which the tests compare.
Needs ``pip install -e ".[docs]"``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # the tests of what is stored need neither
    import nbclient
    import nbformat

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
HIDDEN = re.compile(
    rf"\x1b\[[0-9;?]*[A-Za-z]|^.*\r(?!\n)|{re.escape(tempfile.gettempdir())}/\w+/", re.M
)
"""Colours, lines that were written over, and the folder that a notebook has run in."""


def run(path: Path) -> Any:
    """The executed notebook.

    Raises:
        CellExecutionError: a cell has raised.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        return nbclient.NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": folder}}
        ).execute()


def code(notebook: Any) -> list[str]:
    """The source of each code cell."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def digest(notebook: Any) -> str:
    """A hash of the code."""
    return hashlib.sha256("\0".join(code(notebook)).encode()).hexdigest()[:16]


def _write(path: Path, notebook: Any) -> None:
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = readable(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "fusewright": {"code": digest(notebook)},
    }
    nbformat.write(notebook, path)


def readable(outputs: list[Any]) -> list[Any]:
    """What a reader wants to see: no warnings, no colours, and lines of text as one output."""
    shown: list[Any] = []
    for output in outputs:
        data = output.get("data", {})
        if "text/html" in data and not data["text/html"].startswith("<pre"):
            shown.append(output)  # a table of its own; Rich prints each line as <pre>
            continue
        text = output["text"] if output.output_type == "stream" else data.get("text/plain", "")
        if output.get("name") == "stderr" or not HIDDEN.sub("", text).strip():
            continue
        text = HIDDEN.sub("", text).rstrip() + "\n"
        if shown and shown[-1].output_type == "stream":
            shown[-1].text += text
        else:
            shown.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    return shown


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *(p.stem for p in NOTEBOOKS)])
    parser.add_argument("--write", action="store_true", help="store what the cells print")
    args = parser.parse_args()
    for path in NOTEBOOKS:
        if not args.names or path.stem in args.names:
            began = time.monotonic()
            notebook = run(path)
            print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)
            if args.write:
                _write(path, notebook)


if __name__ == "__main__":
    main()
