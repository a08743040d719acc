from typing import Any

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from sdlora.report.html import Figure, Table, environment, epoch_name, one_in, render


def macro(name: str, *values: Any) -> str:
    return str(getattr(environment().get_template("parts.html").module, name)(*values))


def test_page_escapes_its_title_and_forbids_requests() -> None:
    found = render("page.html", title="<b>x")
    assert "<title>&lt;b&gt;x</title>" in found and "<h1>&lt;b&gt;x</h1>" in found
    assert "default-src 'none'; img-src data:" in found
    assert found.index("<style>") < found.index("<h1>") < found.index("<script>")
    assert "http://" not in found and "https://" not in found


def test_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("page.html")


def test_table_cells_are_escaped() -> None:
    found = macro("table", Table("<t>", ["a"], [["<1>"]]))
    assert "<th>a</th>" in found and "<td>&lt;1&gt;</td>" in found and 'aria-label="&lt;t&gt;"' in found


def test_figure_escapes_all_but_its_chart() -> None:
    found = macro("figure", Figure("<t>", Markup("<svg/>"), "a < b", {"alt": '"<x>', "class": None, "src": "data:,"}))
    assert "<h3>&lt;t&gt;</h3><svg/>" in found and "a &lt; b" in found
    assert '<img alt="&#34;&lt;x&gt;" src="data:,">' in found


def test_words_of_epochs_and_probabilities() -> None:
    assert (epoch_name(0), epoch_name(3)) == ("base", "epoch 3")
    assert (one_in(0.0027), one_in(1 / 145), one_in(0.9)) == ("About 1 in 370", "About 1 in 145", "Most")
