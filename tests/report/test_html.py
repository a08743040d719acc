from sdlora.report.html import epoch_name, figure, frame, table


def test_the_frame_escapes_its_title_and_forbids_requests() -> None:
    found = frame("<b>x", ["<p>one</p>", "<p>two</p>"])
    assert "<title>&lt;b&gt;x</title>" in found and "<h1>&lt;b&gt;x</h1>" in found
    assert "default-src 'none'; img-src data:" in found
    assert found.index("<p>one</p>") < found.index("<p>two</p>") < found.index("<script>")
    assert "http://" not in found and "https://" not in found


def test_tables_and_figures() -> None:
    assert "<tr><th>a</th></tr><tr><td>1</td></tr>" in table("t", ["a"], [["1"]])
    assert "&lt;t&gt;" in figure("<t>", "<svg/>", "a < b") and "a &lt; b" in figure("t", "<svg/>", "a < b")
    assert (epoch_name(0), epoch_name(3)) == ("base", "epoch 3")
