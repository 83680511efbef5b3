"The package imports in a fresh process, module by module, and says what it is."

import configparser, importlib.metadata, json, shutil, subprocess, sys, tomllib, zipfile
import pytest
from conftest import none_found
from guards import PACKAGE, ROOT, notebooks

FILES = [p.relative_to(ROOT / PACKAGE) for p in (ROOT / PACKAGE).rglob('*.py') if p.name[0] != '_']
MODULES = sorted(p.with_suffix('').as_posix().replace('/', '.') for p in FILES)

# One process imports each module as if it were the first one of ours: what was imported before it is forgotten again.
FRESH = """
import importlib, inspect, json, os, sys, traceback
import torch, transformers

def state():
    mpl = sys.modules.get('matplotlib')
    return dict(
        dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(),
        # torch itself sets these when its compiler or its threads are loaded
        environment={k: v for k, v in os.environ.items() if not k.startswith(('TORCHINDUCTOR_', 'KMP_'))},
        folder=os.getcwd(), rcParams=mpl and dict(mpl.rcParams))

def faults(name):
    before = state()
    try:
        mod = importlib.import_module(name)
    except Exception:
        return [traceback.format_exc().strip().splitlines()[-1]]
    res = [f'__all__ names {o}, which is not there' for o in getattr(mod, '__all__', []) if not hasattr(mod, o)]
    if not mod.__doc__:
        res.append('has no docstring: its notebook has no "> " subtitle')
    for o in (getattr(mod, n) for n in getattr(mod, '__all__', []) if hasattr(mod, n)):
        own = (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__ == name
        if own and not (o.__doc__ or '').strip():
            res.append(f'{o.__name__} has no docstring')
    after = state()
    if before['rcParams'] is None:
        after['rcParams'] = None
    return res + [f'importing it changes {k}' for k, v in after.items() if v != before[k]]

res = {}
for name in sys.argv[1:]:
    for o in [o for o in sys.modules if o.split('.')[0] == 'lvlm_study']:
        del sys.modules[o]
    res[name] = faults(name)
print(json.dumps(res))
"""


@pytest.fixture(scope='module')
def fresh():
    if not MODULES:
        return {}
    res = subprocess.run(
        [sys.executable, '-c', FRESH, *(f'{PACKAGE}.{o}' for o in MODULES)], capture_output=True, text=True, cwd=ROOT
    )
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', MODULES)
def test_imports_alone(name, fresh):
    none_found(fresh[f'{PACKAGE}.{name}'], f'{PACKAGE}.{name}:')


def test_every_module_has_a_notebook():
    assert set(MODULES) == {nb.module for nb in notebooks() if nb.module and any(c.exported for c in nb.code)}


def test_the_package_itself_is_light():
    heavy = ('torch', 'transformers', 'pandas', 'matplotlib')
    code = f'import sys, {PACKAGE}; print([o for o in {heavy} if o in sys.modules])'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert res.stdout.strip() == '[]'


def test_the_public_door():
    import lvlm_study

    names = (
        'load_lvlm score layer_plan width_plan apply_plan prune_checkpoint doctor recover evaluate retention save_lvlm'
    )
    assert {*names.split()} <= {*lvlm_study.__all__} <= {*dir(lvlm_study)}
    for name in names.split():
        assert getattr(lvlm_study, name) is vars(lvlm_study)[name], f'{name} is looked up each time'
        assert getattr(lvlm_study, name).__module__.startswith(PACKAGE)
    with pytest.raises(AttributeError, match="no attribute 'prune'; it offers load_lvlm"):
        lvlm_study.prune


def settings():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / 'settings.ini')
    return cfg['DEFAULT']


def test_one_version():
    import lvlm_study

    assert lvlm_study.__version__ == settings()['version'] == importlib.metadata.version(PACKAGE)


def test_nbdev_is_the_pinned_one():
    import nbdev

    assert nbdev.__version__ == '2.4.14'
    assert 'nbdev==2.4.14' in (ROOT / 'pyproject.toml').read_text()


def test_flags_are_the_same_everywhere():
    from refresh import SKIP

    assert set(settings()['tst_flags'].split()) == SKIP


@pytest.mark.parametrize('name', sorted(o.name for o in importlib.metadata.distribution(PACKAGE).entry_points))
def test_entry_point(name):
    ep = next(o for o in importlib.metadata.distribution(PACKAGE).entry_points if o.name == name)
    module = ep.value.split(':')[0]
    if not (ROOT / (module.replace('.', '/') + '.py')).exists():
        pytest.skip(f'{module} does not exist yet')
    assert ep.load() is not None


def test_wheel_holds_what_is_needed(tmp_path):
    src = tmp_path / 'src'
    shutil.copytree(ROOT / PACKAGE, src / PACKAGE, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'LICENSE'):
        shutil.copy(ROOT / name, src)
    (src / 'README.md').write_text('x')
    build = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '--no-index',
        '-w',
        str(tmp_path),
        str(src),
    ]
    res = subprocess.run(build, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    inside = set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())
    want = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / PACKAGE).rglob('*')
        if p.is_file() and '__pycache__' not in p.parts and p.name[0] != '.'
    }
    none_found(sorted(want - inside), 'The wheel lacks:')
    assert f'{PACKAGE}/py.typed' in inside and any(o.endswith('licenses/LICENSE') for o in inside)
    for m in (p.name for p in (ROOT / PACKAGE / 'study_models').iterdir() if p.is_dir()):
        assert {f'{PACKAGE}/study_models/{m}/{f}' for f in ('model.safetensors', 'config.json')} <= inside
    none_found(
        [
            o
            for o in inside
            if o.split('/')[0] not in (PACKAGE, next(o.split('/')[0] for o in inside if '.dist-info/' in o))
        ],
        'The wheel holds what is no part of it:',
    )


def test_the_project_says_what_it_is():
    meta = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert {'quant', 'ray', 'docs', 'dev'} <= set(meta['optional-dependencies'])
    cff = (ROOT / 'CITATION.cff').read_text()
    assert f'version: {settings()["version"]}' in cff and meta['license'] in cff and 'arXiv:2604.24380' in cff
    for name in ('LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'README.md'):
        assert (ROOT / name).stat().st_size > 100
    assert 'make test' in (ROOT / '.github' / 'workflows' / 'test.yml').read_text()
