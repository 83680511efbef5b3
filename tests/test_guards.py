"Every guard can fail: each is shown a notebook broken in the one way it looks for."

import ast, copy, hashlib, json
from pathlib import Path
import pytest
import guards
from guards import GUARDS, Notebook


def cell(source, kind='code', **kw):
    c = dict(
        cell_type=kind,
        id=hashlib.sha256((kind + source).encode()).hexdigest()[:8],
        metadata={},
        source=source.splitlines(True),
    )
    return c | (dict(execution_count=None, outputs=[]) if kind == 'code' else {}) | kw


def md(source):
    return cell(source, 'markdown')


def shown(text, **kw):
    return [dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': [text]}) | kw]


FUNCTION = """#| export
def twice(
    x: int,  # The number to double
    by: int = 2,  # How often it counts
) -> int:  # The product of both
    "x times 2."
    return x * by"""
METHOD = """#| export
@patch
def half(
    self: Thing,
    by: int = 2,  # Divisor of the thing
) -> float:
    "A part of it."
    return self.x / by"""
GOOD = [
    cell('#| default_exp importance.core'),
    md('# Core\n\n> What all stands on.'),
    cell('#| export\nimport math\nfrom fastcore.basics import patch'),
    cell('import json'),
    md('Double it.'),
    md('Twice.'),
    md('Or half of it.'),
    cell(FUNCTION),
    cell('#| export\ndef _half(x):\n    return x / 2'),
    cell('y = twice(3)\nassert y == 6\ny', outputs=shown('6')),
    md('A method.'),
    cell(METHOD),
    cell('twice(0)', outputs=shown('0')),
]
CHAPTERS = dict(core=['low'], importance=['core', 'other'], study=['high'])


def write(path, cells, root, **meta):
    js = dict(
        cells=cells,
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')) | meta,
        nbformat=4,
        nbformat_minor=5,
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(js))
    return Notebook(path, root)


@pytest.fixture
def nb(tmp_path):
    "(change of the good cells) -> a notebook `importance/core` between `core/low` and `study/high`"
    (tmp_path / 'chapters.json').write_text(json.dumps(CHAPTERS))
    write(tmp_path / 'core' / 'low.ipynb', [cell('#| default_exp core.low')], tmp_path)
    write(tmp_path / 'study' / 'high.ipynb', [cell('#| default_exp study.high')], tmp_path)

    def make(change=lambda cells: None, name='importance/core', **meta):
        cells = copy.deepcopy(GOOD)
        return write(tmp_path / f'{name}.ipynb', change(cells) or cells, tmp_path, **meta)

    return make


def add(source, **kw):
    return lambda cells: cells + [cell(source, **kw)]


def output(text, **kw):
    return add('y', outputs=shown(text, **kw))


def stream(name, text):
    return add('y', outputs=[dict(output_type='stream', name=name, text=[text])])


def exported(source):
    return add('#| export\n' + source)


@pytest.mark.parametrize('guard', GUARDS, ids=lambda g: g.__name__)
def test_a_good_notebook_passes(nb, guard):
    assert list(guard(nb())) == []


# (guard, what breaks a good notebook, what the guard says): exactly one line each
BROKEN = [
    ('format_with_ids', lambda cs: [*cs, {k: v for k, v in cell('z').items() if k != 'id'}], 'no id'),
    ('format_with_ids', lambda cs: [*cs, cs[-1]], 'the id is taken'),
    ('no_metadata', add('y', execution_count=3), 'an execution count'),
    ('no_metadata', output('6', execution_count=3), 'an execution count'),
    ('no_metadata', add('y', metadata=dict(collapsed=True)), 'collapsed'),
    ('small_file', lambda cs: cs + [md(f'{i}') for i in range(110)], '110 is the most'),
    ('small_file', output('x' * 300_001), '300 is the most'),
    ('no_errors', add('y', outputs=[dict(output_type='error', ename='E', evalue='', traceback=[])]), 'a stored error'),
    ('no_machine_paths', output('PosixPath("/home/me/x")'), 'in the output'),
    ('no_machine_paths', stream('stdout', 'C:\\Users'), 'a machine path'),
    ('no_machine_paths', add('p = "/tmp/x"'), 'a machine path'),
    ('no_machine_paths', lambda cs: [*cs, md('See /Users/me.')], 'a machine path'),
    ('no_noise', stream('stderr', 'loading'), 'stderr'),
    ('no_noise', stream('stdout', ' 50%|#####     | 1/2'), 'a progress bar'),
    ('no_noise', stream('stdout', 'x.py:1: UserWarning: careful'), 'a warning'),
    (
        'no_widget_state',
        add('y', outputs=[dict(output_type='display_data', metadata={}, data={guards.WIDGET_VIEW: {}})]),
        'a widget',
    ),
    ('parses', add('def f(:'), 'invalid syntax'),
    ('imports_apart', add('import os\nos.sep'), 'among other code'),
    ('imports_apart', exported('import os\nx = 1'), 'among other code'),
    ('imports_apart', add('def f():\n    import os'), 'among other code'),
    ('imports_apart', exported('def _f():\n    from lvlm_study.core.low import x'), 'among other code'),
    ('imports_in_order', add('from lvlm_study.study.high import x'), 'of a later chapter'),
    ('imports_in_order', add('import lvlm_study.study.high as c'), 'of a later chapter'),
    ('imports_in_order', add('from lvlm_study.nowhere import x'), 'no notebook exports'),
    ('no_star_imports', add('from math import *'), 'a star import'),
    ('skeleton', lambda cs: [cell('x = 1'), *cs[1:]], 'not `#| default_exp`'),
    ('skeleton', lambda cs: [cs[0], *cs[2:]], 'no H1'),
    ('skeleton', lambda cs: [cs[0], md('# Core'), *cs[2:]], 'no `> ` subtitle'),
    ('skeleton', add('nbdev_export()'), 'exports from within'),
    ('short_cells', add('y = 1\n' * 21), '21 lines; 20'),
    ('short_cells', exported('y = 1\n' * 61), '61 lines; 60'),
    ('enough_prose', lambda cs: [c for c in cs if c['cell_type'] == 'code'], '0 markdown cells'),
    (
        'lessons_between',
        lambda cs: (
            cs
            + [cell(f'#| export\ny{i} = 1') for i in range(4)]
            + [cell('#| export\nimport os'), cell('#| export\ny9 = 1')]
        ),
        'the fifth',
    ),
    ('links_resolve', lambda cs: [*cs, md('![a](../figures/none.png)')], '../figures/none.png does not exist'),
    ('no_bare_comparison', add('y == 6'), 'stands alone'),
    ('no_bare_comparison', add('y == 6 and y > 2\ny'), 'stands alone'),
    ('no_pasted_numbers', add('accs = [64.75, 1., 2., 3., 4., 5., -6.]'), '7 decimal numbers'),
    (
        'no_pasted_numbers',
        add('t = dict(a=1); t = {"a": [.1, .2, .3, .4], "b": [.1, .2, .3, .4]}'),
        '8 decimal numbers',
    ),
    ('no_final_print', add('y\nprint(y)'), 'ends in print'),
    ('docstrings', exported('def f() -> int:\n    return 1'), 'f has no docstring'),
    ('docstrings', exported('class C:\n    pass'), 'C has no docstring'),
    ('docstrings', exported('def read_rows() -> int:\n    "Read the rows."'), 'only repeats its name'),
    ('docments', exported('def f(\n    x,  # The value to double\n) -> int:\n    "Twice."'), "'x' of f has no type"),
    ('docments', exported('def f(x: int) -> int:\n    "Twice."'), "'x' of f has no comment"),
    ('docments', exported('def f(\n    x: int,  # Any number\n) -> int:\n    "Twice."'), "'x' of f has no comment"),
    ('docments', exported('def f(\n    *xs: int,  # X\n) -> int:\n    "Twice."'), "'xs' of f has no comment"),
    ('docments', exported('@patch\ndef f(self: int, y: int) -> int:\n    "Twice."'), "'y' of f has no comment"),
    ('docments', exported('class C:\n    "Any thing."\n\n    def f(self, y: int) -> int:\n        pass'), "'y' of C.f"),
    ('return_types', exported('def f():\n    "Twice."'), 'f has no return type'),
    ('fields_explained', exported('class C:\n    "Any thing."\n\n    x: int = 3  # Number'), 'field C.x'),
    ('line_width', add('y = ' + '1' * 120), '124 columns'),
    ('one_statement_a_line', add('y = 1; z = 2'), 'more than one statement'),
    ('one_statement_a_line', add('if y: z = 2'), 'more than one statement'),
    ('no_bound_lambda', add('f = lambda x: x'), 'a lambda is bound'),
    ('no_attached_methods', exported('Thing.twice = _half'), 'Thing.twice is attached'),
    ('one_word_a_thing', lambda cs: [*cs, md('One block goes.')], "'block' is called layer"),
    (
        'one_word_a_thing',
        exported('def f(\n    look: bool,  # Are pictures shown\n) -> int:\n    "Twice."'),
        'use_images',
    ),
    ('one_word_a_thing', exported('class C:\n    "Any thing."\n\n    depth: int  # Number of layers'), 'num_layers'),
    ('short_functions', exported('def _f():\n' + '    y = 1\n\n' * 30 + '    return 1'), '62 lines; 60'),
]


@pytest.mark.parametrize('guard, change, says', BROKEN, ids=[f'{g}-{s}' for g, _, s in BROKEN])
def test_a_broken_notebook_is_seen(nb, guard, change, says):
    found = list(getattr(guards, guard)(nb(change)))
    assert len(found) == 1 and says in found[0], found


def test_metadata_of_the_notebook_is_seen(nb):
    assert 'widget state' in list(guards.no_widget_state(nb(widgets={})))[0]
    assert 'language_info' in list(guards.no_metadata(nb(language_info={})))[0]
    assert 'my-env' in list(guards.no_metadata(nb(kernelspec=dict(name='my-env'))))[0]


def test_every_guard_is_broken_once():
    assert {g.__name__ for g in GUARDS} == {g for g, _, _ in BROKEN}


def test_what_is_allowed_passes(nb):
    fine = [
        exported('def _f():\n    import json'),
        add('from lvlm_study.core.low import x'),
        add('xs = [.1, .2, .3, .4, .5, .6]'),
        add('y = twice(1) == 2'),
        add('%matplotlib inline\ny'),
    ]
    for change in fine:
        assert [o for g in GUARDS for o in g(nb(change))] == []


def test_the_index_may_import_anything(nb):
    index = nb(lambda cs: [md('# Title\n\n> Claim.'), cell('from lvlm_study.study.high import x')], name='index')
    assert [o for g in GUARDS for o in g(index)] == []


def test_two_notebooks_with_one_module_are_seen(nb):
    found = list(guards.one_module_each([nb(), nb(name='importance/other')]))
    assert found == ['importance/other and importance/core have the same module: importance.core']


def test_a_name_in_two_modules_is_seen(nb):
    low = nb(lambda cs: [cell('#| default_exp core.low'), cell('#| export\ntwice = 2\n_half = 1')], name='core/low')
    assert list(guards.one_module_a_name([low, nb()])) == ['twice is defined in core.low and in importance.core']


def test_a_circle_of_imports_is_seen(nb):
    low = nb(
        lambda cs: [cell('#| default_exp core.low'), cell('#| export\nfrom lvlm_study.importance.core import twice')],
        name='core/low',
    )
    core = nb(exported('from lvlm_study.core.low import x'))
    found = list(guards.imports_acyclic([low, core]))
    assert found == ['core.low imports importance.core imports core.low']


def test_notebooks_out_of_order_are_seen(nb):
    book = nb(name='importance/new')
    found = list(guards.listed_in_order([book]))
    assert 'importance/new is not listed' in found and 'study/high is listed and not there' in found


def test_a_median_of_many_lines_is_seen(nb):
    assert list(guards.median_exported([nb()])) == []
    long = nb(lambda cs: [cell('#| export\n' + f'y = {i}\n' * 15) for i in range(9)])
    assert list(guards.median_exported([long])) == ['the median is 15 lines']


def test_figures_out_of_step_are_seen(nb, tmp_path):
    folder = tmp_path / 'figures'
    folder.mkdir()
    for name in ('there.png', 'an-orphan.png', 'notes.txt'):
        (folder / name).touch()
    save = "save_figure(f, '{}')\n"
    names = ('there', 'missing-one', 'Bad name')
    book = nb(add(''.join(map(save.format, names)) + "save_figure(f, 'trial', tmp)"))
    found = '\n'.join(guards.figures_in_step([book], folder))
    assert found.count('\n') == 3
    for line in (
        'missing-one.png does not exist',
        "'Bad name' is not named",
        'an-orphan.png: no notebook',
        'only .png',
    ):
        assert line in found


def checks(test):
    "Does a test function assert something?"
    calls = {getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in ast.walk(test) if isinstance(n, ast.Call)}
    return any(isinstance(n, ast.Assert) for n in ast.walk(test)) or bool(
        calls & {'none_found', 'raises', 'fail', 'test_eq', 'test_close', 'assert_close', 'assert_frame_equal'}
    )


def test_every_test_checks_something():
    idle = [
        f'{p.name}: {n.name}'
        for p in sorted(Path(__file__).parent.glob('test_*.py'))
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.FunctionDef) and n.name.startswith('test_') and not checks(n)
    ]
    assert idle == []
    assert not checks(ast.parse('def test_x(): print(1 == 2)').body[0])
