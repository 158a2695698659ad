"""Draw a picture of a terminal: ``python benchmarks/terminal.py docs/terminal.svg``.

It runs ``fusewright train examples/quickstart.yaml`` (4 to 8 minutes on 2 cores) and draws what the
command prints. Further words, such as ``--max_steps 5``, are passed to the command, and shown.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from fusewright.train.terminal import say

COMMAND = "fusewright train examples/quickstart.yaml"
WIDTH = 100


def picture(printed: str, command: str, width: int = WIDTH) -> str:
    """An SVG of a terminal in which ``command`` has printed something.

    Args:
        printed: its output.
        command: shown after the prompt.
        width: of the terminal, in columns.
    """
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    say(console, f"$ {command}\n{printed.rstrip()}")
    return console.export_svg(title="fusewright", unique_id="terminal")


def run(command: str) -> str:
    """What ``command`` prints in the root of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fusewright.cli", *command.split()[1:]]
        done = subprocess.run(
            [*words, "--output_dir", str(Path(folder, "quickstart"))],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout.replace(folder, "outputs")


if __name__ == "__main__":
    command = " ".join([COMMAND, *sys.argv[2:]])
    Path(sys.argv[1]).write_text(picture(run(command), command), encoding="utf-8")
