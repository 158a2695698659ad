"""Verdicts that pass through a store: who verifies, what counts as a verdict, and what fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from torch.distributed import HashStore

from fusewright.compiler.ranks import verdicts as module
from fusewright.compiler.ranks.verdicts import SharedVerdicts, entry_name, packages
from fusewright.report import Figures
from fusewright.rewrite.engine import Candidate, Verdict

from .test_site_key import candidates

INSTALLED = Verdict(None, Figures(error=1 / 3, grad_error=2e-7, saved_before=0.1))
REFUSED = Verdict("output 0: peak error 2 exceeds 1")


def _never() -> Verdict:
    raise AssertionError("verified here")


def _is(verdict: Verdict) -> Callable[[], Verdict]:
    return lambda: verdict


@pytest.mark.parametrize("verdict", [INSTALLED, REFUSED], ids=["installed", "refused"])
def test_the_second_rank_reads_what_the_first_one_found(verdict: Verdict) -> None:
    store = HashStore()
    assert SharedVerdicts().decide(store, 1, "key", _is(verdict)) == verdict
    assert SharedVerdicts().decide(store, 0, "key", _never) == verdict
    other = Verdict("another")
    assert SharedVerdicts().decide(store, 0, "another key", _is(other)) == other


def test_a_rank_waits_while_another_one_verifies() -> None:
    store, begun, times = HashStore(), threading.Event(), []

    def slow() -> Verdict:
        begun.set()
        time.sleep(0.2)
        times.append(time.monotonic())
        return INSTALLED

    owner = threading.Thread(target=SharedVerdicts().decide, args=(store, 0, "key", slow))
    owner.start()
    assert begun.wait(10)
    waiting = SharedVerdicts()
    assert waiting.decide(store, 1, "key", _never) == INSTALLED
    assert time.monotonic() >= times[0]
    assert waiting.silent == set()
    owner.join()


VALID = {"key": "key", "reason": None, "figures": dict.fromkeys(Figures.__dataclass_fields__)}
DAMAGED: dict[str, Any] = {
    "empty": "",
    "no JSON": '{"key": "key", "rea',
    "a list": "[1]",
    "no key": json.dumps({k: v for k, v in VALID.items() if k != "key"}),
    "of another site": json.dumps({**VALID, "key": "another"}),
    "no figures": json.dumps({**VALID, "figures": None}),
    "fewer figures": json.dumps({**VALID, "figures": {"error": 1.0}}),
    "more figures": json.dumps({**VALID, "figures": {**VALID["figures"], "more": 1.0}}),
    "text as a figure": json.dumps({**VALID, "figures": {**VALID["figures"], "error": "small"}}),
    "a reason that is no text": json.dumps({**VALID, "reason": 1}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_entry_is_replaced(text: str) -> None:
    store = HashStore()
    store.set(entry_name("key"), text)
    assert SharedVerdicts().decide(store, 1, "key", _is(REFUSED)) == REFUSED
    assert SharedVerdicts().decide(store, 2, "key", _never) == REFUSED


def test_the_entry_that_the_damaged_ones_are_made_of_is_valid() -> None:
    store = HashStore()
    store.set(entry_name("key"), json.dumps(VALID))
    assert SharedVerdicts().decide(store, 1, "key", _never) == Verdict()


def test_a_rank_that_says_nothing_is_waited_for_once() -> None:
    store, impatient = HashStore(), SharedVerdicts(patience=0.1)
    for key in ("one", "two", "three"):
        store.set(f"{entry_name(key)}-owner", "3")  # which has died since
    begun = time.monotonic()
    for key in ("one", "two", "three"):
        assert impatient.decide(store, 0, key, _is(INSTALLED)) == INSTALLED
    assert impatient.silent == {3}
    assert time.monotonic() - begun < 0.25
    # and the others need not wait for it
    assert SharedVerdicts().decide(store, 1, "two", _never) == INSTALLED


def test_a_rank_that_fails_is_not_waited_for() -> None:
    store = HashStore()

    def interrupted() -> Verdict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SharedVerdicts().decide(store, 0, "key", interrupted)
    begun = time.monotonic()
    assert SharedVerdicts().decide(store, 1, "key", _is(REFUSED)) == REFUSED
    assert time.monotonic() - begun < 5
    assert SharedVerdicts().decide(store, 2, "key", _never) == REFUSED


def test_ranks_that_have_both_verified_agree() -> None:
    store, impatient = HashStore(), SharedVerdicts(patience=0.0)

    def overtaken() -> Verdict:
        assert impatient.decide(store, 1, "key", _is(REFUSED)) == REFUSED
        return INSTALLED

    assert SharedVerdicts().decide(store, 0, "key", overtaken) == REFUSED


def test_a_rank_that_gives_up_leaves_the_place_to_one_that_does_not() -> None:
    store, impatient = HashStore(), SharedVerdicts(patience=0.0)

    def interrupted() -> Verdict:
        raise KeyboardInterrupt

    def meanwhile() -> Verdict:
        with pytest.raises(KeyboardInterrupt):
            impatient.decide(store, 1, "key", interrupted)
        return INSTALLED

    assert SharedVerdicts().decide(store, 0, "key", meanwhile) == INSTALLED
    assert SharedVerdicts().decide(store, 2, "key", _never) == INSTALLED


class _Gone:
    """A store whose process has ended."""

    def __init__(self) -> None:
        self.calls = 0

    def compare_set(self, *_: Any) -> bytes:
        self.calls += 1
        raise RuntimeError("Connection reset by peer")


def test_without_its_store_each_rank_verifies() -> None:
    store, shared = _Gone(), SharedVerdicts()
    for verdict in (INSTALLED, REFUSED):
        assert shared.decide(store, 0, "key", _is(verdict)) == verdict
    assert store.calls == 1


# --- verdicts of earlier processes ----------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept verdicts, empty."""
    monkeypatch.setattr(module, "kept_folder", lambda: tmp_path)
    return tmp_path


def _decided(
    candidate: Candidate, verify: Callable[[], Verdict], keeps: bool = True, traced: bool = False
) -> Verdict:
    """The verdict in a new process."""
    return SharedVerdicts(keeps=keeps)(candidate, traced, verify)


def test_a_rewrite_that_was_found_right_is_not_verified_again(kept: Path) -> None:
    (glu, *_), (norm, *_) = candidates("glu"), candidates("rms_norm")
    assert _decided(glu, _is(INSTALLED)) == INSTALLED
    assert _decided(candidates("glu")[0], _never) == INSTALLED
    assert len(list(kept.iterdir())) == 1
    with pytest.raises(AssertionError, match="verified here"):
        _decided(norm, _never)
    with pytest.raises(AssertionError, match="verified here"):
        _decided(glu, _never, traced=True)
    with pytest.raises(AssertionError, match="verified here"):
        _decided(glu, _never, keeps=False)


def test_a_refusal_is_not_kept(kept: Path) -> None:
    glu = candidates("glu")[0]
    assert _decided(glu, _is(REFUSED)) == REFUSED
    assert list(kept.iterdir()) == []
    assert _decided(glu, _is(INSTALLED)) == INSTALLED


@pytest.mark.parametrize("text", [*DAMAGED.values(), json.dumps({**VALID, "reason": "refused"})])
def test_a_damaged_file_is_not_believed(text: str, kept: Path) -> None:
    glu = candidates("glu")[0]
    _decided(glu, _is(INSTALLED))
    (file,) = kept.iterdir()
    file.write_text(text)
    assert _decided(glu, _is(Verdict())) == Verdict()
    assert json.loads(file.read_text())["key"].startswith("((")


def test_other_sources_are_verified(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glu = candidates("glu")[0]
    _decided(glu, _is(INSTALLED))
    monkeypatch.setattr(module, "environment", lambda: ("fusewright of tomorrow",))
    assert _decided(glu, _is(Verdict())) == Verdict()


def test_a_folder_that_cannot_be_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise PermissionError("others may write to it")

    monkeypatch.setattr(module, "kept_folder", refuse)
    assert _decided(candidates("glu")[0], _is(INSTALLED)) == INSTALLED


def test_code_that_is_no_installed_package_is_not_kept(kept: Path) -> None:
    glu = candidates("glu")[0]
    assert packages(glu) == "{}"

    class Mine(type(glu.rule)):  # type: ignore[misc]
        """A rule of a user's own, in a module that may change."""

    assert packages(replace(glu, rule=Mine())) is None
    _decided(replace(glu, rule=Mine()), _is(INSTALLED))
    assert list(kept.iterdir()) == []
    node = next(n for n in glu.interior if n.op == "call_function")
    node.target = hypothesis.given
    assert packages(glu) == f"{{'hypothesis': '{hypothesis.__version__}'}}"
    node.target = _is  # of these tests
    assert packages(glu) is None
