"""What other packages say for no reason stays off the terminal; all else is shown."""

from __future__ import annotations

import logging
import warnings

import pytest

from fusewright.train.model.load import quiet

HUB = logging.getLogger("huggingface_hub.utils._http")


def test_retries_of_the_hub_are_not_shown() -> None:
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    HUB.addHandler(handler)
    try:
        with quiet():
            HUB.warning("'[Errno -2]' thrown while requesting HEAD https://huggingface.co/a/b")
            HUB.warning("Retrying in 1s [Retry 1/5].")
            HUB.warning("You are not logged in")
        assert shown == ["You are not logged in"]
        HUB.warning("Retrying in 1s [Retry 1/5].")
        assert len(shown) == 2
    finally:
        HUB.removeHandler(handler)


def test_deepspeed_says_only_what_has_failed() -> None:
    """It sets its own level when it is imported, which is later."""
    logger = logging.getLogger("DeepSpeed")
    level, handlers = logger.level, list(logger.handlers)
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers = [handler]
    try:
        with quiet():
            logger.setLevel(logging.WARNING)
            logger.warning("Setting accelerator to CPU")
            logger.error("no compiler")
        assert shown == ["no compiler"]
        logger.warning("Setting accelerator to CPU")
        assert len(shown) == 2
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fan_in_fan_out is set to False but the target module is `Conv1D`. Setting", False),
        ("Could not find a config file in a/b - will assume that the vocabulary was not", False),
        ("Found missing adapter keys while loading the checkpoint", True),
    ],
)
def test_warnings_about_nothing_are_not_shown(text: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(text, UserWarning, stacklevel=1)
    assert bool(caught) is shown
