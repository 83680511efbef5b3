"""The documentation site from the notebooks, without quarto: `python docs/build.py` writes _site/index.html.

Outputs are those stored in the notebooks. Only what a slider needs is run, to draw its frames beforehand."""

import argparse, ast, base64, html, importlib, inspect, json, re, shutil, struct, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]
import frames

NBS, OUT, PACKAGE = ROOT / 'nbs', ROOT / '_site', 'lvlm_study'
SRC = Path(tempfile.mkdtemp()) / 'pages'  # what Sphinx reads
EXPORTED, SKIPPED = {'export', 'exports', 'exporti'}, {'slow', 'gpu', 'net', 'notest', 'real'}

NO_KERNEL = '<p class="where">A widget: its controls are shown in JupyterLab.</p>'


def chapters():
    "Chapter -> names of its notebooks, as in 'importance/taylor', in reading order."
    listed = json.loads((NBS / 'chapters.json').read_text())
    return {c: [f'{c}/{n}'.strip('/') for n in names] for c, names in listed.items()}


def notebooks():
    "Files of all notebooks but the index, in reading order."
    return [NBS / f'{n}.ipynb' for names in chapters().values() for n in names]


def name_of(path):
    "A notebook's page: its path below `nbs` without the ending."
    return path.relative_to(NBS).with_suffix('').as_posix()


def module_file(name):
    return ROOT / PACKAGE / f'{name.replace(".", "/")}.py'


# --- names ------------------------------------------------------------------------------------------------------


def modules(nbs):
    "module -> (its notebook, the module)"
    found = {p: re.search(r'^#\|\s*default_exp\s+(\S+)', first_source(p), re.M) for p in nbs}
    return {
        m[1]: (p, importlib.import_module(f'{PACKAGE}.{m[1]}'))
        for p, m in found.items()
        if m and module_file(m[1]).exists()
    }


def first_source(path):
    return ''.join(json.loads(path.read_text())['cells'][0]['source'])


def own_names(name, mod):
    "Public names that a module defines itself, in its order"
    tree = ast.parse(module_file(name).read_text())
    here = set()
    for n in tree.body:
        here |= (
            frames.defined(n) if isinstance(n, (ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)) else set()
        )
    return [n for n in mod.__all__ if n in here]


class Links:
    "`name` in prose becomes a link to the reference; of two things with one name, that of the page's own module."

    def __init__(self, mods):
        self.of = {}
        for m, (_, mod) in mods.items():
            for n in own_names(m, mod):
                self.of.setdefault(n, []).append(m)

    def __call__(self, text, here=''):
        def link(m):
            where = self.of.get(m[1], [])
            where = here if here in where else where[0] if len(where) == 1 else None
            return f'{{py:obj}}`{m[1]} <{PACKAGE}.{where}.{m[1]}>`' if where else m[0]

        parts = re.split(
            r'(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))', text, flags=re.M | re.S
        )  # code, headings and links stay
        return ''.join(
            p if i % 2 else re.sub(r'(?<![`{}\w])`([A-Za-z_]\w*)`(?!`)', link, p) for i, p in enumerate(parts)
        )


# --- a page for each notebook -----------------------------------------------------------------------------------


def order(text, names):
    "The mermaid graph of the reading order as a row of links for each of its lines"
    label = dict(re.findall(r'(\w+)\[([^\]]+)\]', text))
    rows = []
    for line in text.splitlines():
        ids = (
            [re.match(r'\w+', p.strip())[0] for p in line.split('-->') if re.match(r'\s*\w', p)]
            if '-->' in line
            else []
        )

        def page(t):
            return next((n for n in names if n.split('/')[-1].replace('_', ' ') == t.lower()), None)

        def item(t):
            return f'<a href="{page(t)}.html">{html.escape(t)}</a>' if page(t) else f'<span>{html.escape(t)}</span>'

        if ids:
            rows.append('<ol class="order">' + ''.join(f'<li>{item(label.get(i, i))}</li>' for i in ids) + '</ol>')
    return '\n'.join(rows)


def alts(cells):
    "slug of a figure -> what the prose says it shows"
    return {
        s: a
        for c in cells
        if c['cell_type'] == 'markdown'
        for a, s in re.findall(r'!\[([^\]]*)\]\((?:\.\./)*figures/([\w-]+)\.png', c['source'])
    }


def sharp(cell, slug):
    "Put the finer figure of the repository in place of the one in the output; returns the width to show it with."
    file = ROOT / 'figures' / f'{slug}.png'
    pics = [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
    if not file.exists() or len(pics) != 1:
        return None
    raw = file.read_bytes()
    pics[0]['data']['image/png'] = base64.b64encode(raw).decode()
    return round(struct.unpack('>I', raw[16:20])[0] * 96 / 144)


def columns_told(text, most=36):
    "Tables whose columns of long texts are marked, so that these are broken into lines and the others are not"

    def told(table):
        rows = [re.findall(r'<t[dh][^>]*>(.*?)</t[dh]>', r, re.S) for r in re.findall(r'<tr.*?</tr>', table[0], re.S)]
        wide = max(map(len, rows), default=0)
        long = {
            i
            for r in rows
            if len(r) == wide
            for i, c in enumerate(r)
            if len(html.unescape(re.sub('<.*?>', '', c))) > most
        }
        at = iter(())

        def cell(m):
            nonlocal at
            if m[0].startswith('<tr'):
                at = iter(range(wide))
                return m[0]
            return f'<{m[1]} class="{"long" if next(at, -1) in long else "short"}"'

        return re.sub(r'<tr\b|<(t[dh])\b', cell, table[0])

    return re.sub(r'<table.*?</table>', told, text, flags=re.S)


def site_cells(nb, links, module, names, pics):
    "The cells of a notebook as the site shows them"
    said, before = alts(nb.cells), ''
    for c in nb.cells:
        flags = set(c.pop('directives_', {}))
        tags = []
        src = ''.join(l for l in c.source.splitlines(True) if not re.match(r'\s*#\s*\|', l)).strip('\n')
        if c.cell_type == 'markdown':
            src = re.sub(r'^```mermaid\n(.*?)^```', lambda m: order(m[1], names) or m[0], src, flags=re.M | re.S)
            before = re.sub(r'\s+', ' ', re.sub(r'[*_`#>]|!\[[^\]]*\]\([^)]*\)', '', src)).strip()
            src = re.sub(r'(?<=\]\()\.\./((?:\.\./)?figures/)', r'\1', src)  # one level less than in the repository
            c['source'] = links(src, module)
            yield c
            continue
        if 'default_exp' in flags or not src:
            continue
        slug = re.search(r"save_figure\(.*?,\s*'([\w-]+)'\s*,?\s*\)", src, re.S)
        alt = said.get(slug[1], '') if slug else ''
        show = dict(alt=alt or re.split(r'(?<=[.:!?])\s', before)[0][:200] or 'Figure')
        if slug and (width := sharp(c, slug[1])):
            show['width'] = f'{width}px'
        body = ast.parse(src).body if not src.lstrip().startswith('%') else []
        if EXPORTED & flags:
            tags.append('exported')
        if SKIPPED & flags or 'eval:' in flags:
            tags.append('slow')
        if 'echo:' in flags or 'hide_input' in flags:
            tags.append('remove-input')
        elif body and (
            all(isinstance(b, (ast.Import, ast.ImportFrom)) for b in body) or 'set_verbosity' in src and len(src) < 250
        ):
            tags.append('hide-input')
        for o in c.get('outputs', []):
            if 'text/html' in o.get('data', {}):
                o['data']['text/html'] = columns_told(
                    re.sub(r'<style scoped>.*?</style>', '', ''.join(o['data']['text/html']), flags=re.S)
                )
        if c.id in pics:
            c['outputs'] = [
                dict(output_type='display_data', metadata={}, data={'text/html': pics[c.id], 'text/plain': 'slider'})
            ]
        elif (
            not c.get('outputs')
            and body
            and isinstance(body[-1], ast.Expr)
            and isinstance(body[-1].value, ast.Name)
            and not {'slow', 'exported'} & set(tags)
        ):
            c['outputs'] = [
                dict(output_type='display_data', metadata={}, data={'text/html': NO_KERNEL, 'text/plain': 'controls'})
            ]
        c['source'], c['metadata'] = src, dict(tags=tags, mystnb=dict(image=show))
        yield c


def merged(cells):
    "Imports and set-up that follow one another as one cell"
    out = []
    for c in cells:

        def fold(x):
            return x['cell_type'] == 'code' and 'hide-input' in x['metadata']['tags'] and not x.get('outputs')

        if out and fold(c) and fold(out[-1]):
            out[-1]['source'] += '\n\n' + c['source']
        else:
            out.append(c)
    return out


def write_page(path, links, module, names, most, index=False):
    "One notebook, through nbdev's processors, into the sources of the site"
    from execnb.nbio import mk_cell, read_nb, write_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import hide_, hide_line, populate_language, rm_header_dash, strip_ansi

    nb = read_nb(path)
    live = [
        (c.id, c.source)
        for c in nb.cells
        if c.cell_type == 'code'
        and not re.match(r'\s*#\|\s*(slow|gpu|net|notest|eval: *false)', c.source)
        and not c.source.lstrip().startswith('%')
    ]
    pics = frames.of_notebook(live, name_of(path), SRC / '_static', most, path.parent)
    proc = NBProcessor(
        nb=nb, procs=[populate_language, hide_, hide_line, strip_ansi, rm_header_dash], rm_directives=False
    )
    proc.process()
    cells = merged(site_cells(nb, links, module, names, pics))
    if not index:
        where = f'Notebook `nbs/{path.relative_to(NBS)}`'
        where += f', exported to {{py:mod}}`{PACKAGE}.{module}`' if module else ''
        head = cells[0]['source']
        at = re.search(r'^> .*$', head, re.M)
        cells[0]['source'] = (
            (head[: at.end()] if at else head) + f'\n\n{{.where}}\n{where}\n' + (head[at.end() :] if at else '')
        )
    else:
        cells.append(mk_cell(toctree(names), 'markdown'))
    nb['cells'] = cells
    nb['metadata'] = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    page = SRC / path.relative_to(NBS)
    page.parent.mkdir(exist_ok=True)
    write_nb(nb, page)
    return len(pics)


def heading(path):
    "What a notebook is called"
    nb = json.loads(path.read_text())
    return next(
        m[1]
        for c in nb['cells']
        if c['cell_type'] == 'markdown' and (m := re.search(r'^# (.+)$', ''.join(c['source']), re.M))
    )


def toctree(names):
    "The menu of the site: a part for each chapter, then the reference."
    parts = []
    for chapter, pages in chapters().items():
        rows = '\n'.join(f'{heading(NBS / f"{n}.ipynb")} <{n}>' for n in pages)
        parts.append(f'```{{toctree}}\n:hidden:\n:caption: {chapter.capitalize() or "Start here"}\n\n{rows}\n```')
    parts.append('```{toctree}\n:hidden:\n:caption: Reference\n\nAll modules <api/index>\n```')
    return '\n\n'.join(parts)


# --- the reference ----------------------------------------------------------------------------------------------


def brief(x, most=60):
    s = getattr(x, '__name__', None) if inspect.isfunction(x) or inspect.isclass(x) else repr(x)
    return s if s and len(s) <= most and not re.search(r'<| at 0x', s) else '...'


def anno(a):
    return (
        ''
        if a is None or a is inspect.Parameter.empty
        else re.sub(r'\b[\w.]+\.(?=\w)', '', getattr(a, '__name__', None) if inspect.isclass(a) else str(a))
    )


def arguments(obj, bound=False):
    "(signature, rows of the table of arguments, what is returned) from docments"
    from fastcore.docments import docments, empty

    docs = docments(obj, full=True, returns=True)
    sig = inspect.signature(obj)
    parts, rows, star = [], [], False
    for k, p in sig.parameters.items():
        if bound and p is next(iter(sig.parameters.values())):
            continue
        d = docs.get(k)
        default = (
            ''
            if p.default is p.empty
            else '...'
            if type(p.default).__name__ == '_HAS_DEFAULT_FACTORY_CLASS'
            else brief(p.default)
        )
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append('*')
            star = True
        star = star or p.kind is p.VAR_POSITIONAL
        parts.append(
            {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
            + k
            + (f'={default}' if p.default is not p.empty else '')
        )
        rows.append((k, anno(p.annotation), default, (d.docment if d and d.docment and d.docment is not empty else '')))
    r = docs.get('return')
    back = ' '.join(
        x
        for x in (
            f'`{anno(r.anno)}`' if r and anno(r.anno) else '',
            (r.docment if r and r.docment and r.docment is not empty else ''),
        )
        if x
    )
    return f'({", ".join(parts)})', rows, back.strip()


def entry(kind, name, obj, links, module, ticks=4, bound=False):
    "A function, class or method in the reference"
    try:
        sig, rows, back = arguments(obj, bound)
    except (ValueError, TypeError):
        sig, rows, back = '', [], ''

    def cell(s):
        return links(str(s).replace('\n', ' ').replace('|', '\\|'), module)

    doc = (
        (inspect.getdoc(obj) or '')
        if not (inspect.isclass(obj) and obj.__doc__ and obj.__doc__.startswith(obj.__name__ + '('))
        else ''
    )
    out = [f'{":" * ticks}{{py:{kind}}} {name}{sig}', '', links(doc, module)]
    if rows:
        out += [
            '',
            '| argument | type | default | |',
            '| --- | --- | --- | --- |',
            *(
                f'| `{k}` | {f"`{t}`" if t else ""} | {f"`{d}`" if d else ""} | {cell(c)} |'.replace('`|', '`\\|')
                for k, t, d, c in rows
            ),
        ]
    if back:
        out += ['', f'Returns {cell(back)}']
    if inspect.isclass(obj):
        out += methods(obj, links, module)
    return [*out, ':' * ticks, '']


def methods(cls, links, module):
    out = ['']
    for n, f in vars(cls).items():
        if n[0] == '_':
            continue
        if isinstance(f, property) or type(f).__name__ == 'cached_property':
            out += [f':::{{py:property}} {n}', '', links(inspect.getdoc(f) or '', module), ':::', '']
        elif inspect.isfunction(g := getattr(f, '__func__', f)) and g.__module__.startswith(PACKAGE):
            out += entry('method', n, g, links, module, 3, not isinstance(f, staticmethod))
    return out


def reference(name, path, mod, links):
    "The page of a module"
    own = own_names(name, mod)
    again = [n for n in mod.__all__ if n not in own]
    out = [
        f'# {name}',
        '',
        f'> {(mod.__doc__ or "").strip()}',
        '',
        f'Notebook [{name_of(path).replace("_", " ")}](../{path.relative_to(NBS)})',
        '',
        f':::{{py:module}} {PACKAGE}.{name}',
        ':::',
        '',
    ]
    objects = {n: getattr(mod, n) for n in own}
    plain = [n for n, o in objects.items() if not (inspect.isclass(o) or callable(o) and hasattr(o, '__code__'))]
    for n, o in objects.items():
        if n not in plain:
            out += entry('class' if inspect.isclass(o) else 'function', n, o, links, name)
    if plain:
        out += ['## Constants', '']
    for n in plain:
        out += [
            f':::{{py:data}} {n}',
            *([f':value: {brief(objects[n], 200)}'] if brief(objects[n], 200) != '...' else []),
            ':::',
            '',
        ]
    if again:
        out += ['Also to be had from here: ' + links(', '.join(f'`{n}`' for n in again), ''), '']
    (SRC / 'api' / f'{name}.md').write_text('\n'.join(out))
    return len(own)


def write_reference(mods, links):
    (SRC / 'api').mkdir(parents=True)
    count = {m: reference(m, p, mod, links) for m, (p, mod) in mods.items()}
    rows = [f'| [{m}]({m}.md) | {links((mod.__doc__ or "").strip(), m)} | {count[m]} |' for m, (p, mod) in mods.items()]
    tree = '\n'.join(mods)
    (SRC / 'api' / 'index.md').write_text(
        '\n'.join(
            [
                '# Reference',
                '',
                '> Every public name of the package, with its arguments.',
                '',
                '| module | what it holds | names |',
                '| --- | --- | --- |',
                *rows,
                '',
                f'```{{toctree}}\n:hidden:\n\n{tree}\n```',
                '',
            ]
        )
    )
    return sum(count.values())


# --- all of it --------------------------------------------------------------------------------------------------


def build(out=OUT, most=120):
    "Write the sources, call Sphinx; returns what was built, in numbers"
    from sphinx.cmd.build import build_main

    start, names = time.time(), [name_of(p) for p in notebooks()]
    __import__('transformers').logging.disable_progress_bar()
    (SRC / '_static').mkdir(parents=True)
    for f in ('site.css', 'frames.js'):
        shutil.copy(ROOT / 'docs' / f, SRC / '_static')
    shutil.copytree(ROOT / 'figures', SRC / 'figures')
    mods = modules(notebooks())
    links = Links(mods)
    of = {name_of(p): m for m, (p, _) in mods.items()}
    sliders = sum(write_page(NBS / f'{n}.ipynb', links, of.get(n, ''), names, most) for n in names)
    write_page(NBS / 'index.ipynb', links, '', names, 0, index=True)
    listed = write_reference(mods, links)
    drawn = len(list((SRC / '_static').glob('frames/*/*.png')))
    print(
        f'{len(names)} notebooks, {len(mods)} modules with {listed} names, {sliders} sliders over {drawn} frames: '
        f'{time.time() - start:.0f} s',
        flush=True,
    )
    made = SRC.parent / 'html'
    if build_main(
        [
            '-q',
            '-W',
            '--keep-going',
            '-j',
            '2',
            '-b',
            'html',
            '-c',
            str(ROOT / 'docs'),
            '-D',
            f'html_static_path={SRC / "_static"}',
            '-d',
            str(SRC.parent / 'doctrees'),
            str(SRC),
            str(made),
        ]
    ):
        sys.exit('The site has faults: see above.')
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(made, out)
    pages = sum(1 for _ in Path(out).rglob('*.html'))
    size = sum(p.stat().st_size for p in Path(out).rglob('*') if p.is_file())
    print(f'{Path(out).name}/index.html: {pages} pages, {size / 1e6:.1f} MB, {time.time() - start:.0f} s in all')
    return dict(pages=pages, sliders=sliders, frames=drawn, names=listed)


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', default=OUT, type=Path, help='folder of the site (default: _site)')
    ap.add_argument(
        '--frames',
        default=120,
        type=int,
        help='pictures a widget may have; beyond that, menus stay and sliders get fewer stops (default: 120)',
    )
    a = ap.parse_args()
    try:
        build(a.out, a.frames)
    finally:
        shutil.rmtree(SRC.parent)
