"What all tests share: no network, no state left behind, tests that need something skipped where it is missing."

import os, random, shutil, socket, sys
from contextlib import contextmanager

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg')
import pytest


def none_found(found, title):
    "Fail with the title and the list of what was found, if anything."
    found = list(found)
    if found:
        pytest.fail('\n  '.join([title, *found]), pytrace=False)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')


def has_gpu():
    import torch

    return torch.cuda.is_available()


CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def has_browser():
    import importlib.util

    return importlib.util.find_spec('playwright') is not None and CHROMIUM is not None


def pytest_collection_modifyitems(config, items):
    missing = {}
    if any(o.get_closest_marker('gpu') for o in items) and not has_gpu():
        missing['gpu'] = 'no CUDA device'
    if any(o.get_closest_marker('browser') for o in items) and not has_browser():
        missing['browser'] = 'no chromium or no playwright'
    if not config.getoption('--slow'):
        missing['slow'] = 'slow: run with --slow'
    for o in items:
        for mark, why in missing.items():
            if o.get_closest_marker(mark):
                o.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True, scope='session')
def figures_elsewhere(tmp_path_factory):
    "Figures drawn in tests go to a temporary folder."
    os.environ.setdefault('LVLM_FIGURES', str(tmp_path_factory.mktemp('figures')))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    "Put back folder, environment, random states, torch's dtype, device and grad mode, and matplotlib's settings."
    cwd, env, rng = os.getcwd(), dict(os.environ), random.getstate()
    np, torch, mpl = (sys.modules.get(o) for o in ('numpy', 'torch', 'matplotlib'))
    if np:
        np_rng = np.random.get_state()
    if torch:
        was = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state()
    if mpl:
        rc = mpl.rcParams.copy()
    yield
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.setstate(rng)
    if np:
        np.random.set_state(np_rng)
    if new := sys.modules.get('torch'):  # a test may be the first to import it
        dtype, device, grad, t_rng = was if torch else (new.float32, new.device('cpu'), True, new.get_rng_state())
        new.set_default_dtype(dtype)
        if new.get_default_device() != device:  # setting it, even to what it is, slows down every later call of torch
            new.set_default_device(device)
        new.set_grad_enabled(grad)
        new.set_rng_state(t_rng)
    if mpl:
        dict.update(mpl.rcParams, rc)
    elif 'matplotlib' in sys.modules:
        sys.modules['matplotlib'].rcdefaults()
    if 'matplotlib.pyplot' in sys.modules:
        sys.modules['matplotlib.pyplot'].close('all')


# --- the browser ----------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


QUIET = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]


@pytest.fixture(scope='session')
def browser():
    "One headless Chromium for all tests"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield b
        b.close()


@contextmanager
def outside(browser, base, timeout=120, **kw):
    "A page in a profile of its own, and the addresses beyond `base` that it asked for: none is let through."
    ctx = browser.new_context(viewport=dict(width=1300, height=1000), **kw)
    asked = []
    ctx.route(
        lambda u: not u.startswith((base, base.replace('http', 'ws'), 'data:', 'blob:')),
        lambda r: (asked.append(r.request.url), r.abort()),
    )
    page = ctx.new_page()
    page.set_default_timeout(timeout * 1000)
    try:
        yield page, asked
    finally:
        ctx.close()


TOLD = pytest.StashKey()


@pytest.fixture
def told(request):
    return request.config.stash.setdefault(TOLD, []).append


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(TOLD, []):
        terminalreporter.write_line(line)


@pytest.fixture
def run(monkeypatch, capsys):
    "Call a command as its script does: (status, standard output, standard error)"
    from fastcore.script import _run_cli
    from lvlm_study.study import cli as commands

    def f(command, *words):
        monkeypatch.setattr(sys, 'argv', [command, *map(str, words)])
        capsys.readouterr()
        try:
            status = _run_cli(getattr(commands, command).__wrapped__, True)
        except SystemExit as e:
            status = e.code
        got = capsys.readouterr()
        return status, got.out, got.err

    return f
