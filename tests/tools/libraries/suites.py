"""PEFT's and transformers' own tests, plain and with every model optimized.

    python tests/tools/libraries/suites.py --work DIR [--codegen eager] [--library peft] [-k WHICH]

The tests come from the source distributions on PyPI of the installed versions. That of transformers
has its common model tests only, which ``architectures.py`` applies to some architectures; with
``--transformers DIR``, a clone of its repository at the same version, its own files are run. A test
fails newly if it passes plain and does not pass with the models optimized.

Blocks that are given a cache run as they were, and without labels a model makes itself one. So that
the tests try what was rewritten, models are built with ``use_cache=False``, in the plain run, too;
``--cache`` leaves them as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from xml.etree import ElementTree

HERE = pathlib.Path(__file__).parent
PART = (
    "outputs_equivalence or training or gradient_checkpointing or save_load or retain_grad or "
    "hidden_states or attention_outputs or require_grads or determinism or tied or resize or "
    "inputs_embeds or loss or batching"
)
"""What is run of each architecture but Llama, of which everything is."""

ARCHITECTURES = (
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "cohere", "granite",
    "stablelm", "starcoder2", "gpt_neox", "opt", "gpt2", "mixtral", "qwen2_moe", "mamba",
)  # fmt: skip
_ADAPTERS = (
    "target_parameters", "tuners_utils", "low_level_api", "mixed", "lora_variants", "bdlora",
    "velora", "vera", "pvera", "vblora", "randlora", "unilora", "shira", "osf", "deft", "boft",
    "frod", "supertuning", "poly", "xlora",
)  # fmt: skip
"""PEFT's files on types of adapters, as far as stand-ins can be made for what they load."""
_MISSING = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}
"""Mixins that the common tests import, and that the source distribution lacks."""

_WORSE = ("skipped", "passed", "failed")
_IMPORTED = ("parameterized", "diffusers")


@dataclass(frozen=True)
class Suite:
    """Tests to run: files or folders in ``root``, and which of their tests."""

    name: str
    root: pathlib.Path
    paths: tuple[str, ...]
    select: str = ""


def main() -> int:
    """Run what was asked for, and print a table. Returns 1 if a test fails newly."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    newly = passed = 0
    for suite in _suites(options):
        plain = _run(suite, options, None)
        if not plain:
            continue  # -k selects none of its tests
        ours = _run(suite, options, options.codegen)
        newly += _print(suite, plain, ours, options)
        passed += sum(r == "passed" for r in plain.values())
    if not passed:
        sys.exit("no test was selected, or none passed plain: see the logs")
    return 1 if newly else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for everything")
    parser.add_argument("--library", choices=("peft", "transformers"), help="only this one")
    parser.add_argument("--codegen", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--cache", action="store_true", help="models fill a cache by default")
    parser.add_argument("--transformers", type=pathlib.Path, help="clone of its repository")
    parser.add_argument("-k", dest="select", default="", help="pytest's, for all suites")
    parser.add_argument("-n", dest="processes", default="0", help="pytest-xdist's")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def _suites(options: argparse.Namespace) -> list[Suite]:
    suites = []
    if options.library != "transformers":
        root = _source("peft", options.work)
        (root / "tests" / "__init__.py").touch()  # its tests import each other
        suites.append(Suite("peft decoders", root, ("tests/test_decoder_models.py",)))
        files = tuple(f"tests/test_{name}.py" for name in _ADAPTERS)
        suites.append(Suite("peft adapters", root, files))
        suites.append(Suite("peft custom", root, ("tests/test_custom_models.py",)))
    if options.library != "peft":
        if options.transformers is not None:
            root = options.transformers.resolve()
            files = [f"tests/models/{a}/test_modeling_{a}.py" for a in ARCHITECTURES]
            suites.append(Suite("llama", root, ("tests/models/llama/test_modeling_llama.py",)))
            suites.append(Suite("architectures", root, tuple(files), PART))
        else:
            root = _source("transformers", options.work)
            _stage(root / "tests")
            path = ("tests/test_architectures.py",)
            suites.append(Suite("llama", root, path, "LlamaTest"))
            suites.append(Suite("architectures", root, path, f"not LlamaTest and ({PART})"))
    return suites


def _source(package: str, work: pathlib.Path) -> pathlib.Path:
    """The unpacked source distribution of the installed version."""
    version = importlib.metadata.version(package)
    root = work / f"{package}-{version}"
    if not root.exists():
        command = ["pip", "download", "--no-binary", ":all:", "--no-deps", "-d", str(work)]
        subprocess.run([sys.executable, "-m", *command, f"{package}=={version}"], check=True)
        with tarfile.open(work / f"{root.name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return root


def _packages(work: pathlib.Path) -> pathlib.Path:
    """A folder with what the suites import beside what this project does."""
    folder = work / "packages"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
        subprocess.run([*command, "--no-deps", *_IMPORTED], check=True)
    return folder


def _stage(tests: pathlib.Path) -> None:
    """Complete transformers' tests, so that its common ones can be imported and applied."""
    (tests / "__init__.py").touch()
    for path, mixin in _MISSING.items():
        file = tests / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {mixin}:\n    pass\n")
    shutil.copy(HERE / "architectures.py", tests / "test_architectures.py")


def _log(suite: Suite, options: argparse.Namespace, codegen: str | None) -> pathlib.Path:
    return options.work / f"{suite.name.replace(' ', '-')}-{codegen or 'plain'}.log"


def _run(suite: Suite, options: argparse.Namespace, codegen: str | None) -> dict[str, str]:
    """Each test's result, by its name."""
    log = _log(suite, options, codegen)
    results = log.with_suffix(".xml")
    results.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "suites_plugin", "-p",
        "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=", "--tb=short",
        "-n", options.processes, f"--junitxml={results}",
        "--stand-ins", str(options.work / "models"), *suite.paths,
    ]  # fmt: skip
    chosen = [f"({part})" for part in (suite.select, options.select) if part]
    command += ["-k", " and ".join(chosen)] if chosen else []
    command += ["--optimize", codegen] if codegen is not None else []
    command += [] if options.cache else ["--without-cache"]
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, [str(HERE), str(_packages(options.work)), before]))
    with log.open("w") as output:
        subprocess.run(
            command, cwd=suite.root, stdout=output, stderr=output, check=False,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    if not results.exists():
        sys.exit(f"pytest could not run {suite.name}: see {log}")
    return _read(results)


def _read(results: pathlib.Path) -> dict[str, str]:
    """Each test's result; that of a test with subtests is the worst of theirs."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        tags = {child.tag for child in case}
        bad = tags & {"failure", "error"}
        outcome = "failed" if bad else "skipped" if "skipped" in tags else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = max(outcome, found.get(name, outcome), key=_WORSE.index)
    return found


def _print(
    suite: Suite, plain: dict[str, str], ours: dict[str, str], options: argparse.Namespace
) -> int:
    before, after = Counter(plain.values()), Counter(ours.values())
    newly = [t for t, r in plain.items() if r == "passed" and ours.get(t) != "passed"]
    print(f"{suite.name}: {before['passed']} passed plain ({before['failed']} failed, ", end="")
    print(f"{before['skipped']} skipped), {after['passed']} optimized; newly failing: {len(newly)}")
    print(*re.findall("fusewright optimized.*", _log(suite, options, options.codegen).read_text()))
    for test in newly:
        print(f"    {test}")
    return len(newly)


if __name__ == "__main__":
    sys.exit(main())
