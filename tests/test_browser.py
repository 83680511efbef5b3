"JupyterLab in a real browser: notebooks with a slider are run from top to bottom, and every slider is moved with the keyboard."
import json, os, re, shutil, statistics, subprocess, sys, time, urllib.request
import pytest
from conftest import free_port, outside
from guards import NBS, ROOT, notebooks
from refresh import SKIP

TARGET,BOUND = 300, 5000     # milliseconds from a key to a new picture: wanted, and the most that passes on a busy machine

def has_slider(nb):
    "Does a cell that is not exported build an interactive slider?"
    src = '\n'.join(c.source for c in nb.code if not c.exported and not SKIP & c.flags)
    return 'Slider(' in src and bool(re.search(r'\binteract(ive)?\(', src))

FOUND = [nb for nb in notebooks() if has_slider(nb)]

def test_notebooks_with_sliders_are_found(): assert {'06_layer_pruning', '07_width_pruning'} <= {nb.name for nb in FOUND}

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on loopback over copies of the notebooks, with settings of its own; gives its address"
    root,own = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('settings'); port = free_port()
    for name in ('results', 'figures'): os.symlink((NBS/name).resolve(), root/name)
    for nb in FOUND:                                          # JupyterLab knows nothing of flags: what tests skip is left out
        js = dict(nb.js, cells=[c.js for c in nb.cells if not (c.code and (SKIP & c.flags or re.search(r'#\|\s*eval:\s*false', c.source)))])
        (root/nb.path.name).write_text(json.dumps(js))
    tracker = own/'lab'/'@jupyterlab'/'notebook-extension'/'tracker.jupyterlab-settings'; tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')           # all cells are in the page at once
    env = {k: v for k,v in os.environ.items() if k!='MPLBACKEND'} | dict(PYTHONPATH=str(ROOT), JUPYTER_CONFIG_DIR=str(own), JUPYTER_RUNTIME_DIR=str(own),
        JUPYTERLAB_SETTINGS_DIR=str(own/'lab'), JUPYTERLAB_WORKSPACES_DIR=str(own/'work'), LVLM_FIGURES=str(tmp_path_factory.mktemp('drawn')), OMP_NUM_THREADS='1')
    args = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.password=',
        f'--ServerApp.root_dir={root}', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(own/'log', 'w') as log: server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', *args], stdout=log, stderr=subprocess.STDOUT, env=env, cwd=root)
    base,end = f'http://127.0.0.1:{port}', time.time()+180
    try:
        while True:
            try: urllib.request.urlopen(f'{base}/api/status', timeout=2); break
            except OSError: assert server.poll() is None and time.time()<end, (own/'log').read_text()[-2000:]
            time.sleep(.2)
        yield base
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        shutil.rmtree(root, ignore_errors=True)

DONE = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every(e => /\\[\\d+\\]/.test(e.innerText))
  || document.querySelector('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')"""
WATCH = """(box) => {
  window.took = []; let last = box.querySelector('.jp-OutputArea img')?.src, key = 0
  box.addEventListener('keydown', () => { key = performance.now() }, true)
  new MutationObserver(() => { const i = box.querySelector('.jp-OutputArea img')
    if (i && i.src && i.src !== last) { last = i.src; window.took.push(performance.now() - key) } }).observe(box, {childList: true, subtree: true, attributes: true, attributeFilter: ['src']}) }"""

def move(page, box, keys=4):
    "Press a key on the slider again and again; milliseconds until each new picture"
    read = lambda: box.locator('.widget-readout').first.inner_text()
    box.scroll_into_view_if_needed(); box.locator('.jp-OutputArea img').first.wait_for(state='visible')
    box.evaluate(WATCH); was = read()
    box.locator('.noUi-handle').first.focus()
    for n in range(1, keys+1):
        page.keyboard.press('ArrowRight')
        page.wait_for_function('n => window.took.length >= n', arg=n)
    assert read()!=was, 'the slider shows the same value'
    return page.evaluate('window.took')

@pytest.mark.browser
@pytest.mark.parametrize('nb', FOUND, ids=lambda nb: nb.name)
def test_slider(nb, lab, browser, told):
    with outside(browser, lab) as (page, asked):
        page.goto(f'{lab}/lab/tree/{nb.path.name}?reset')
        page.wait_for_selector('.jp-Notebook .jp-Cell')
        page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')")    # before that, running asks for a kernel
        page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        page.wait_for_function(DONE)
        errors = page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"], .jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]')
        assert [e[:300] for e in errors.all_inner_texts()]==[]
        boxes = [b for b in page.locator('.widget-interact').all() if b.locator('.noUi-handle').count()]
        assert boxes, 'the page shows no slider'
        for box in boxes:
            ms = statistics.median(move(page, box))
            told(f'{nb.name}: {ms:.0f} ms from a key to a new picture (target {TARGET})')
            assert ms<=BOUND
        assert [e[:300] for e in errors.all_inner_texts()]==[] and asked==[]
