"Every guard can fail: each is shown a notebook broken in the one way it looks for."
import ast, copy, hashlib, json
from pathlib import Path
import pytest
import guards
from guards import GUARDS, Notebook

def cell(source, kind='code', **kw):
    c = dict(cell_type=kind, id=hashlib.sha256((kind+source).encode()).hexdigest()[:8], metadata={}, source=source.splitlines(True))
    return c | (dict(execution_count=None, outputs=[]) if kind=='code' else {}) | kw

def md(source): return cell(source, 'markdown')

def shown(text, **kw): return [dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': [text]}) | kw]

FUNCTION = '''#| export
def twice(
    x:int, # What to double
    by=2   # How often
)->int:    # The product
    "x times 2."
    return x*by'''
METHOD = '''#| export
@patch
def half(self:Thing,
         by=2 # Divisor
        ):
    "A part of it."
    return self.x/by'''
GOOD = [cell('#| default_exp core'), md('# Core\n\n> What all stands on.'), cell('#| export\nimport math\nfrom fastcore.basics import patch'), cell('import json'),
        md('Double it.'), md('Twice.'), md('Or half of it.'), cell(FUNCTION), cell('#| export\ndef _half(x): return x/2'), cell('y = twice(3)\nassert y == 6\ny', outputs=shown('6')),
        md('A method.'), cell(METHOD), cell('twice(0)', outputs=shown('0'))]

def write(path, cells, **meta):
    js = dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')) | meta, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(js))
    return Notebook(path)

@pytest.fixture
def nb(tmp_path):
    "(change of the good cells) -> a notebook `05_core` beside a `04_low` and a `07_high`"
    write(tmp_path/'04_low.ipynb', [cell('#| default_exp low')]); write(tmp_path/'07_high.ipynb', [cell('#| default_exp high')])
    def make(change=lambda cells: None, name='05_core', **meta):
        cells = copy.deepcopy(GOOD)
        return write(tmp_path/f'{name}.ipynb', change(cells) or cells, **meta)
    return make

def add(source, **kw): return lambda cells: cells + [cell(source, **kw)]
def output(text, **kw): return add('y', outputs=shown(text, **kw))
def stream(name, text): return add('y', outputs=[dict(output_type='stream', name=name, text=[text])])
def exported(source): return add('#| export\n'+source)

@pytest.mark.parametrize('guard', GUARDS, ids=lambda g: g.__name__)
def test_a_good_notebook_passes(nb, guard): assert list(guard(nb())) == []

# (guard, what breaks a good notebook, what the guard says): exactly one line each
BROKEN = [
    ('format_with_ids', lambda cs: [*cs, {k:v for k,v in cell('z').items() if k!='id'}], 'no id'),
    ('format_with_ids', lambda cs: [*cs, cs[-1]], 'the id is taken'),
    ('no_metadata', add('y', execution_count=3), 'an execution count'),
    ('no_metadata', output('6', execution_count=3), 'an execution count'),
    ('no_metadata', add('y', metadata=dict(collapsed=True)), 'collapsed'),
    ('small_file', lambda cs: cs + [md(f'{i}') for i in range(90)], '90 is the most'),
    ('small_file', output('x'*300_001), '300 is the most'),
    ('no_errors', add('y', outputs=[dict(output_type='error', ename='E', evalue='', traceback=[])]), 'a stored error'),
    ('no_machine_paths', output('PosixPath("/home/me/x")'), 'in the output'),
    ('no_machine_paths', stream('stdout', 'C:\\Users'), 'a machine path'),
    ('no_machine_paths', add('p = "/tmp/x"'), 'a machine path'),
    ('no_machine_paths', lambda cs: [*cs, md('See /Users/me.')], 'a machine path'),
    ('no_noise', stream('stderr', 'loading'), 'stderr'),
    ('no_noise', stream('stdout', ' 50%|#####     | 1/2'), 'a progress bar'),
    ('no_noise', stream('stdout', 'x.py:1: UserWarning: careful'), 'a warning'),
    ('no_widget_state', add('y', outputs=[dict(output_type='display_data', metadata={}, data={guards.WIDGET_VIEW: {}})]), 'a widget'),
    ('parses', add('def f(:'), 'invalid syntax'),
    ('imports_apart', add('import os\nos.sep'), 'among other code'),
    ('imports_apart', exported('import os\nx = 1'), 'among other code'),
    ('imports_apart', add('def f():\n    import os'), 'among other code'),
    ('imports_apart', exported('def _f():\n    from lvlm_study.low import x'), 'among other code'),
    ('imports_point_down', add('from lvlm_study.high import x'), 'which is notebook 07'),
    ('imports_point_down', add('from lvlm_study import high'), 'which is notebook 07'),
    ('imports_point_down', add('import lvlm_study.core as c'), 'which is notebook 05'),
    ('imports_point_down', add('from lvlm_study.nowhere import x'), 'no notebook exports'),
    ('no_star_imports', add('from math import *'), 'a star import'),
    ('skeleton', lambda cs: [cell('x = 1'), *cs[1:]], 'not `#| default_exp`'),
    ('skeleton', lambda cs: [cs[0], *cs[2:]], 'no H1'),
    ('skeleton', lambda cs: [cs[0], md('# Core'), *cs[2:]], 'no `> ` subtitle'),
    ('skeleton', add('nbdev_export()'), 'exports from within'),
    ('short_cells', add('y = 1\n'*21), '21 lines; 20'),
    ('short_cells', exported('y = 1\n'*41), '41 lines; 40'),
    ('enough_prose', lambda cs: [c for c in cs if c['cell_type']=='code'], '0 markdown cells'),
    ('lessons_between', lambda cs: cs + [cell(f'#| export\ny{i} = 1') for i in range(2)] + [cell('#| export\nimport os'), cell('#| export\ny3 = 1')], 'the third'),
    ('links_resolve', lambda cs: [*cs, md('![a](figures/none.png)')], 'figures/none.png does not exist'),
    ('no_bare_comparison', add('y == 6'), 'stands alone'),
    ('no_bare_comparison', add('y == 6 and y > 2\ny'), 'stands alone'),
    ('no_pasted_numbers', add('accs = [64.75, 1., 2., 3., 4., 5., -6.]'), '7 decimal numbers'),
    ('no_pasted_numbers', add('t = dict(a=1); t = {"a": [.1, .2, .3, .4], "b": [.1, .2, .3, .4]}'), '8 decimal numbers'),
    ('no_final_print', add('y\nprint(y)'), 'ends in print'),
    ('one_line_docstrings', exported('def f(): return 1'), 'f has no docstring'),
    ('one_line_docstrings', exported('class C: pass'), 'C has no docstring'),
    ('one_line_docstrings', exported('def _f():\n    """One.\n\n    Two."""'), 'more than one line'),
    ('docments', exported('def f(x): "F."'), "argument 'x' of f"),
    ('docments', exported('def f(x, # X\n      y): "F."'), "argument 'y' of f"),
    ('docments', exported('def f(x, y # Y\n     ): "F."'), "argument 'x' of f"),
    ('docments', exported('def f(*xs): "F."'), "argument 'xs' of f"),
    ('docments', exported('@patch\ndef f(self:int, y): "F."'), "argument 'y' of f"),
    ('docments', exported('class C:\n    "C."\n    def f(self, y): pass'), "argument 'y' of C.f"),
    ('short_functions', exported('def _f():\n' + '    y = 1\n\n'*20 + '    return 1'), '42 lines; 40'),
]

@pytest.mark.parametrize('guard, change, says', BROKEN, ids=[f'{g}-{s}' for g,_,s in BROKEN])
def test_a_broken_notebook_is_seen(nb, guard, change, says):
    found = list(getattr(guards, guard)(nb(change)))
    assert len(found)==1 and says in found[0], found

def test_metadata_of_the_notebook_is_seen(nb):
    assert 'widget state' in list(guards.no_widget_state(nb(widgets={})))[0]
    assert 'language_info' in list(guards.no_metadata(nb(language_info={})))[0]
    assert 'my-env' in list(guards.no_metadata(nb(kernelspec=dict(name='my-env'))))[0]

def test_every_guard_is_broken_once():
    assert {g.__name__ for g in GUARDS} == {g for g,_,_ in BROKEN}

def test_what_is_allowed_passes(nb):
    fine = [exported('def _f():\n    import json'), add('from lvlm_study.low import x'), add('xs = [.1, .2, .3, .4, .5, .6]'), add('y = twice(1) == 2'), add('%matplotlib inline\ny')]
    for change in fine: assert [o for g in GUARDS for o in g(nb(change))] == []

def test_the_index_may_import_anything(nb):
    index = nb(lambda cs: [md('# Title\n\n> Claim.'), cell('from lvlm_study.high import x')], name='index')
    assert [o for g in GUARDS for o in g(index)] == []

def test_two_notebooks_with_one_module_are_seen(nb):
    found = list(guards.one_module_each([nb(), nb(name='06_core')]))
    assert found == ['06_core and 05_core have the same module: core']

def test_figures_out_of_step_are_seen(nb, tmp_path):
    folder = tmp_path/'figures'; folder.mkdir()
    for name in ('05-there.png', '05-orphan.png', 'notes.txt'): (folder/name).touch()
    book = nb(add("save_fig(f, '05-there')\nsave_fig(f, '05-missing')\nsave_fig(f, 'Bad name')\nsave_fig(f, '00-trial', tmp)"))
    found = '\n'.join(guards.figures_in_step([book], folder))
    assert found.count('\n')==3 and all(o in found for o in ('05-missing.png does not exist', "'Bad name' is not named", '05-orphan.png: no notebook', 'notes.txt: only .png'))

def checks(test):
    "Does a test function assert something?"
    calls = {getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in ast.walk(test) if isinstance(n, ast.Call)}
    return any(isinstance(n, ast.Assert) for n in ast.walk(test)) or bool(calls & {'none_found', 'raises', 'fail', 'test_eq', 'test_close', 'assert_close', 'assert_frame_equal'})

def test_every_test_checks_something():
    idle = [f'{p.name}: {n.name}' for p in sorted(Path(__file__).parent.glob('test_*.py')) for n in ast.walk(ast.parse(p.read_text()))
            if isinstance(n, ast.FunctionDef) and n.name.startswith('test_') and not checks(n)]
    assert idle == []
    assert not checks(ast.parse('def test_x(): print(1 == 2)').body[0])
