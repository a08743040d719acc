"""docs/reliability.md is the page that its generator writes, and every test that it names exists."""

from __future__ import annotations

from helpers.promises import PAGE, PROMISES, ROOT, page


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_promise_names_a_test_that_exists() -> None:
    for promise in PROMISES:
        file, _, name = promise.test.partition("::")
        assert name, promise.name
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), promise.name
    assert len({promise.name for promise in PROMISES}) == len(PROMISES)
