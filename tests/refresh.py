"Run notebooks and store their outputs: `python tests/refresh.py [NAME ...] [--slow] [--real] [--check]`."

import argparse, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
SKIP = {'slow', 'gpu', 'net', 'notest', 'real'}  # tst_flags of settings.ini
WIDGETS = ('application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json')
TIMES = re.compile(r'\b\d[\d.,]*(?:e[+-]?\d+)?\s?(?:ns|µs|us|ms|s|secs?|seconds|min|minutes)\b')
NUMBER = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?', re.I)


def find(names):
    "Notebooks whose file name starts with one of `names`; all of them without names."
    nbs = sorted(p for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))
    for n in names:
        if not any(p.name.startswith(Path(n).name) for p in nbs):
            sys.exit(f'No notebook in nbs/ starts with {Path(n).name!r}.')
    return [p for p in nbs if not names or any(p.name.startswith(Path(n).name) for n in names)]


def flags(cell):
    "nbdev directives of a cell, with their arguments"
    from nbdev.process import extract_directives

    return extract_directives(cell, remove=False)


def skipped(cell, skip=SKIP):
    "Does this cell keep the outputs it has?"
    fl = flags(cell)
    no_eval = [o.lower() for o in fl.get('eval:', [])] == ['false']
    return cell.cell_type != 'code' or no_eval or bool(skip & fl.keys()) or 'nbdev_export(' in cell.source


def no_widgets(outs):
    "Outputs without live widgets: a stored page cannot show them."
    return [o for o in outs if not any(w in o.get('data', {}) for w in WIDGETS)]


def quiet_widgets():
    "Send what a widget shows into the widget, as JupyterLab does; returns the list that errors in its callbacks go to."
    try:
        from ipywidgets import Output
    except ImportError:
        return []
    from IPython.utils.capture import capture_output

    open_, errors = [], []

    def enter(self):
        open_.append(capture_output())
        open_[-1].__enter__()

    def leave(self, kind, err, tb):
        open_.pop().__exit__(kind, err, tb)
        if err is not None:
            errors.append(err)

    Output.__enter__, Output.__exit__ = enter, leave
    return errors


def execute(path, skip=SKIP):
    "The notebook with fresh outputs; raises what a cell raises, after printing it."
    import matplotlib
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.process import extract_directives

    nb = read_nb(path)
    os.chdir(path.parent)
    shell, swallowed = CaptureShell(path, mpl_format='png'), quiet_widgets()
    matplotlib.use('module://matplotlib_inline.backend_inline')  # the name a kernel uses; ipywidgets looks for it
    for cell in nb.cells:
        if skipped(cell, skip):
            continue
        code = cell.copy()
        extract_directives(code)
        shell._cell_idx = cell.idx_
        outs = shell.run(code['source'])
        if swallowed and not shell.exc:
            shell.exc = swallowed[0]
        if shell.exc:
            sys.exit(f'{shell.prettytb(path.name)}\n{path.name} is unchanged.')
        cell['outputs'] = no_widgets(outs)
    return nb


def clean(nb):
    "Clean `nb` as nbdev_clean does."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    cfg = get_config(path=ROOT)
    keys = [cfg.get(f'allowed_{o}metadata_keys').split() for o in ('', 'cell_')]
    clean_nb(nb, False, *keys, cfg.clean_ids)


def texts(out):
    "The text parts of an output by kind; of pictures only that they are there."
    if 'text' in out:
        return {out['name']: ''.join(out['text'])}
    data = out.get('data', {})
    return {k: ''.join(v) if k.startswith('text/') else '' for k, v in data.items()}


def near(a, b):
    "Equal text, but for spacing, durations and the fourth digit of decimal numbers?"
    a, b = (' '.join(TIMES.sub('<time>', o).split()) for o in (a, b))
    if re.sub(r'\s', '', NUMBER.sub('#', a)) != re.sub(r'\s', '', NUMBER.sub('#', b)):
        return False
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
        if x == y:
            continue
        if not re.search(r'[.e]', x + y, re.I):
            return False
        if abs(float(x) - float(y)) > max(1e-6, 1e-3 * max(abs(float(x)), abs(float(y)))):
            return False
    return True


def differences(old, new):
    "Cells whose stored outputs are not what the run gave, one line each"
    res = []
    for i, (a, b) in enumerate(zip(old.cells, new.cells)):
        if a.cell_type != 'code' or 'varies' in flags(a):
            continue
        for o, n in zip(
            a.outputs + [{}] * (len(b.outputs) - len(a.outputs)), b.outputs + [{}] * (len(a.outputs) - len(b.outputs))
        ):
            o, n = texts(o), texts(n)
            bad = sorted(k for k in o.keys() | n.keys() if k not in o or k not in n or not near(o[k], n[k]))
            if bad:
                res.append(
                    f'cell {i} [{a.id}], {", ".join(bad)}:\n    stored: {brief(o, bad)}\n    now:    {brief(n, bad)}'
                )
    return res


def brief(txts, kinds):
    "The first words of the first of `kinds`"
    txt = ' '.join(txts.get(kinds[0], '(nothing)').split())
    return txt if len(txt) <= 160 else txt[:157] + '...'


def save(nb, path, before):
    "Write `nb` unless somebody wrote to `path` since `before` was read."
    from execnb.nbio import write_nb

    if path.read_bytes() != before:
        sys.exit(f'{path.name} changed while it ran: nothing is written.')
    tmp = path.with_name(f'.{path.name}.tmp')
    write_nb(nb, tmp)
    os.replace(tmp, path)


def one(path, also=(), check=False):
    "Refresh or check one notebook in this process."
    from execnb.nbio import read_nb

    before, old = path.read_bytes(), read_nb(path)
    nb = execute(path, SKIP - set(also))
    clean(nb)
    if not check:
        return save(nb, path, before)
    if bad := differences(old, nb):
        sys.exit('\n  '.join([f'{path.name}: stored outputs are stale', *bad]))


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('names', nargs='*', help='notebooks by the start of their names (default: all)')
    ap.add_argument('--slow', action='store_true', help='run the cells flagged slow as well')
    ap.add_argument('--real', action='store_true', help='run the cells that need the weights of smol-llava as well')
    ap.add_argument(
        '--check', action='store_true', help='write nothing; fail where stored text outputs differ from the run'
    )
    ap.add_argument('--here', action='store_true', help=argparse.SUPPRESS)  # one notebook, in this process
    args = ap.parse_args()
    also = [flag for flag in ('slow', 'real') if getattr(args, flag)]
    if args.here:
        return one(Path(args.names[0]), also, args.check)
    failed = []
    for p in find(args.names):
        start = time.time()
        opts = ['--here', *(f'--{flag}' for flag in also), *(['--check'] if args.check else [])]
        res = subprocess.run([sys.executable, __file__, str(p), *opts])
        if res.returncode:
            failed.append(p.name)
        print(f'{"failed" if res.returncode else "ok":6} {time.time() - start:5.1f} s  {p.name}', flush=True)
    if failed:
        sys.exit(f'Failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
