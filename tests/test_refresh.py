"Refreshing a notebook stores what one clean run gives, and nothing of a run that failed."

import json, subprocess, sys
import pytest
from refresh import near
from test_guards import cell, md, shown, write
from guards import ROOT

CELLS = [
    cell('#| default_exp x'),
    md('# X'),
    cell('import pandas as pd\nimport matplotlib.pyplot as plt\nfrom ipywidgets import interactive'),
    cell('pd.DataFrame(dict(a=[.5]))'),
    cell('ax = plt.subplots(figsize=(1,1))[1]'),
    cell('class M:\n    def _repr_markdown_(self): return "**m**"\nM()'),
    cell(
        'def f(r):\n    print(r)\n    plt.subplots()\n    return 2*r\n'
        'w = interactive(f, r=(0., 1.))\nw.children[0].value = .4\nassert w.result==.8\nw'
    ),
    cell('#| slow\n"slow"', outputs=shown('kept')),
    cell('#| eval: false\n1/0', outputs=shown('kept')),
    cell('y = 1', outputs=shown('stale')),
    cell('print("y")'),
]


def refresh(path, *opts):
    return subprocess.run(
        [sys.executable, ROOT / 'tests' / 'refresh.py', '--here', path, *opts], capture_output=True, text=True
    )


def outputs(path):
    return [c.get('outputs', []) for c in json.loads(path.read_text())['cells']]


@pytest.fixture
def nb(tmp_path):
    def make(cells):
        return write(tmp_path / '00_x.ipynb', cells, tmp_path).path

    return make


def test_outputs_are_stored(nb):
    path = nb(CELLS)
    res = refresh(path)
    assert res.returncode == 0, res.stderr
    frame, fig, markdown, widget, slow, never, nothing, printed = outputs(path)[3:]
    assert 'text/html' in frame[0]['data'] and frame[0]['execution_count'] is None
    assert 'image/png' in fig[0]['data']
    assert markdown[0]['data']['text/markdown'] == ['**m**']
    assert widget == nothing == []
    assert slow == never == shown('kept')
    assert printed[0]['text'] == ['y\n']
    assert refresh(path, '--check').returncode == 0
    assert refresh(path, '--slow').returncode == 0 and outputs(path)[7][0]['data']['text/plain'] == ["'slow'"]


@pytest.mark.parametrize(
    'source, says',
    [
        ('1/0', 'ZeroDivisionError'),
        ('y ==', 'SyntaxError'),
        ('def g(r): return 1/0\nw = interactive(g, r=(0., 1.))', 'ZeroDivisionError'),
    ],
)
def test_a_failing_cell_changes_nothing(nb, source, says):
    path = nb(CELLS[:4] + [cell(source)])
    before = path.read_bytes()
    res = refresh(path)
    assert res.returncode != 0 and says in res.stderr and path.read_bytes() == before


def test_stale_outputs_are_seen(nb):
    path = nb(
        [cell('1+1', outputs=shown('3')), cell('2+2', outputs=shown('4')), cell('#| varies\n3', outputs=shown('7'))]
    )
    res = refresh(path, '--check')
    assert (
        res.returncode != 0
        and 'cell 0' in res.stderr
        and 'stored: 3' in res.stderr
        and 'cell 1' not in res.stderr
        and 'cell 2' not in res.stderr
    )


@pytest.mark.parametrize(
    'a, b, same',
    [
        ('x 0.12345', 'x 0.12349', True),
        ('x 0.123', 'x 0.124', False),
        ('12 layers', '13 layers', False),
        ('took 1.2 s', 'took 34 s', True),
        ('a  b\n', 'a b', True),
        ('tensor([1.])', 'tensor([0.9999])', True),
        ('[1., 2.]', '[1.]', False),
        ('yes', 'no', False),
        ('1e-9', '3e-9', True),
        ('-0.5', '0.5', False),
    ],
)
def test_near(a, b, same):
    assert near(a, b) is same
