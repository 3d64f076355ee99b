"""`quiet` leaves transformers' settings as it found them."""

from __future__ import annotations

import threading

import pytest
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging

from llava.model.hf_logging import quiet


@pytest.fixture(autouse=True)
def settings():
    """Bars are on, and warnings are said."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def state() -> tuple:
    downloads = not are_progress_bars_disabled()
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), downloads


LOUD, QUIET = (logging.WARNING, True, True), (logging.ERROR, False, False)


def test_all_is_as_before_after_an_error_too():
    with quiet():
        assert state() == QUIET
        with quiet():
            assert state() == QUIET
        assert state() == QUIET
    assert state() == LOUD
    with pytest.raises(OSError, match="full"), quiet():
        raise OSError("full")
    assert state() == LOUD


@pytest.mark.parametrize("downloads", [True, False])
def test_what_was_off_stays_off(downloads):
    if downloads:
        logging.disable_progress_bar()
        enable_progress_bars()
    else:
        disable_progress_bars()
    before = state()
    assert before == (logging.WARNING, not downloads, downloads)
    with quiet():
        pass
    assert state() == before


def test_blocks_that_overlap_in_threads_are_quiet_until_the_last_ends():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        assert entered.wait(30)
    assert state() == QUIET
    leave.set()
    thread.join()
    assert state() == LOUD
