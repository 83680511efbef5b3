"Pictures for the sliders of a notebook, drawn beforehand: a static page has no kernel that could draw them."

import ast, html, io, itertools, json, os


def stored(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def own(node):
    "Names that are known only inside a function, a lambda or a comprehension"
    out = set()
    for n in ast.walk(node):
        if isinstance(n, ast.comprehension):
            out |= stored(n.target)
        if isinstance(n, (ast.FunctionDef, ast.Lambda)):
            out |= {a.arg for a in ast.walk(n.args) if isinstance(a, ast.arg)} | (
                stored(n) if isinstance(n, ast.FunctionDef) else set()
            )
    return out


def patched(node):
    "The class that a function becomes a method of by fastcore's `patch`; an empty set for any other function"
    names = {n.id for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
    first = node.args.args[0].annotation if 'patch' in names and node.args.args else None
    return {n.id for n in ast.walk(first) if isinstance(n, ast.Name)} if first else set()


def defined(node):
    "Names that a top-level statement binds or changes"
    if isinstance(node, ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.FunctionDef):
        return {node.name} | patched(node)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).split('.')[0] for a in node.names}
    out, roots = (
        stored(node) - own(node),
        [node.value.func] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else [],
    )
    for n in [
        n for n in ast.walk(node) if isinstance(n, (ast.Subscript, ast.Attribute)) and isinstance(n.ctx, ast.Store)
    ] + [r for r in roots if isinstance(r, ast.Attribute)]:
        while isinstance(n, (ast.Subscript, ast.Attribute)):
            n = n.value  # x[0] = 1, x.a = 1, x.update(y)
        if isinstance(n, ast.Name):
            out.add(n.id)
    return out


def used(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own(node)


def closure(pieces, want, defined, used):
    "The pieces that define what is wanted, and what those want in turn, in order; a name may be defined after its use"
    found = set()
    while more := [i for i, p in enumerate(pieces) if i not in found and defined(p) & want]:
        found |= set(more)
        want = want.union(*(used(pieces[i]) for i in more))
    return [p for i, p in enumerate(pieces) if i in found]


def needed(statements, last):
    "The statements before `last` that it needs, in order: what a page shows besides is not run"
    return closure(statements, used(last), defined, used)


def calls(node):
    return {getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in ast.walk(node) if isinstance(n, ast.Call)}


def builds_widget(node):
    return bool(calls(node) & {'interact', 'interactive'})


class Widget:
    "What `interactive` was asked for, kept instead of built"

    def __init__(self, f, *args, **kw):
        self.f, self.kw, Widget.made = f, kw, Widget.made + [self]

    made = []


def stops(control):
    "(kind, values, number of the first one shown, their words) of a control; None if it has no few values"
    if hasattr(control, 'options'):
        pairs = [
            o if isinstance(o, tuple) else (words(o), o)
            for o in (control.options.items() if isinstance(control.options, dict) else control.options)
        ]
        values = [v for _, v in pairs]
        return (
            'range' if type(control).__name__.endswith('Slider') else 'select',
            values,
            values.index(control.value) if control.value in values else 0,
            [str(w) for w, _ in pairs],
        )
    if hasattr(control, 'step') and hasattr(control, 'min'):
        n = round((control.max - control.min) / control.step)
        values = [round(control.min + i * control.step, 6) for i in range(n + 1)]
        return (
            'range',
            values,
            min(range(len(values)), key=lambda i: abs(values[i] - control.value)),
            [words(v) for v in values],
        )
    return None


def words(v):
    return f'{v:g}' if isinstance(v, float) else str(v)


def thinned(control, n):
    "The control with only so many of its stops, the one shown among them"
    kind, values, at, said = control
    step = -(-len(values) // n)
    keep = range(at % step, len(values), step)
    return kind, [values[i] for i in keep], at // step, [said[i] for i in keep]


def picture(widget, values):
    "The figure that the function of a widget draws"
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    shown.clear()
    res = widget.f(**values)
    figs = [o for o in [*shown, res] if isinstance(o, Figure)]
    fig = figs[0] if figs else plt.gcf() if plt.get_fignums() else None
    plt.close('all')
    return fig


shown = []


def draw(widget, folder, most):
    "Draw all frames of a widget; returns its controls, or None where it draws no figure"
    from PIL import Image
    from ipywidgets import fixed

    still = {k: v.value for k, v in widget.kw.items() if isinstance(v, fixed)}
    controls = {k: stops(v) for k, v in widget.kw.items() if k not in still}
    if not controls or None in controls.values():
        return None
    for k in sorted(
        controls, key=lambda k: controls[k][0] != 'select'
    ):  # too many: menus stay as they are, but for the last control
        if _count(controls) > most and controls[k][0] == 'select' and len(controls) > 1:
            still[k] = controls[k][1][controls[k][2]]
            del controls[k]
    while _count(controls) > most:  # still too many: fewer stops
        k = max(controls, key=lambda k: len(controls[k][1]))
        controls[k] = thinned(controls[k], -(-len(controls[k][1]) // 2))
    for at in itertools.product(*(range(len(c[1])) for c in controls.values())):
        fig = picture(widget, still | {k: c[1][i] for (k, c), i in zip(controls.items(), at)})
        if fig is None:
            return None
        buf = io.BytesIO()
        fig.savefig(buf, format='png', dpi=130)
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(buf).convert('RGB').quantize(128).save(folder / f'{"-".join(map(str, at))}.png', optimize=True)
    return {k: c + ((getattr(widget.kw[k], 'description', '') or k),) for k, c in controls.items()}


def _count(controls):
    n = 1
    for c in controls.values():
        n *= len(c[1])
    return n


def says(f):
    "What a function draws, in words: its docstring, or that of the function of the package that it calls."
    calls = [f] + [f.__globals__.get(n) for n in f.__code__.co_names if n.endswith(f.__name__)]
    doc = (
        next((g.__doc__ for g in calls if getattr(g, '__doc__', None)), f.__name__.replace('_', ' '))
        .strip()
        .splitlines()[0]
        .rstrip('.')
    )
    doc = doc.removeprefix('Draw ')
    return doc[0].upper() + doc[1:]


def page(controls, root, alt, width):
    "The controls and the first picture as HTML"
    parts = []
    for k, (kind, values, at, said, label) in controls.items():
        more = f'name="{html.escape(label)}" data-words="{html.escape(json.dumps(said))}"'
        if kind == 'range':
            box = (
                f'<input type="range" min="0" max="{len(values) - 1}" step="1" value="{at}" {more} '
                f'aria-valuetext="{said[at]}"><output>{said[at]}</output>'
            )
        else:
            box = (
                f'<select {more}>'
                + ''.join(
                    f'<option{" selected" if i == at else ""}>{html.escape(w)}</option>' for i, w in enumerate(said)
                )
                + '</select>'
            )
        parts.append(f'<label>{html.escape(label)} {box}</label>')
    first = '-'.join(str(c[2]) for c in controls.values())
    where = ', '.join(f'{c[4]} {c[3][c[2]]}' for c in controls.values())
    return (
        f'<figure class="frames" data-root="{root}" data-alt="{html.escape(alt)}">'
        f'<div class="controls">{"".join(parts)}</div>'
        f'<img src="{root}{first}.png" width="{width}" alt="{html.escape(alt)}: {html.escape(where)}">'
        '<figcaption>Drawn beforehand for every position. In JupyterLab the same controls draw anew.</figcaption>'
        '</figure>'
    )


def of_notebook(cells, name, static, most, cwd):
    "{id of a cell: HTML} for the cells of a notebook that build a widget over a figure"
    import ipywidgets, IPython.display
    import matplotlib
    from lvlm_study.core import plotting

    matplotlib.use('Agg')
    from PIL import Image

    sources = [(i, ast.parse(c)) for i, c in cells]
    out, before = {}, []
    if not most or not any(builds_widget(t) for _, t in sources):
        return out
    keep = ipywidgets.interactive, ipywidgets.interact, IPython.display.display, plotting.show_figure, os.getcwd()
    ipywidgets.interactive = ipywidgets.interact = Widget
    IPython.display.display = lambda *objs, **kw: shown.extend(objs)
    plotting.show_figure = shown.append
    os.chdir(cwd)
    try:
        for i, tree in sources:
            for s in tree.body:
                if builds_widget(s) and not isinstance(s, (ast.FunctionDef, ast.ClassDef)):
                    space = dict(__name__='__frames__')
                    Widget.made = []
                    try:
                        exec(compile(ast.Module([*needed(before, s), s], []), f'{name}, cell {i}', 'exec'), space)
                    except Exception as e:
                        raise RuntimeError(f'{name}: what the slider of cell {i} needs does not run by itself') from e
                    for w in Widget.made:
                        own_name = f'{name.replace("/", "-")}-{len(out)}'
                        root = f'{"../" * name.count("/")}_static/frames/{own_name}/'
                        folder = static / 'frames' / own_name
                        if controls := draw(w, folder, most):
                            size = Image.open(next(folder.glob('*.png'))).width
                            out[i] = page(controls, root, says(w.f), round(size / 1.5))
                before.append(s)
    finally:
        ipywidgets.interactive, ipywidgets.interact, IPython.display.display, plotting.show_figure = keep[:4]
        os.chdir(keep[4])
    return out
