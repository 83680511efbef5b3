"""The rules for the form of a notebook, one function each.

A guard takes a notebook (a `Notebook`) and yields one line for each breach, naming the cell. GUARDS lists them all.
`test_notebooks.py` applies them; `test_guards.py` breaks each one on purpose."""
import ast, io, json, re, tokenize
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS,FIGURES,PACKAGE = ROOT/'nbs', ROOT/'figures', 'lvlm_study'
EXPORTS = {'export', 'exports', 'exporti'}
WIDGET_VIEW,WIDGET_STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'
MACHINE_PATH = re.compile(r'(?<![\w.])/(?:home|Users|root|tmp|work|workspace|mnt|content|private)/|\b[A-Z]:\\+\w')
PROGRESS = re.compile(r'\d+%\||\bit/s\b|\bs/it\b|\r(?!\n)')
WARNING = re.compile(r'\b(?:[A-Z]\w*)?Warning:|\bwarnings\.warn\(|^WARNING\b', re.M)
SLUG = re.compile(r'\d\d[a-z]?-[a-z0-9]+(?:-[a-z0-9]+)*')
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)
LITERALS = (ast.List, ast.Tuple, ast.Set, ast.Dict)

class Cell:
    "A cell with what the guards ask of it."
    def __init__(self, js, i):
        self.js,self.i,self.kind = js,i,js['cell_type']
        self.source = ''.join(js['source'])
        self.outputs = js.get('outputs', [])
        self.code = self.kind=='code'
        lines = [o for o in self.source.splitlines() if o.strip()]
        head = next((i for i,o in enumerate(lines) if not re.match(r'\s*#\s*\|', o)), len(lines))
        self.flags = {re.sub(r'\s*#\s*\|', '', o).split()[0].rstrip(':') for o in lines[:head] if re.sub(r'\s*#\s*\|', '', o).split()}
        self.lines = lines[head:]
        self.exported = self.code and bool(EXPORTS & self.flags)
        first = next(iter(self.lines or lines), '')[:60]
        self.name = f'cell {i} [{js.get("id", "no id")}] {first!r}'
    @cached_property
    def tree(self):
        "The parsed code; lines with magics are blanked out."
        src = '' if not self.code or self.source.lstrip().startswith('%%') else re.sub(r'^[ \t]*[%!].*$', 'pass', self.source, flags=re.M)
        return ast.parse(src)
    @property
    def is_imports(self): return bool(self.tree.body) and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in self.tree.body)
    def texts(self):
        "Everything a reader of the page can read in the outputs"
        for o in self.outputs:
            for v in (o.get('text', []), *(v for k,v in o.get('data', {}).items() if k.startswith('text/') or k=='image/svg+xml')): yield ''.join(v)

class Notebook:
    "A notebook file."
    def __init__(self, path):
        self.path,self.name = Path(path),Path(path).stem
        self.js = json.loads(self.path.read_text(encoding='utf-8'))
        self.cells = [Cell(c, i) for i,c in enumerate(self.js['cells'])]
        self.code = [c for c in self.cells if c.code]
        self.number = (re.match(r'\d+[a-z]?(?=_)', self.name) or [''])[0]      # '' for index
        self.module = next((m[1] for c in self.code if (m:=re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)

def notebooks(folder=NBS):
    "All notebooks, in order"
    return [Notebook(p) for p in sorted(Path(folder).glob('*.ipynb')) if p.name[0] not in '._']

# --- the file ---------------------------------------------------------------------------------------------------

def format_with_ids(nb):
    "nbformat 4.5, and every cell has an id of its own."
    if (nb.js.get('nbformat'), nb.js.get('nbformat_minor')) != (4, 5): yield f'nbformat is {nb.js.get("nbformat")}.{nb.js.get("nbformat_minor")}, not 4.5'
    seen = set()
    for c in nb.cells:
        id = c.js.get('id')
        if not id: yield f'{c.name}: no id'
        elif id in seen: yield f'{c.name}: the id is taken'
        seen.add(id)

def no_metadata(nb):
    "No execution counts, and no metadata but the kernel's name and tags."
    extra = nb.js['metadata'].keys() - {'kernelspec'}
    if extra: yield f'notebook metadata: {", ".join(sorted(extra))}'
    kernel = nb.js['metadata'].get('kernelspec', {})
    if kernel.get('name', 'python3')!='python3' or kernel.get('display_name', 'python3')!='python3': yield f'the kernel is {kernel}, not python3'
    for c in nb.cells:
        extra = c.js.get('metadata', {}).keys() - {'tags'}
        if extra: yield f'{c.name}: metadata {", ".join(sorted(extra))}'
        if c.js.get('execution_count') is not None or any(o.get('execution_count') is not None for o in c.outputs): yield f'{c.name}: an execution count'

def small_file(nb):
    "A notebook has at most 90 cells and 300 kB."
    size = nb.path.stat().st_size
    if size > 300_000: yield f'{size//1000} kB; 300 is the most'
    if len(nb.cells) > 90: yield f'{len(nb.cells)} cells; 90 is the most'

# --- outputs ----------------------------------------------------------------------------------------------------

def no_errors(nb):
    "No stored output is an error."
    for c in nb.code:
        if any(o['output_type']=='error' for o in c.outputs): yield f'{c.name}: a stored error'

def no_machine_paths(nb):
    "No path of one machine stands in a cell or an output."
    for c in nb.cells:
        for where,txt in (('', c.source), *((' in the output', t) for t in c.texts())):
            if m := MACHINE_PATH.search(txt): yield f'{c.name}: a machine path{where}: {txt[m.start():m.start()+40]!r}'

def no_noise(nb):
    "Outputs hold no progress bars, no warnings and nothing from stderr."
    for c in nb.code:
        if any(o.get('name')=='stderr' for o in c.outputs): yield f'{c.name}: output on stderr'
        for txt in c.texts():
            if PROGRESS.search(txt): yield f'{c.name}: a progress bar in the output'
            if WARNING.search(txt): yield f'{c.name}: a warning in the output'

def no_widget_state(nb):
    "No widget is stored: GitHub refuses such notebooks."
    if 'widgets' in nb.js['metadata']: yield 'widget state in the metadata'
    for c in nb.code:
        if any(k in o.get('data', {}) for o in c.outputs for k in (WIDGET_VIEW, WIDGET_STATE)): yield f'{c.name}: a widget in the output'

# --- imports ----------------------------------------------------------------------------------------------------

def parses(nb):
    "Every code cell is Python."
    for c in nb.code:
        try: c.tree
        except SyntaxError as e: yield f'{c.name}: {e}'

def imports_apart(nb):
    "A cell with an import holds only imports. Inside an exported function a third-party import may come late."
    for c in nb.code:
        if c.is_imports: continue
        late = {n for f in ast.walk(c.tree) if isinstance(f, DEFS) for n in ast.walk(f)} if c.exported else set()
        for n in ast.walk(c.tree):
            if isinstance(n, (ast.Import, ast.ImportFrom)) and (n not in late or any(m==PACKAGE for m,_ in imported(n))):
                yield f'{c.name}: an import among other code (line {n.lineno})'

def imported(node):
    "(package, module of lvlm_study or None) of an import statement"
    if isinstance(node, ast.ImportFrom):
        parts = (node.module or '').split('.')
        if node.level: return [(PACKAGE, parts[0] or None)]
        if parts==[PACKAGE]: return [(PACKAGE, a.name) for a in node.names]
        return [(parts[0], parts[1] if len(parts)>1 else None)]
    return [(p[0], p[1] if len(p)>1 else None) for p in (a.name.split('.') for a in node.names)]

def imports_point_down(nb):
    "A numbered notebook imports modules of lvlm_study only from notebooks with lower numbers."
    if not nb.number: return
    numbers = {o.module: o.number for o in notebooks(nb.path.parent)}
    for c in nb.code:
        for n in ast.walk(c.tree):
            if not isinstance(n, (ast.Import, ast.ImportFrom)): continue
            for mod in (m for p,m in imported(n) if p==PACKAGE and m and m!='__version__'):
                if mod not in numbers: yield f'{c.name}: no notebook exports {PACKAGE}.{mod}'
                elif numbers[mod] >= nb.number: yield f'{c.name}: imports {PACKAGE}.{mod}, which is notebook {numbers[mod]}'

def no_star_imports(nb):
    "Names are imported one by one, so that the linter can see an undefined one."
    for c in nb.code:
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name=='*' for n in ast.walk(c.tree)): yield f'{c.name}: a star import'

# --- the shape of the page --------------------------------------------------------------------------------------

def skeleton(nb):
    "First `default_exp` (where something is exported), then an H1 with a `> ` subtitle; no `nbdev_export()` call."
    if not nb.cells: yield 'no cells'; return
    exports = bool(nb.number) or any(c.exported for c in nb.code)
    if exports and not re.match(r'#\|\s*default_exp\s+\S+\s*$', nb.cells[0].source): yield f'{nb.cells[0].name}: the first cell is not `#| default_exp`'
    head = nb.cells[min(int(exports), len(nb.cells)-1)]
    if head.code or not re.match(r'# \S', head.source): yield f'{head.name}: no H1'
    elif not re.search(r'^> \S', head.source, re.M): yield f'{head.name}: no `> ` subtitle under the H1'
    for c in nb.code:
        if 'nbdev_export(' in c.source: yield f'{c.name}: exports from within'

def short_cells(nb):
    "An exported cell has at most 40 lines, any other 20 (blank ones and flags apart)."
    for c in nb.code:
        most = 40 if c.exported else 20
        if len(c.lines) > most: yield f'{c.name}: {len(c.lines)} lines; {most} is the most'

def enough_prose(nb):
    "A numbered notebook has one markdown cell to two code cells, or more."
    n = len(nb.code)
    if nb.number and n and (len(nb.cells)-n)/n < .5: yield f'{len(nb.cells)-n} markdown cells to {n} code cells'

def lessons_between(nb):
    "Never three exported cells in a row (import cells do not count)."
    run = 0
    for c in nb.cells:
        if c.code and c.is_imports: continue
        run = run+1 if c.exported else 0
        if run==3: yield f'{c.name}: the third exported cell in a row'

def links_resolve(nb):
    "Pictures and relative links in the prose exist."
    for c in nb.cells:
        if c.kind!='markdown': continue
        for link in links(c.source):
            if not (nb.path.parent/link).exists(): yield f'{c.name}: {link} does not exist'

def links(text):
    "Relative targets of links and pictures in markdown, code apart"
    text = re.sub(r'`[^`\n]*`', '', re.sub(r'^```.*?^```', '', text, flags=re.M|re.S))
    found = re.findall(r'\]\(\s*<?([^)\s>]+)', text) + re.findall(r'\b(?:src|href)=["\']([^"\']+)', text)
    return [o.split('#')[0] for o in found if not re.match(r'[a-z][a-z0-9+.-]*:|#|//', o, re.I)]

# --- the code ---------------------------------------------------------------------------------------------------

def no_bare_comparison(nb):
    "A comparison is asserted or assigned: standing alone it can never fail."
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, ast.Expr) and any(isinstance(o, ast.Compare) for o in (n.value, *getattr(n.value, 'values', []))): yield f'{c.name}: a comparison stands alone (line {n.lineno})'

def no_pasted_numbers(nb):
    "No literal with more than 6 decimal numbers: they belong in a file of results."
    def count(n):
        if isinstance(n, ast.UnaryOp): n = n.operand
        if isinstance(n, LITERALS): return sum(map(count, n.values if isinstance(n, ast.Dict) else n.elts))
        return int(isinstance(n, ast.Constant) and isinstance(n.value, float))
    for c in nb.code:
        most = max((count(n) for n in ast.walk(c.tree) if isinstance(n, LITERALS)), default=0)
        if most > 6: yield f'{c.name}: {most} decimal numbers in one literal'

def no_final_print(nb):
    "A cell ends in a value, not in `print(value)`."
    for c in nb.code:
        last = c.tree.body[-1] if c.tree.body else None
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and getattr(last.value.func, 'id', '')=='print': yield f'{c.name}: ends in print'

def definitions(cell):
    "Functions and classes at the top of an exported cell, and methods: (node, name, public, its class or None)"
    for n in cell.tree.body:
        if not isinstance(n, (*DEFS, ast.ClassDef)): continue
        yield n, n.name, n.name[0]!='_', None
        if isinstance(n, ast.ClassDef):
            for m in n.body:
                if isinstance(m, DEFS): yield m, f'{n.name}.{m.name}', n.name[0]!='_' and (m.name[0]!='_' or m.name=='__init__'), n

def one_line_docstrings(nb):
    "Every public function and class has a docstring, and every docstring is one line."
    for c in nb.code:
        for n,name,public,klass in definitions(c) if c.exported else ():
            doc = ast.get_docstring(n, clean=False)
            if doc is None and public and klass is None: yield f'{c.name}: {name} has no docstring'
            if doc is not None and '\n' in doc: yield f'{c.name}: the docstring of {name} has more than one line'

def docments(nb):
    "Every argument of a public function has a line of its own and a comment on it."
    for c in nb.code:
        if not c.exported: continue
        comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(c.source).readline) if t.type==tokenize.COMMENT}
        alone = {i for i,o in enumerate(c.source.splitlines(), 1) if o.lstrip().startswith('#')}
        for n,name,public,klass in definitions(c):
            if not public or isinstance(n, ast.ClassDef) or any(decorator(d)=='property' for d in n.decorator_list): continue
            own = klass is not None and not any(decorator(d)=='staticmethod' for d in n.decorator_list) or any(decorator(d)=='patch' for d in n.decorator_list)
            args = ([*n.args.posonlyargs, *n.args.args][int(own):] + [o for o in (n.args.vararg,) if o] + n.args.kwonlyargs
                    + ([n.args.kwarg] if n.args.kwarg and not any(decorator(d)=='delegates' for d in n.decorator_list) else []))
            for i,a in enumerate(args):
                shared = any(o.lineno==a.lineno for o in args[i+1:])
                if shared or not (a.lineno in comments or n.lineno < a.lineno-1 and a.lineno-1 in alone): yield f'{c.name}: argument {a.arg!r} of {name} has no comment of its own'

def decorator(d):
    "The name of a decorator, called or not"
    d = d.func if isinstance(d, ast.Call) else d
    return getattr(d, 'id', getattr(d, 'attr', ''))

def short_functions(nb):
    "No function is longer than 40 lines."
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, DEFS) and (size := n.end_lineno-n.lineno+1) > 40: yield f'{c.name}: {n.name} has {size} lines; 40 is the most'

GUARDS = [format_with_ids, no_metadata, small_file, no_errors, no_machine_paths, no_noise, no_widget_state, parses, imports_apart, imports_point_down,
          no_star_imports, skeleton, short_cells, enough_prose, lessons_between, links_resolve, no_bare_comparison, no_pasted_numbers, no_final_print,
          one_line_docstrings, docments, short_functions]

# --- all notebooks together -------------------------------------------------------------------------------------

def one_module_each(nbs):
    "No two notebooks export the same module, and the numbers are unique."
    for what in ('module', 'number'):
        seen = {}
        for nb in nbs:
            if v := getattr(nb, what):
                if v in seen: yield f'{nb.name} and {seen[v]} have the same {what}: {v}'
                seen[v] = nb.name

def figures_in_step(nbs, folder=FIGURES):
    "`save_fig(fig, 'NN-slug')` and figures/NN-slug.png come together."
    saved,named = {},set()
    for nb in nbs:
        for c in nb.code:
            for n in ast.walk(c.tree):
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and SLUG.fullmatch(n.value): named.add(n.value)
                if not (isinstance(n, ast.Call) and decorator(n)=='save_fig' and len(n.args)+len(n.keywords)==2): continue
                slug = next((o.value for o in (*n.args[1:], *(k.value for k in n.keywords)) if isinstance(o, ast.Constant)), None)
                if slug is not None: saved[slug] = f'{nb.name} {c.name}'
    there = {p.stem for p in Path(folder).glob('*.png')}
    for slug,where in sorted(saved.items()):
        if not SLUG.fullmatch(slug): yield f'{where}: the figure {slug!r} is not named NN-slug'
        elif slug not in there: yield f'{where}: figures/{slug}.png does not exist'
    for slug in sorted(there - named): yield f'figures/{slug}.png: no notebook saves it'
    for p in sorted(Path(folder).iterdir()):
        if p.suffix!='.png' and p.name!='.gitkeep': yield f'figures/{p.name}: only .png files are figures'
