"JupyterLab in a real browser: notebooks with a widget are run, and every slider is moved with the keyboard."

import ast, json, os, re, shutil, statistics, subprocess, sys, time, urllib.request
from contextlib import ExitStack, suppress
import pytest
from conftest import free_port, outside
from guards import FIGURES, NBS, ROOT, notebooks
from refresh import SKIP

sys.path.append(str(ROOT / 'docs'))
import frames

# Milliseconds from a key to a new picture: wanted, and the most that passes on a busy machine.
TARGET, BOUND = 300, 5000

CALLS = re.compile(r'\binteract(ive)?\(')
MAKERS = {
    n.name
    for nb in notebooks()
    for c in nb.code
    if c.exported and CALLS.search(c.source)  # exported functions that build a widget
    for n in ast.parse(c.source).body
    if isinstance(n, ast.FunctionDef) and CALLS.search(ast.get_source_segment(c.source, n))
}


def has_widget(nb):
    "Does a cell that is run and not exported build a widget?"
    src = '\n'.join(c.source for c in nb.code if not c.exported and not SKIP & c.flags)
    return bool(CALLS.search(src)) or any(re.search(rf'\b{m}\(', src) for m in MAKERS)


FOUND = [nb for nb in notebooks() if has_widget(nb)]


def test_what_a_widget_needs_is_kept():
    for nb in FOUND:
        whole = without_skipped(nb)
        kept = needed(whole)
        assert [c for c in whole if builds_widget(c)] == [c for c in kept if builds_widget(c)] != []
        assert len(kept) < len(whole)


def test_notebooks_with_widgets_are_found():
    wanted = {
        '00_tour',
        'evaluation/error_analysis',
        'importance/importance',
        'pruning/layer_pruning',
        'pruning/width_pruning',
        'recovery/data_efficiency',
        'recovery/recipes',
    }
    assert wanted <= {nb.name for nb in FOUND}


def without_skipped(nb):
    "The code cells that tests run: JupyterLab knows nothing of flags."
    return [c for c in nb.code if not SKIP & c.flags and not re.search(r'#\|\s*eval:\s*false', c.source)]


def builds_widget(c):
    return not c.exported and bool(CALLS.search(c.source) or any(re.search(rf'\b{m}\(', c.source) for m in MAKERS))


def defined(c):
    return set().union(*map(frames.defined, c.tree.body))


def used(c):
    return set().union(*map(frames.used, c.tree.body))


def needed(cells):
    """The cells that build a widget, those after them that move it, and what all of these need.

    `nbdev_test` runs whole notebooks; here only the widgets are looked at, in less time."""
    built = [c for c in cells if builds_widget(c)]
    widgets = set().union(*map(defined, built))
    moving = [c for c in cells if c.i > built[0].i and used(c) & widgets]
    kept = [c for c in cells if c in built or c in moving or 'logging' in c.source]
    kept += frames.closure(cells, set().union(*map(used, kept)), defined, used)
    return [c for c in cells if c in kept]


def as_opened(nb):
    "The notebook with its prose and, of its code, what the widgets need; the index is whole."
    cells = without_skipped(nb) if nb.name == 'index' else needed(without_skipped(nb))
    return dict(nb.js, cells=[c.js for c in nb.cells if not c.code or c in cells])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on loopback over copies of the notebooks, with settings of its own; gives its address"
    root, own = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('settings')
    port = free_port()
    (root / 'nbs').mkdir()
    os.symlink(NBS / 'results', root / 'nbs' / 'results')
    shutil.copytree(FIGURES, root / 'figures')  # JupyterLab serves no file behind a link that leaves its folder
    shutil.copy(NBS / 'chapters.json', root / 'nbs')
    for nb in [nb for nb in notebooks() if nb.name == 'index'] + FOUND:
        path = root / 'nbs' / f'{nb.name}.ipynb'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(as_opened(nb)))
    tracker = own / 'lab' / '@jupyterlab' / 'notebook-extension' / 'tracker.jupyterlab-settings'
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # all cells are in the page at once
    news = own / 'lab' / '@jupyterlab' / 'apputils-extension' / 'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(
        PYTHONPATH=str(ROOT),
        JUPYTER_CONFIG_DIR=str(own),
        JUPYTER_RUNTIME_DIR=str(own),
        JUPYTERLAB_SETTINGS_DIR=str(own / 'lab'),
        JUPYTERLAB_WORKSPACES_DIR=str(own / 'work'),
        LVLM_FIGURES=str(tmp_path_factory.mktemp('drawn')),
        OMP_NUM_THREADS='1',
    )
    args = [
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        '--IdentityProvider.token=',
        '--ServerApp.password=',
        f'--ServerApp.root_dir={root}',
        '--LabApp.news_url=',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
    ]
    with open(own / 'log', 'w') as log:
        server = subprocess.Popen(
            [sys.executable, '-m', 'jupyter', 'lab', *args], stdout=log, stderr=subprocess.STDOUT, env=env, cwd=root
        )
    base, end = f'http://127.0.0.1:{port}', time.time() + 180
    try:
        while True:
            try:
                urllib.request.urlopen(f'{base}/api/status', timeout=2)
                break
            except OSError:
                assert server.poll() is None and time.time() < end, (own / 'log').read_text()[-2000:]
            time.sleep(0.2)
        yield base
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(root, ignore_errors=True)


DONE = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]
    .every(e => /\\[\\d+\\]/.test(e.innerText)) ||
  document.querySelector('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')"""
WATCH = """(box) => {
  const pictures = o => [...o.querySelectorAll('img')].map(i => i.src)
  const outputs = () => [...box.querySelectorAll('.jp-OutputArea-output')]
  const shown = () => JSON.stringify(outputs().map(o => [o.innerText, ...pictures(o)]))
  let last = shown(), key = 0; window.took = []
  for (const e of ['keydown', 'input']) box.addEventListener(e, () => { key = performance.now() }, true)
  new MutationObserver(() => { const s = shown()
    if (s.length > 9 && s !== last) { last = s; window.took.push(performance.now() - key) }
  }).observe(box, {childList: true, subtree: true, attributes: true, attributeFilter: ['src']}) }"""


def move(page, box, keys=3):
    "Press a key on every slider, a few times, and choose from every menu; milliseconds until each new picture."
    box.scroll_into_view_if_needed()
    box.locator('.jp-OutputArea-output').first.wait_for(state='visible')
    box.evaluate(WATCH)
    n = 0
    for control in box.locator('.noUi-handle, select').all():
        if control.evaluate('c => c.tagName') == 'SELECT':  # arrow keys on a menu would walk through JupyterLab's cells
            at, many = control.evaluate('c => [c.selectedIndex, c.options.length]')
            assert many > 1, 'a menu with one choice'

            def state():
                return control.input_value()

            moves = [lambda: control.select_option(index=at + 1 if at + 1 < many else at - 1)]
        else:
            now, most, least = (float(control.get_attribute(f'aria-value{a}')) for a in ('now', 'max', 'min'))

            def state():
                return control.get_attribute('aria-valuenow')

            control.focus()
            moves = [lambda: page.keyboard.press('ArrowLeft' if now > (most + least) / 2 else 'ArrowRight')] * keys
        was = state()
        for one in moves:
            one()
            n += 1
            page.wait_for_function('n => window.took.length >= n', arg=n)
        assert state() != was, 'a control shows the same value'
    return page.evaluate('window.took')


def screenshot(page, name):
    "A screenshot for people, where LVLM_SHOTS names a folder"
    if os.environ.get('LVLM_SHOTS'):
        page.screenshot(path=f'{os.environ["LVLM_SHOTS"]}/lab-{name.replace("/", "-")}.png')


def pictures_that_fail(page):
    "Figures of the prose that JupyterLab cannot show."
    page.wait_for_function("[...document.querySelectorAll('.jp-RenderedMarkdown img')].every(i => i.complete)")
    return page.evaluate(
        "[...document.querySelectorAll('.jp-RenderedMarkdown img')].filter(i => !i.naturalWidth).map(i => i.src)"
    )


@pytest.mark.browser
def test_index(lab, browser):
    "What `make lab` opens: figures, and the reading list with links that open notebooks."
    with outside(browser, lab) as (page, asked):
        page.goto(f'{lab}/lab/tree/nbs/index.ipynb?reset')
        link = page.locator('.jp-RenderedMarkdown td a', has_text='layer pruning').first
        link.wait_for()
        assert pictures_that_fail(page) == []
        link.scroll_into_view_if_needed()
        screenshot(page, 'index')
        link.click()
        page.locator('.lm-TabBar-tabLabel', has_text='layer_pruning.ipynb').first.wait_for()
        assert asked == []


@pytest.fixture(scope='module')
def running(lab, browser):
    "All notebooks, each in a page, run side by side; {name: (page, addresses outside that it asked for)}."
    with ExitStack() as stack:
        pages = {nb.name: stack.enter_context(outside(browser, lab)) for nb in FOUND}
        for name, (page, _) in pages.items():
            page.goto(f'{lab}/lab/tree/nbs/{name}.ipynb?reset')
            page.wait_for_selector('.jp-Notebook .jp-Cell')
            # before the kernel is idle, running would ask for one
            page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')")
            page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
            page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        for page, _ in pages.values():  # a key is timed only when all are done
            with suppress(Exception):
                page.wait_for_function(DONE)
        yield pages


@pytest.mark.browser
@pytest.mark.parametrize('nb', FOUND, ids=lambda nb: nb.name)
def test_widget(nb, running, told):
    page, asked = running[nb.name]
    page.bring_to_front()
    kinds = ('application/vnd.jupyter.error', 'application/vnd.jupyter.stderr')
    errors = page.locator(', '.join(f'.jp-RenderedText[data-mime-type="{k}"]' for k in kinds))
    assert page.evaluate(f'({DONE})()') and [e[:300] for e in errors.all_inner_texts()] == []
    assert pictures_that_fail(page) == []
    boxes = [b for b in page.locator('.widget-interact').all() if b.locator('.noUi-handle, select').count()]
    assert boxes, 'the page shows no widget'
    for box in boxes:
        took = move(page, box)
        ms = statistics.median(took)
        screenshot(page, nb.name)
        told(f'{nb.name}: {ms:.0f} ms from a key to a new picture (median of {len(took)}; target {TARGET})')
        assert ms <= BOUND
    assert [e[:300] for e in errors.all_inner_texts()] == [] and asked == []
