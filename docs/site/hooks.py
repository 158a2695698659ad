"""What the site needs beside the pages of docs/: README as its home, and links out of docs/."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]


@event_priority(100)
def on_config(config: Any) -> Any:
    """Let mkdocstrings find the package, which lies in src/, by its name; before mkdocstrings reads its options."""
    packages = Path(tempfile.mkdtemp(prefix="fusewright-site-"))
    atexit.register(shutil.rmtree, packages, ignore_errors=True)
    (packages / "fusewright").symlink_to(ROOT / "src")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(packages)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add README as the home page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=_outward(readme, "", config)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Point links to files outside of docs/ at the repository."""
    return _outward(markdown, r"\.\./", config)


def _outward(markdown: str, prefix: str, config: Any) -> str:
    def link(match: re.Match[str]) -> str:
        path = match[1].partition("#")[0]
        if not (ROOT / path).exists() or (not prefix and (ROOT / "docs" / path).exists()):
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{match[1]})"

    return re.sub(rf"\]\({prefix}([\w./#-]+)\)", link, markdown)
