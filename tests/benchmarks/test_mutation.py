"""What the mutation score is counted over: each change is one, compiles, and meets the tests that reach its line."""

from __future__ import annotations

from mutation import Mutant, chosen, mutants

TEXT = '''
def f(a: int | None = 3, *, é: bool = True) -> dict[str, 5]:
    """Adds 1 and 1."""
    assert a != 7
    return f"{a + 1}" if a is None or not é and 0 < a <= -2.5 else zip(a * [é], a, strict=True)
'''


def test_each_operator_comparison_number_and_truth_value_is_changed_once() -> None:
    found = mutants("f.py", TEXT)
    changed = {(TEXT.encode()[m.start : m.end].decode(), m.new) for m in found}
    assert changed == {
        ("3", "(4)"), ("True", "(False)"), ("a is None", "(a is not None)"), ("not é", "(é)"), ("0", "(1)"),
        ("a is None or not é and 0 < a <= -2.5", "(a is None and (not é and 0 < a <= -2.5))"), ("2.5", "(5.0)"),
        ("not é and 0 < a <= -2.5", "(not é or 0 < a <= -2.5)"), ("0 < a <= -2.5", "(0 <= a <= -2.5)"),
        ("0 < a <= -2.5", "(0 < a < -2.5)"), ("a * [é]", "(a / [é])"),
    }  # fmt: skip
    assert {m.line for m in found} == {2, 5}
    for one in found:
        compile(TEXT.encode()[: one.start] + one.new.encode() + TEXT.encode()[one.end :], "f.py", "exec")


def test_tests_that_reach_a_line_are_chosen_the_cheapest_first_within_the_budget() -> None:
    seconds = {"t.py::a": 3.0, "t.py::b": 1.0, "u.py::c": 2.0, "v.py::d": 99.0, "v.py::e": 0.1}
    lines = {"1": [], "2": ["t.py::a", "u.py"], "3": ["v.py::d"]}
    reach = {"lines": {"f.py": lines}, "seconds": seconds}
    assert chosen(Mutant("f.py", 2, 0, 1, "x"), reach) == ["u.py::c", "t.py::a"]
    assert chosen(Mutant("f.py", 3, 0, 1, "x"), reach) == ["v.py::d"], "one at least"
    for on_import in (Mutant("f.py", 1, 0, 1, "x"), Mutant("g.py", 1, 0, 1, "x")):
        assert chosen(on_import, reach) == ["v.py::e", "t.py::b", "u.py::c", "t.py::a"]
