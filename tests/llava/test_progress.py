from __future__ import annotations

import logging

from llava.progress import progress_shown

LOG = logging.getLogger("llava.train.anything")


def test_progress_is_on_the_screen_of_entry_points_alone(capsys):
    LOG.info("unseen")
    with progress_shown():
        with progress_shown():  # an entry point that calls another
            LOG.info("step %d", 1)
        LOG.warning("odd")
        logging.getLogger("fed.server").info("round 1")
        logging.getLogger("elsewhere").info("not ours")
    LOG.info("unseen again")
    assert capsys.readouterr() == ("step 1\nround 1\n", "odd\n")


def test_a_user_s_own_logging_comes_back(capsys, caplog):
    logger = logging.getLogger("fed")
    logger.setLevel(logging.ERROR)
    try:
        with progress_shown():
            logger.info("shown")
        logger.error("logged")
        assert caplog.messages == ["logged"]
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(logging.NOTSET)
    assert capsys.readouterr().out == "shown\n"
