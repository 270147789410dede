"""Silence of other libraries: log records, warnings, and the tables of torch's compiler."""

import logging
import warnings

import pytest
import torch._inductor.config as inductor

from tqdit.speed.quiet import WITHOUT_TABLES, quiet


def test_nothing_is_said_inside_and_all_is_as_before_after(caplog: pytest.LogCaptureFixture) -> None:
    before = {name: getattr(inductor, name) for name in WITHOUT_TABLES}
    with warnings.catch_warnings(record=True) as caught, quiet():
        logging.getLogger("torch._inductor").error("a candidate failed")
        warnings.warn("a library is missing", stacklevel=1)
        assert {name: getattr(inductor, name) for name in WITHOUT_TABLES} == WITHOUT_TABLES
    assert not caught
    assert not caplog.records
    assert {name: getattr(inductor, name) for name in WITHOUT_TABLES} == before
    logging.getLogger("tqdit").error("what matters")
    assert [record.message for record in caplog.records] == ["what matters"]


def test_a_stricter_silence_stays() -> None:
    logging.disable(logging.CRITICAL)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_another_version_of_torch_may_lack_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WITHOUT_TABLES, "an_option_of_another_version", 1)
    with quiet():
        assert inductor.autotune_num_choices_displayed == 0
