"The documentation site: built from the notebooks, its links followed, opened in a browser."

import ast, functools, html.parser, http.server, shutil, subprocess, sys, threading
from urllib.parse import unquote, urldefrag
import pytest
from conftest import none_found, outside
from guards import ROOT, chapters, notebooks

sys.path.append(str(ROOT / 'docs'))
import frames


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site with few frames a slider"
    if any(shutil.which(o) is None and not _there(o) for o in ('sphinx', 'myst_nb', 'furo')):
        pytest.skip('the packages of the extra [docs] are not installed')
    out = tmp_path_factory.mktemp('site') / 'html'
    res = subprocess.run(
        [sys.executable, ROOT / 'docs' / 'build.py', '--out', out, '--frames', '6'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert res.returncode == 0, res.stdout + res.stderr
    return out, res.stdout


def _there(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


class Page(html.parser.HTMLParser):
    "Links, ids and pictures of a page"

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.pictures, self.fetched = [], set(), [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if tag == 'img':
            self.pictures.append((a.get('src', ''), a.get('alt')))
        if tag in ('img', 'script', 'source', 'iframe') and a.get('src'):
            self.fetched.append(a['src'])
        if tag == 'link' and a.get('rel') not in ('prev', 'next', 'author', 'search', 'index') and a.get('href'):
            self.fetched.append(a['href'])


@pytest.fixture(scope='module')
def pages(site):
    return {p: Page(p) for p in site[0].rglob('*.html')}


FAR = ('http:', 'https:', 'mailto:', '//')


def broken(pages):
    "Links to pages, places in pages or files that do not exist"
    for p, page in pages.items():
        for link in {*page.links, *page.fetched}:
            if link.startswith((*FAR, 'data:', 'javascript:')):
                continue
            to, at = urldefrag(link)
            to = (p.parent / unquote(to.split('?')[0])).resolve() if to else p
            if to.is_dir():
                to = to / 'index.html'
            if not to.exists():
                yield f'{p.name}: {link} does not exist'
            elif at and to.suffix == '.html' and unquote(at) not in (pages.get(to) or Page(to)).ids:
                yield f'{p.name}: {link} has no such place'


def test_links(pages, told):
    none_found(broken(pages), 'Broken links:')
    told(f'site: {len(pages)} pages, {sum(len(p.links) for p in pages.values())} links, 0 broken')


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / 'a.html').write_text('<a href="b.html">b</a> <a href="#here">here</a> <p id="there">')
    assert sorted(broken({tmp_path / 'a.html': Page(tmp_path / 'a.html')})) == [
        'a.html: #here has no such place',
        'a.html: b.html does not exist',
    ]


CLASS_IN_CELLS = """
class A: pass
class B: pass
@patch
def size(self: A, n: int): return n
@patch(cls_method=True)
def load(cls: A): return A()
@patch
def other(self: B): return 1
@cache
def plain(a: A): return a
A.load().size(2)
"""


def test_a_slider_gets_the_methods_that_are_added_to_a_class_it_uses():
    *before, last = ast.parse(CLASS_IN_CELLS).body
    assert [s.name for s in frames.needed(before, last)] == ['A', 'size', 'load']


def test_a_slider_gets_what_is_defined_after_its_use():
    *before, last = ast.parse('def a(): return b()\ndef c(): return 1\ndef b(): return 2\na()').body
    assert [s.name for s in frames.needed(before, last)] == ['a', 'b']


def test_every_notebook_and_module_has_a_page(site):
    out = site[0]
    none_found([nb.name for nb in notebooks() if not (out / f'{nb.name}.html').exists()], 'Notebooks without a page:')
    none_found(
        [nb.module for nb in notebooks() if nb.module and not (out / 'api' / f'{nb.module}.html').exists()],
        'Modules without a page:',
    )


def test_pictures_have_words(pages):
    none_found(
        [f'{p.name}: {s[:60]}' for p, page in pages.items() for s, alt in page.pictures if not (alt or '').strip()],
        'Pictures without an alt text:',
    )


def test_nothing_is_fetched_from_elsewhere(pages):
    none_found(
        [f'{p.name}: {s}' for p, page in pages.items() for s in page.fetched if s.startswith(FAR)],
        'Fetched from elsewhere:',
    )


@pytest.fixture(scope='module')
def address(site):
    "The site on loopback"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=site[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


SHOWN = "() => { const i = document.querySelector('.frames img'); return i.complete && i.naturalWidth > 100 }"
PIXELS = """() => {
  const i = document.querySelector('.frames img'), c = document.createElement('canvas')
  c.width = i.naturalWidth; c.height = i.naturalHeight
  c.getContext('2d').drawImage(i, 0, 0)
  return c.toDataURL()
}"""
SLIDERS = {
    '00_tour.html',
    'importance/importance.html',
    'pruning/layer_pruning.html',
    'pruning/width_pruning.html',
    'recovery/data_efficiency.html',
    'recovery/recipes.html',
}


def move_every_control(page, name):
    "Every slider and menu of a page, by keyboard; each has to change the picture."
    page.wait_for_function(SHOWN)
    for box in page.locator('.frames').first.locator('input, select').all():
        before, at = page.evaluate(PIXELS), box.input_value()
        last = box.evaluate('c => c.options ? c.selectedIndex == c.options.length-1 : c.value == c.max')
        box.focus()
        page.keyboard.press('ArrowLeft' if last else 'ArrowRight')
        assert box.input_value() != at, f'{name}: a control stays where it is'
        page.wait_for_function(SHOWN)
        assert page.evaluate(PIXELS) != before, f'{name}: the picture stays as it is'
    assert page.locator('.frames img').first.get_attribute('alt').count(' ') > 3


@pytest.mark.browser
def test_in_a_browser(site, address, browser, pages):
    with outside(browser, address) as (page, asked):
        faults = []
        page.on('pageerror', lambda e: faults.append(str(e)))
        page.goto(f'{address}/index.html')
        assert page.locator('.sidebar-tree a').count() > 20
        with_frames = [p for p in pages if 'class="frames"' in p.read_text(encoding='utf-8')]
        sliders = sorted(p.relative_to(site[0]).as_posix() for p in with_frames)
        assert SLIDERS <= {*sliders}
        for name in sliders:
            page.goto(f'{address}/{name}')
            move_every_control(page, name)
        page.goto(f'{address}/api/importance.importance.html')
        entry = page.locator('dl.py', has=page.locator('[id="lvlm_study.importance.importance.score"]')).first
        assert 'limit' in entry.inner_text()
        page.goto(f'{address}/search.html?q=block_influence')
        page.locator('#search-results li').first.wait_for()
        page.goto(f'{address}/importance/taylor.html')
        assert page.locator('math').count() > 0
        assert faults == [] and asked == []


def test_the_menu_follows_the_chapters(site):
    text = (site[0] / 'index.html').read_text(encoding='utf-8')
    menu = text[text.index('class="sidebar-tree"') :]
    at = [menu.index(f'href="{nb.name}.html"') for nb in notebooks() if nb.name != 'index']
    assert at == sorted(at)
    for chapter in filter(None, chapters()):
        assert f'<span class="caption-text">{chapter.capitalize()}</span>' in menu


@pytest.mark.browser
def test_a_small_screen(address, browser):
    "Wide tables and code scroll by themselves, not the page."
    with outside(browser, address) as (page, asked):
        page.set_viewport_size(dict(width=390, height=844))
        wide = '() => document.documentElement.scrollWidth - document.documentElement.clientWidth'
        names = ('index', '00_tour', 'pruning/model_types', 'pruning/layer_pruning', 'study/runner', 'api/pruning.plan')
        for name in names:
            page.goto(f'{address}/{name}.html')
            assert page.evaluate(wide) <= 0, name


@pytest.mark.browser
def test_light_and_dark(address, browser):
    shade = {}
    brightness = """() => getComputedStyle(document.body).backgroundColor
        .match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"""
    for scheme in ('light', 'dark'):
        with outside(browser, address, color_scheme=scheme) as (page, asked):
            page.goto(f'{address}/importance/importance.html')
            shade[scheme] = page.evaluate(brightness)
            assert asked == []
    assert shade['light'] > 600 > 200 > shade['dark']
