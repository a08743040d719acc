"""The page of promises is the one that the program makes, and every test that it names is there."""

from __future__ import annotations

from helpers.promises import PAGE, PROMISES, ROOT, page


def test_the_page_is_the_one_that_is_made() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_promise_names_its_test_or_says_why_there_is_none() -> None:
    for promise in PROMISES:
        if promise.test is None:
            assert promise.note, promise.name
            continue
        file, _, name = promise.test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8") if name else "def test_", promise
    assert len({promise.name for promise in PROMISES}) == len(PROMISES)
