"The table of odd inputs: every kind is stored, nothing is wrong, and the tests that it counts are there."

import re
from collections import Counter

import cases
import kills
import pytest
from cases import FILES, RIGHT, ROOT, TESTS, expected, table

from lvlm_study.pruning.odd_inputs import odd_input_table


def test_nothing_is_wrong():
    stored = odd_input_table()
    assert set(stored.index) == set(TESTS)
    assert not stored.wrong.any() and (stored.right + stored.refused == stored.tried).all()
    assert stored.tried.min() >= 2 and stored.tried.sum() > 450


def test_every_test_that_is_counted_is_there():
    names = {name for f in FILES for name in re.findall(r'^def (test_\w+)', (ROOT / f).read_text(), re.M)}
    for starts in TESTS.values():
        for start in starts:
            assert any(name.startswith(start.partition('[')[0]) for name in names), start


def test_outcomes_are_sorted_by_kind():
    outcomes = [
        ('test_widths_on_disk_are_refused_as_in_memory[llama]', True),
        ('test_widths_on_disk_are_refused_as_in_memory[opt]', True),
        ('test_widths_on_disk_are_refused_as_in_memory[phi]', False),
        ('test_something_else', False),
    ]
    assert expected('test_something_else') is None
    assert expected(outcomes[0][0]) == ('widths that a config cannot say', RIGHT)
    counts = table(outcomes)
    assert counts['widths that a config cannot say'] == dict(tried=3, right=1, refused=1, wrong=1)
    assert sum(row['tried'] for row in counts.values()) == 3


def test_outcomes_of_a_failing_setup_are_wrong():
    plugin = cases.Collect()
    for when, passed in (('setup', True), ('call', True), ('teardown', False)):
        report = pytest.TestReport('t.py::test_x', ('t.py', 1, 'x'), {}, 'passed' if passed else 'failed', None, when)
        plugin.pytest_runtest_logreport(report)
    assert plugin.outcomes == {'test_x': False}


def test_a_few_kills():
    "Two of them here; `python tests/kills.py 50` makes more."
    counts = kills.kill_many(2, seed=1, log=str)
    assert 1 <= sum(counts.values()) <= 2 and {key[0] for key in counts} <= {'prune', 'recover'}
    assert Counter(key[3] for key in counts.elements()).keys() <= {'nothing', 'new', 'old', 'refused', 'part'}
