"""What the site has beside the pages of docs/: README as its home, and the notebooks."""

from __future__ import annotations

import atexit
import json
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
    """Let mkdocstrings find the package, which lies in src/, by its name; before it is set up."""
    packages = Path(tempfile.mkdtemp(prefix="fusewright-site-"))
    atexit.register(shutil.rmtree, packages, ignore_errors=True)
    (packages / "fusewright").symlink_to(ROOT / "src")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(packages)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add README as the home page, and a page for each notebook."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=_outward(readme, "", config)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = _page(path, config)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Point links to files outside of docs/ at the repository, and those to notebooks at pages."""
    return _outward(
        re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown), r"\.\./", config
    )


def _outward(markdown: str, prefix: str, config: Any) -> str:
    def link(match: re.Match[str]) -> str:
        path = match[1].partition("#")[0]
        if not (ROOT / path).exists() or (not prefix and (ROOT / "docs" / path).exists()):
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{match[1]})"

    return re.sub(rf"\]\({prefix}([\w./#-]+)\)", link, markdown)


def _page(path: Path, config: Any) -> str:
    """The notebook as Markdown: its text, its code, and what the code printed."""
    name = f"docs/notebooks/{path.name}"
    colab = config.repo_url.replace(
        "https://github.com/", "https://colab.research.google.com/github/"
    )
    links = (
        f"[Open in Colab]({colab}/blob/main/{name}) · "
        f"[the file]({config.repo_url}/blob/main/{name})"
    )
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [_shown(output) for output in cell["outputs"]]
    return "\n\n".join([parts[0], links, *parts[1:]])


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return f"<div>{''.join(data['text/html'])}</div>"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```"
