"""Runs the notebooks of docs/notebooks, each in a new folder, as a reader would.

python -m tests.docs.notebooks [NAME ...]           # runs them
python -m tests.docs.notebooks [NAME ...] --write   # and stores what the cells print

What is stored belongs to the code that is there: it has the code's hash, which the tests compare.
Needs ``pip install -e ".[docs]"``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROGRESS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|^.*\r(?!\n)", re.M)
"""Colours, and lines that were written over."""


def run(path: Path) -> Any:
    """The executed notebook.

    Raises:
        CellExecutionError: a cell has raised.
    """
    import nbclient
    import nbformat

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
    import nbformat

    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [out for out in map(_readable, cell.outputs) if out]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "fusewright": {"code": digest(notebook)},
    }
    nbformat.write(notebook, path)


def _readable(output: Any) -> Any:
    """The output without colours and progress, or None if nothing is left."""
    if output.output_type == "stream":
        output.text = PROGRESS.sub("", output.text)
        return output if output.name == "stdout" and output.text.strip() else None
    data = output.get("data", {})
    if "text/plain" in data:
        data["text/plain"] = PROGRESS.sub("", data["text/plain"])
    return output


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
