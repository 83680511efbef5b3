"""The rules for the form of a notebook, one function each.

A guard takes a notebook (a `Notebook`) and yields one line for each breach, naming the cell. GUARDS lists them all.
`test_notebooks.py` applies them; `test_guards.py` breaks each one on purpose."""

import ast, io, json, re, tokenize
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, FIGURES, PACKAGE = ROOT / 'nbs', ROOT / 'figures', 'lvlm_study'
EXPORTS = {'export', 'exports', 'exporti'}
WIDGET_VIEW, WIDGET_STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'
MACHINE_PATH = re.compile(r'(?<![\w.])/(?:home|Users|root|tmp|work|workspace|mnt|content|private)/|\b[A-Z]:\\+\w')
PROGRESS = re.compile(r'\d+%\||\bit/s\b|\bs/it\b|\r(?!\n)')
WARNING = re.compile(r'\b(?:[A-Z]\w*)?Warning:|\bwarnings\.warn\(|^WARNING\b', re.M)
SLUG = re.compile(r'[a-z][a-z0-9]*(?:-[a-z0-9]+)*')
WIDTH = 120
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)
LITERALS = (ast.List, ast.Tuple, ast.Set, ast.Dict)


class Cell:
    "A cell with what the guards ask of it."

    def __init__(self, js, i):
        self.js, self.i, self.kind = js, i, js['cell_type']
        self.source = ''.join(js['source'])
        self.outputs = js.get('outputs', [])
        self.code = self.kind == 'code'
        lines = [o for o in self.source.splitlines() if o.strip()]
        head = next((i for i, o in enumerate(lines) if not re.match(r'\s*#\s*\|', o)), len(lines))
        self.flags = {
            re.sub(r'\s*#\s*\|', '', o).split()[0].rstrip(':')
            for o in lines[:head]
            if re.sub(r'\s*#\s*\|', '', o).split()
        }
        self.lines = lines[head:]
        self.exported = self.code and bool(EXPORTS & self.flags)
        first = next(iter(self.lines or lines), '')[:60]
        self.name = f'cell {i} [{js.get("id", "no id")}] {first!r}'

    @cached_property
    def tree(self):
        "The parsed code; lines with magics are blanked out."
        src = (
            ''
            if not self.code or self.source.lstrip().startswith('%%')
            else re.sub(r'^[ \t]*[%!].*$', 'pass', self.source, flags=re.M)
        )
        return ast.parse(src)

    @property
    def is_imports(self):
        return bool(self.tree.body) and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in self.tree.body)

    def texts(self):
        "Everything a reader of the page can read in the outputs"
        for o in self.outputs:
            for v in (
                o.get('text', []),
                *(v for k, v in o.get('data', {}).items() if k.startswith('text/') or k == 'image/svg+xml'),
            ):
                yield ''.join(v)


class Notebook:
    "A notebook file."

    def __init__(self, path, root=NBS):
        self.path = Path(path)
        self.root = Path(root)
        self.name = self.path.relative_to(root).with_suffix('').as_posix()  # such as 'importance/taylor'
        self.chapter = self.path.relative_to(root).parent.name  # '' for the index and the tour
        self.js = json.loads(self.path.read_text(encoding='utf-8'))
        self.cells = [Cell(c, i) for i, c in enumerate(self.js['cells'])]
        self.code = [c for c in self.cells if c.code]
        self.module = next(
            (m[1] for c in self.code if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None
        )


def chapters(folder=NBS):
    "Chapter -> names of its notebooks, in reading order; '' holds those that belong to none."
    return json.loads((Path(folder) / 'chapters.json').read_text())


def notebooks(folder=NBS):
    "All notebooks in reading order: the index, the tour, then chapter by chapter; those that are not listed come last."
    listed = [Path(folder, c, f'{n}.ipynb') for c, names in chapters(folder).items() for n in names]
    order = {p: i for i, p in enumerate([Path(folder, 'index.ipynb'), *listed])}
    found = sorted(Path(folder).rglob('*.ipynb'))
    there = [p for p in found if not any(o[0] in '._' for o in p.relative_to(folder).parts)]
    return [Notebook(p, folder) for p in sorted(there, key=lambda p: (order.get(p, len(order)), p))]


# --- the file ---------------------------------------------------------------------------------------------------


def format_with_ids(nb):
    "nbformat 4.5, and every cell has an id of its own."
    if (nb.js.get('nbformat'), nb.js.get('nbformat_minor')) != (4, 5):
        yield f'nbformat is {nb.js.get("nbformat")}.{nb.js.get("nbformat_minor")}, not 4.5'
    seen = set()
    for c in nb.cells:
        id = c.js.get('id')
        if not id:
            yield f'{c.name}: no id'
        elif id in seen:
            yield f'{c.name}: the id is taken'
        seen.add(id)


def no_metadata(nb):
    "No execution counts, and no metadata but the kernel's name and tags."
    extra = nb.js['metadata'].keys() - {'kernelspec'}
    if extra:
        yield f'notebook metadata: {", ".join(sorted(extra))}'
    kernel = nb.js['metadata'].get('kernelspec', {})
    if kernel.get('name', 'python3') != 'python3' or kernel.get('display_name', 'python3') != 'python3':
        yield f'the kernel is {kernel}, not python3'
    for c in nb.cells:
        extra = c.js.get('metadata', {}).keys() - {'tags'}
        if extra:
            yield f'{c.name}: metadata {", ".join(sorted(extra))}'
        if c.js.get('execution_count') is not None or any(o.get('execution_count') is not None for o in c.outputs):
            yield f'{c.name}: an execution count'


def small_file(nb):
    "A notebook has at most 110 cells and 300 kB."
    size = nb.path.stat().st_size
    if size > 300_000:
        yield f'{size // 1000} kB; 300 is the most'
    if len(nb.cells) > 110:
        yield f'{len(nb.cells)} cells; 110 is the most'


# --- outputs ----------------------------------------------------------------------------------------------------


def no_errors(nb):
    "No stored output is an error."
    for c in nb.code:
        if any(o['output_type'] == 'error' for o in c.outputs):
            yield f'{c.name}: a stored error'


def no_machine_paths(nb):
    "No path of one machine stands in a cell or an output."
    for c in nb.cells:
        for where, txt in (('', c.source), *((' in the output', t) for t in c.texts())):
            if m := MACHINE_PATH.search(txt):
                yield f'{c.name}: a machine path{where}: {txt[m.start() : m.start() + 40]!r}'


def no_noise(nb):
    "Outputs hold no progress bars, no warnings and nothing from stderr."
    for c in nb.code:
        if any(o.get('name') == 'stderr' for o in c.outputs):
            yield f'{c.name}: output on stderr'
        for txt in c.texts():
            if PROGRESS.search(txt):
                yield f'{c.name}: a progress bar in the output'
            if WARNING.search(txt):
                yield f'{c.name}: a warning in the output'


def no_widget_state(nb):
    "No widget is stored: GitHub refuses such notebooks."
    if 'widgets' in nb.js['metadata']:
        yield 'widget state in the metadata'
    for c in nb.code:
        if any(k in o.get('data', {}) for o in c.outputs for k in (WIDGET_VIEW, WIDGET_STATE)):
            yield f'{c.name}: a widget in the output'


# --- imports ----------------------------------------------------------------------------------------------------


def parses(nb):
    "Every code cell is Python."
    for c in nb.code:
        try:
            c.tree
        except SyntaxError as e:
            yield f'{c.name}: {e}'


def imports_apart(nb):
    "A cell with an import holds only imports. Inside an exported function a third-party import may come late."
    for c in nb.code:
        if c.is_imports:
            continue
        late = {n for f in ast.walk(c.tree) if isinstance(f, DEFS) for n in ast.walk(f)} if c.exported else set()
        for n in ast.walk(c.tree):
            if isinstance(n, (ast.Import, ast.ImportFrom)) and (
                n not in late or any(m == PACKAGE for m, _ in imported(n))
            ):
                yield f'{c.name}: an import among other code (line {n.lineno})'


def imported(node):
    "(package, module of lvlm_study or None) of an import statement"
    if isinstance(node, ast.ImportFrom):
        parts = (node.module or '').split('.')
        if node.level:
            return [(PACKAGE, parts[0] or None)]
        if parts == [PACKAGE]:
            return [(PACKAGE, a.name) for a in node.names]
        return [(parts[0], parts[1] if len(parts) > 1 else None)]
    return [(p[0], p[1] if len(p) > 1 else None) for p in (a.name.split('.') for a in node.names)]


def imports_in_order(nb):
    "A notebook imports only from its own and earlier chapters, or through the public door of `lvlm_study`."
    if not nb.chapter:
        return
    order = list(chapters(nb.root))
    chapter_of = {o.module: o.chapter for o in notebooks(nb.root) if o.module}
    for c in nb.code:
        for n in ast.walk(c.tree):
            for mod in modules_of(n):
                if mod not in chapter_of:
                    yield f'{c.name}: no notebook exports {PACKAGE}.{mod}'
                elif order.index(chapter_of[mod]) > order.index(nb.chapter):
                    yield f'{c.name}: imports {PACKAGE}.{mod}, which is of a later chapter'


def modules_of(node):
    "Modules of lvlm_study that an import statement names, as in 'core.store'; the public door counts as none."
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith(f'{PACKAGE}.'):
        return [node.module.removeprefix(f'{PACKAGE}.')]
    if isinstance(node, ast.Import):
        return [a.name.removeprefix(f'{PACKAGE}.') for a in node.names if a.name.startswith(f'{PACKAGE}.')]
    return []


def no_star_imports(nb):
    "Names are imported one by one, so that the linter can see an undefined one."
    for c in nb.code:
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name == '*' for n in ast.walk(c.tree)):
            yield f'{c.name}: a star import'


# --- the shape of the page --------------------------------------------------------------------------------------


def skeleton(nb):
    "First `default_exp` (where something is exported), then an H1 with a `> ` subtitle; no `nbdev_export()` call."
    if not nb.cells:
        yield 'no cells'
        return
    exports = bool(nb.chapter) or any(c.exported for c in nb.code)
    if exports and not re.match(r'#\|\s*default_exp\s+\S+\s*$', nb.cells[0].source):
        yield f'{nb.cells[0].name}: the first cell is not `#| default_exp`'
    head = nb.cells[min(int(exports), len(nb.cells) - 1)]
    if head.code or not re.match(r'# \S', head.source):
        yield f'{head.name}: no H1'
    elif not re.search(r'^> \S', head.source, re.M):
        yield f'{head.name}: no `> ` subtitle under the H1'
    for c in nb.code:
        if 'nbdev_export(' in c.source:
            yield f'{c.name}: exports from within'


def short_cells(nb):
    "An exported cell has at most 60 lines, any other 20 (blank ones and flags apart)."
    for c in nb.code:
        most = 60 if c.exported else 20
        if len(c.lines) > most:
            yield f'{c.name}: {len(c.lines)} lines; {most} is the most'


def enough_prose(nb):
    "A notebook has one markdown cell to two code cells, or more."
    n = len(nb.code)
    if n and (len(nb.cells) - n) / n < 0.5:
        yield f'{len(nb.cells) - n} markdown cells to {n} code cells'


def lessons_between(nb):
    "Never five exported cells in a row (import cells do not count)."
    run = 0
    for c in nb.cells:
        if c.code and c.is_imports:
            continue
        run = run + 1 if c.exported else 0
        if run == 5:
            yield f'{c.name}: the fifth exported cell in a row'


def links_resolve(nb):
    "Pictures and relative links in the prose exist."
    for c in nb.cells:
        if c.kind != 'markdown':
            continue
        for link in links(c.source):
            if not (nb.path.parent / link).exists():
                yield f'{c.name}: {link} does not exist'


def links(text):
    "Relative targets of links and pictures in markdown, code apart"
    text = re.sub(r'`[^`\n]*`', '', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))
    found = re.findall(r'\]\(\s*<?([^)\s>]+)', text) + re.findall(r'\b(?:src|href)=["\']([^"\']+)', text)
    return [o.split('#')[0] for o in found if not re.match(r'[a-z][a-z0-9+.-]*:|#|//', o, re.I)]


# --- the code ---------------------------------------------------------------------------------------------------


def no_bare_comparison(nb):
    "A comparison is asserted or assigned: standing alone it can never fail."
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, ast.Expr) and any(
                isinstance(o, ast.Compare) for o in (n.value, *getattr(n.value, 'values', []))
            ):
                yield f'{c.name}: a comparison stands alone (line {n.lineno})'


def no_pasted_numbers(nb):
    "No literal with more than 6 decimal numbers: they belong in a file of results."

    def count(n):
        if isinstance(n, ast.UnaryOp):
            n = n.operand
        if isinstance(n, LITERALS):
            return sum(map(count, n.values if isinstance(n, ast.Dict) else n.elts))
        return int(isinstance(n, ast.Constant) and isinstance(n.value, float))

    for c in nb.code:
        most = max((count(n) for n in ast.walk(c.tree) if isinstance(n, LITERALS)), default=0)
        if most > 6:
            yield f'{c.name}: {most} decimal numbers in one literal'


def no_final_print(nb):
    "A cell ends in a value, not in `print(value)`."
    for c in nb.code:
        last = c.tree.body[-1] if c.tree.body else None
        if (
            isinstance(last, ast.Expr)
            and isinstance(last.value, ast.Call)
            and getattr(last.value.func, 'id', '') == 'print'
        ):
            yield f'{c.name}: ends in print'


def definitions(cell):
    "Functions and classes at the top of an exported cell, and methods: (node, name, public, its class or None)"
    for n in cell.tree.body:
        if not isinstance(n, (*DEFS, ast.ClassDef)):
            continue
        yield n, n.name, n.name[0] != '_', None
        if isinstance(n, ast.ClassDef):
            for m in n.body:
                if isinstance(m, DEFS):
                    yield m, f'{n.name}.{m.name}', n.name[0] != '_' and (m.name[0] != '_' or m.name == '__init__'), n


def docstrings(nb):
    "Every public function and class has a docstring, and none only repeats the name."
    for c in nb.code:
        for n, name, public, klass in definitions(c) if c.exported else ():
            doc = ast.get_docstring(n)
            if doc is None:
                if public and klass is None:
                    yield f'{c.name}: {name} has no docstring'
                continue
            if public and words(doc) <= words(re.sub(r'([a-z])([A-Z])', r'\1 \2', name)) | {'a', 'an', 'the', 'of'}:
                yield f'{c.name}: the docstring of {name} only repeats its name: {doc!r}'


def words(text):
    "The words of a text or of a name, in small letters."
    return set(re.findall(r'[a-z]+', text.lower()))


def comments_of(source):
    "Line -> words of the comment on it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('#').split() for t in tokens if t.type == tokenize.COMMENT}


def parameters(node, klass):
    "Parameters of a function that its caller gives: not `self` of a method, nor what a decorator stands for."
    decorators = {decorator(d) for d in node.decorator_list}
    bound = 'patch' in decorators or klass is not None and 'staticmethod' not in decorators
    args = [*node.args.posonlyargs, *node.args.args][int(bound) :] + node.args.kwonlyargs
    rest = [node.args.vararg] + ([] if 'delegates' in decorators else [node.args.kwarg])
    return args + [a for a in rest if a]


def public_functions(cell):
    "Public functions and methods of an exported cell with what `definitions` says; properties are none."
    for n, name, public, klass in definitions(cell) if cell.exported else ():
        if public and isinstance(n, DEFS) and 'property' not in {decorator(d) for d in n.decorator_list}:
            yield n, name, klass


def docments(nb):
    "Every parameter of a public function has a type, and on a line of its own a comment of three words or more."
    for c in nb.code:
        comments = comments_of(c.source) if c.exported else {}
        for n, name, klass in public_functions(c):
            args = parameters(n, klass)
            for a in args:
                if a.annotation is None:
                    yield f'{c.name}: argument {a.arg!r} of {name} has no type'
                shared = any(o is not a and o.lineno == a.lineno for o in args)
                if shared or len(comments.get(a.end_lineno, ())) < 3:
                    yield f'{c.name}: argument {a.arg!r} of {name} has no comment of three words or more'


def return_types(nb):
    "Every public function says what it returns."
    for c in nb.code:
        for n, name, klass in public_functions(c):
            if n.returns is None and n.name != '__init__':
                yield f'{c.name}: {name} has no return type'


def fields_explained(nb):
    "Every field of a public dataclass has a comment of three words or more."
    for c in nb.code:
        comments = comments_of(c.source) if c.exported else {}
        for n in c.tree.body if c.exported else ():
            if not isinstance(n, ast.ClassDef) or n.name[0] == '_':
                continue
            for f in n.body:
                if isinstance(f, ast.AnnAssign) and len(comments.get(f.end_lineno, ())) < 3:
                    yield f'{c.name}: field {n.name}.{f.target.id} has no comment of three words or more'


def line_width(nb):
    "No line of code is longer than 120 columns."
    for c in nb.code:
        for i, line in enumerate(c.source.splitlines(), 1):
            if len(line) > WIDTH:
                yield f'{c.name}: line {i} has {len(line)} columns'


def one_statement_a_line(nb):
    "One statement a line: none joined by a semicolon, none behind the colon of another."
    for c in nb.code:
        seen = set()
        for n in ast.walk(c.tree):
            for body in (getattr(n, k, None) for k in ('body', 'orelse', 'finalbody')):
                for i in (o.lineno for o in body if isinstance(o, ast.stmt)) if isinstance(body, list) else ():
                    if i in seen or i == getattr(n, 'lineno', 0):
                        yield f'{c.name}: line {i} holds more than one statement'
                    seen.add(i)


def no_bound_lambda(nb):
    "No lambda is bound to a name: a function has a `def`."
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and isinstance(n.value, ast.Lambda):
                yield f'{c.name}: a lambda is bound to a name (line {n.lineno})'


def no_attached_methods(nb):
    "A class stands in one cell, or grows by `@patch`: nothing is assigned to an attribute of a class afterwards."
    for c in nb.code:
        for n in c.tree.body if c.exported else ():
            targets = [t for o in n.targets for t in ast.walk(o)] if isinstance(n, ast.Assign) else []
            for t in targets:
                if isinstance(t, ast.Attribute) and getattr(t.value, 'id', ' ')[0].isupper():
                    yield f'{c.name}: {ast.unparse(t)} is attached afterwards'


# What a reader meets, in code and prose, by one name only (the glossary of the tour has them all).
OTHER_WORDS = {
    r'\b[Bb]locks?\b(?! [Ii]nfluence)': 'layer',
    r'\bKV[ -]groups?\b': 'KV head',
    r'\b[Aa]natom(?:y|ies)\b': 'architecture',
    r'\b[Rr]ealised\b': 'actual ratio',
    r'\b[Cc]olours?\b': 'color',
    r'\b[Gg]rey\b': 'gray',
    r'\b[Ll]ayer-short|\b(?:short|narrow) (?:ones?|models?)\b': 'layer-pruned, width-pruned',
    r"\bteacher's opinions?\b|\bopinions? of (?:a|the) teacher\b": 'teacher cache',
}
OTHER_NAMES = dict(
    blocks='layers', block='layer', heads='kv_heads or query_heads', channels='mlp_channels', depth='num_layers',
    anatomy='architecture', look='use_images', blind='use_images', trains='trainable', asked='target_ratio',
    realised='actual_ratio', opinions='teacher_cache', alpha='sft_weight', beta='kd_weight', gamma='hidden_weight',
    tau='temperature', objective='recipe',
)  # fmt: skip


def one_word_a_thing(nb):
    "The words of the glossary, not their synonyms, in prose and in what the package names."
    for c in nb.cells:
        text = '\n'.join(' '.join(w) for w in comments_of(c.source).values()) if c.exported else c.source
        if c.exported or not c.code:
            for pattern, word in OTHER_WORDS.items():
                if m := re.search(pattern, text):
                    yield f'{c.name}: {m[0]!r} is called {word}'
        for n, name, klass in public_functions(c) if c.code else ():
            for a in parameters(n, klass):
                if a.arg in OTHER_NAMES:
                    yield f'{c.name}: argument {a.arg!r} of {name} is called {OTHER_NAMES[a.arg]}'
        for n in c.tree.body if c.exported else ():
            for f in n.body if isinstance(n, ast.ClassDef) else ():
                if isinstance(f, ast.AnnAssign) and f.target.id in OTHER_NAMES:
                    yield f'{c.name}: field {n.name}.{f.target.id} is called {OTHER_NAMES[f.target.id]}'


def decorator(d):
    "The name of a decorator, called or not"
    d = d.func if isinstance(d, ast.Call) else d
    return getattr(d, 'id', getattr(d, 'attr', ''))


def short_functions(nb):
    "No function is longer than 60 lines."
    for c in nb.code:
        for n in ast.walk(c.tree):
            if isinstance(n, DEFS) and (size := n.end_lineno - n.lineno + 1) > 60:
                yield f'{c.name}: {n.name} has {size} lines; 60 is the most'


GUARDS = [
    format_with_ids,
    no_metadata,
    small_file,
    no_errors,
    no_machine_paths,
    no_noise,
    no_widget_state,
    parses,
    imports_apart,
    imports_in_order,
    no_star_imports,
    skeleton,
    short_cells,
    enough_prose,
    lessons_between,
    links_resolve,
    no_bare_comparison,
    no_pasted_numbers,
    no_final_print,
    docstrings,
    docments,
    return_types,
    fields_explained,
    line_width,
    one_statement_a_line,
    no_bound_lambda,
    no_attached_methods,
    one_word_a_thing,
    short_functions,
]

# --- all notebooks together -------------------------------------------------------------------------------------


def one_module_each(nbs):
    "No two notebooks export the same module."
    seen = {}
    for nb in nbs:
        if nb.module in seen:
            yield f'{nb.name} and {seen[nb.module]} have the same module: {nb.module}'
        if nb.module:
            seen[nb.module] = nb.name


def one_module_a_name(nbs):
    "A public name is defined in one module only."
    seen = {}
    for nb in nbs:
        for c in nb.code:
            for name in names_of(c) if c.exported else ():
                if name[0] != '_' and seen.setdefault(name, nb.module) != nb.module:
                    yield f'{name} is defined in {seen[name]} and in {nb.module}'


def names_of(cell):
    "Names that the top level of a cell defines; methods added by `@patch` are none."
    for n in cell.tree.body:
        if isinstance(n, (*DEFS, ast.ClassDef)) and 'patch' not in {decorator(d) for d in n.decorator_list}:
            yield n.name
        for t in n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []:
            yield from (o.id for o in ast.walk(t) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store))


def listed_in_order(nbs):
    "Every notebook stands in chapters.json, in the order in which a reader takes them."
    for nb in nbs:
        if nb.name != 'index' and nb.path.stem not in chapters(nb.root).get(nb.chapter, ()):
            yield f'{nb.name} is not listed'
    there = {nb.name for nb in nbs}
    for chapter, names in (chapters(nbs[0].root) if nbs else {}).items():
        paths = [f'{chapter}/{n}'.strip('/') for n in names]
        yield from (f'{p} is listed and not there' for p in paths if p not in there)


def imports_acyclic(nbs):
    "No module imports, by whatever way, one that imports it."
    uses = {}
    for nb in nbs:
        exported = [c for c in nb.code if c.exported]
        uses[nb.module] = {m for c in exported for n in ast.walk(c.tree) for m in modules_of(n)}
    done = set()

    def follow(module, path):
        if module in path:
            yield ' imports '.join([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(uses.get(module, ())):
                yield from follow(other, [*path, module])
            done.add(module)

    for module in [m for m in uses if m]:
        yield from follow(module, [])


def median_exported(nbs):
    "Half of all exported cells have at most 14 lines."
    sizes = sorted(len(c.lines) for nb in nbs for c in nb.code if c.exported and not c.is_imports)
    if sizes and sizes[len(sizes) // 2] > 14:
        yield f'the median is {sizes[len(sizes) // 2]} lines'


def figures_in_step(nbs, folder=FIGURES):
    "`save_figure(fig, 'topic')` and figures/topic.png come together."
    saved, named = {}, set()
    for nb in nbs:
        for c in nb.code:
            for n in ast.walk(c.tree):
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and SLUG.fullmatch(n.value):
                    named.add(n.value)
                if not (
                    isinstance(n, ast.Call) and decorator(n) == 'save_figure' and len(n.args) + len(n.keywords) == 2
                ):
                    continue
                given = (*n.args[1:], *(k.value for k in n.keywords))
                slug = next((o.value for o in given if isinstance(o, ast.Constant)), None)
                if slug is not None:
                    saved[slug] = f'{nb.name} {c.name}'
    there = {p.stem for p in Path(folder).glob('*.png')}
    for slug, where in sorted(saved.items()):
        if not SLUG.fullmatch(slug):
            yield f'{where}: the figure {slug!r} is not named by its topic, as in layer-vs-width'
        elif slug not in there:
            yield f'{where}: figures/{slug}.png does not exist'
    for slug in sorted(there - named):
        yield f'figures/{slug}.png: no notebook saves it'
    for p in sorted(Path(folder).iterdir()):
        if p.suffix != '.png' and p.name != '.gitkeep':
            yield f'figures/{p.name}: only .png files are figures'


TOGETHER = [one_module_each, one_module_a_name, listed_in_order, imports_acyclic, median_exported, figures_in_step]
