"Stored results: every row belongs to its run, and the files stay small."

import json, math
import pytest
from conftest import none_found
from guards import NBS, ROOT

RESULTS = NBS / 'results'
FILES = sorted(RESULTS.glob('*.jsonl'))
FIELDS = {'key', 'run', 'metrics', 'curves', 'text', 'seconds', 'env', 'error'}


def numbers(x, at=''):
    "(where, number) for each number in nested lists and dicts"
    if isinstance(x, dict):
        x = x.items()
    elif isinstance(x, list):
        x = enumerate(x)
    else:
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            yield at, x
        return
    for k, v in x:
        yield from numbers(v, f'{at}.{k}' if at else str(k))


def row_faults(row, experiment, Run):
    "What is wrong with one row, in a few words each"
    if extra := row.keys() - FIELDS:
        yield f'unknown fields {sorted(extra)}'
    if lacking := {'key', 'run', 'seconds', 'env'} - row.keys():
        yield f'lacks {sorted(lacking)}'
        return
    if ('error' in row) == bool(row.get('metrics')):
        yield 'has to have metrics or an error, and not both'
    try:
        run = Run(**row['run'])
    except TypeError as e:
        yield f'its run is none: {e}'
        return
    if run.key != row['key']:
        yield f'its run has the key {run.key}'
    if run.experiment != experiment:
        yield f'its run belongs to {run.experiment}'
    for at, x in numbers(row):
        if not math.isfinite(x):
            yield f'{at} is {x}'
        elif isinstance(x, float) and x != float(f'{x:.6g}'):
            yield f'{at} has more than 6 digits: {x}'
    for name, curve in row.get('curves', {}).items():
        if isinstance(curve, list) and len(curve) > 200:
            yield f'the curve {name} has {len(curve)} points; 200 is the most'
    if bad := [k for k, v in row.get('text', {}).items() if not isinstance(v, str) or len(v) > 300]:
        yield f'texts that are no short sentences: {bad}'
    if bad := [k for k, v in row.get('metrics', {}).items() if isinstance(v, bool) or not isinstance(v, (int, float))]:
        yield f'metrics that are no numbers: {bad}'


def file_faults(text, experiment, Run):
    "What is wrong with a file of results, one line each"
    rows = []
    for i, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            yield f'line {i}: {e}'
    keys = [r.get('key') for r in rows]
    if len(set(keys)) < len(keys):
        yield f'keys stand twice: {sorted({k for k in keys if keys.count(k) > 1})}'
    if keys != sorted(keys):
        yield 'the lines are not sorted by key'
    for r in rows:
        yield from (f'{r.get("key")}: {o}' for o in row_faults(r, experiment, Run))


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_rows(path):
    from lvlm_study.core.store import Run

    none_found(file_faults(path.read_text(), path.stem, Run), f'{path.relative_to(ROOT)}:')


def test_sizes():
    sizes = {p.name: p.stat().st_size for p in RESULTS.rglob('*') if p.is_file()}
    none_found(
        [f'{k}: {v / 1e6:.1f} MB' for k, v in sizes.items() if v > 1_000_000], 'A file of results has at most 1 MB:'
    )
    assert sum(sizes.values()) <= 5_000_000, f'nbs/results holds {sum(sizes.values()) / 1e6:.1f} MB; 5 is the most'


def test_only_results_are_there():
    none_found(
        [p.name for p in RESULTS.iterdir() if p.suffix != '.jsonl' and p.name != '.gitkeep'], 'Not a file of results:'
    )


@pytest.fixture
def good():
    from lvlm_study.core.store import Run
    from dataclasses import asdict

    run = Run('trial')
    return dict(key=run.key, run=asdict(run), metrics=dict(AVG=71.25), curves={}, seconds=1.5, env=dict(torch='2'))


def faults(*rows):
    from lvlm_study.core.store import Run

    return '\n'.join(file_faults('\n'.join(map(json.dumps, rows)), 'trial', Run))


def test_a_good_row_passes(good):
    assert faults(good) == ''


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(key='0' * 10), 'its run has the key'),
        (dict(extra=1), 'unknown fields'),
        (dict(metrics={}), 'metrics or an error'),
        (dict(error='x'), 'and not both'),
        (dict(metrics=dict(AVG=float('nan'))), 'is nan'),
        (dict(metrics=dict(AVG=1 / 3)), '6 digits'),
        (dict(metrics=dict(AVG='71')), 'no numbers'),
        (dict(text=dict(why=3)), 'no short sentences'),
        (dict(curves=dict(loss=[0.0] * 201)), '201 points'),
        (dict(run=dict(experiment='trial', ratoi=1)), 'its run is none'),
    ],
)
def test_a_bad_row_is_seen(good, change, says):
    assert says in faults(good | change)


def test_a_bad_file_is_seen(good):
    assert 'stand twice' in faults(good, good)
    assert 'not sorted' in faults(good | dict(key='z'), good)
    from lvlm_study.core.store import Run

    assert 'line 1' in '\n'.join(file_faults('<<<<<<< ours', 'trial', Run))


# --- queries of stored rows -------------------------------------------------------------------------------------


def stored(experiment, metrics, **fields):
    "Lines of `load_results` for one run."
    from dataclasses import asdict
    from lvlm_study.core.store import Run

    run = asdict(Run(experiment, model='tiny-llava', **fields))
    return [run | dict(metric=m, value=v) for m, v in metrics.items()]


def test_a_query_takes_one_variant():
    import pandas as pd
    from lvlm_study.evaluation.results import pruned_by_ratio, retention_curve, text_only_scores

    cut = dict(method='width', criterion='taylor', ratio=0.3, calibration=50)
    variants = [
        ({}, 80.0),
        (dict(size_match=True), 70.0),
        (dict(use_images=False), 10.0),
        (dict(purpose='prediction'), 0),
    ]
    rows = pd.DataFrame(
        [
            line
            for change, value in variants
            for line in stored('width_pruning', dict(retention=value, AVG=value / 2, actual_ratio=0.3), **cut, **change)
        ]
    )
    assert pruned_by_ratio(rows, 'tiny-llava', 'width').retention.tolist() == [80]
    assert retention_curve(rows, 'tiny-llava', 'width', size_match=True).retention.tolist() == [70]
    assert text_only_scores(rows).to_dict('index') == {30.0: dict(multimodal=40.0, text_only=5.0)}


def test_recovered_runs_of_another_budget_or_teacher_are_apart():
    import pandas as pd
    from lvlm_study.evaluation.results import recovery_results, retention_by_fraction

    run = dict(method='width', criterion='taylor', ratio=0.3, calibration=50, recipe='sft+hidden')
    run |= dict(trainable='projector+lora')
    variants = [
        (dict(fraction=0.05), 80.0),
        (dict(fraction=0.05, budget='steps'), 90.0),
        (dict(fraction=0.05, teacher='own'), 10.0),
        (dict(fraction=1.0), 95.0),
    ]

    def lines():
        found = []
        for change, value in variants:
            metrics = dict(retention=value, retention_low=value - 1, retention_high=value + 1, actual_ratio=0.3)
            found += stored('recovery', metrics, **run, **change)
        return pd.DataFrame(found)

    for budget, value in (('epochs', 80), ('steps', 90)):
        d = recovery_results(lines(), 'tiny-llava', 'width', 0.05, budget)
        assert d.retention.tolist() == [value]
    none = pd.DataFrame(stored('width_pruning', {}, method='none'), columns=lines().columns)
    for budget, retention in (('epochs', [80, 95]), ('steps', [90, 95])):
        d = retention_by_fraction(lines(), none, 'tiny-llava', 'width', 0.3, budget=budget)
        assert d.fraction.tolist() == [0.05, 1] and d.retention.tolist() == retention, 'all data count for both'


def test_recipes_are_averaged_over_common_seeds():
    import pandas as pd
    from lvlm_study.evaluation.results import by_recipe, gain_over, gain_verdicts

    runs = [('sft+hidden', 0, 80.0), ('sft+hidden', 1, 90), ('kl', 0, 82), ('sft', 0, 79), ('sft', 1, 91)]
    d = pd.DataFrame(runs, columns=['recipe', 'seed', 'retention']).assign(ratio=0.3, trainable='projector+lora')
    assert by_recipe(d).loc[0.3].to_dict() == {'sft+hidden': 80, 'kl': 82, 'sft': 79}, 'seed 1 has no kl'
    d = d.assign(low=d.retention - 2, high=d.retention + 2)
    verdicts = gain_verdicts(gain_over(d)).verdict.loc[0.3].to_dict()
    assert verdicts == dict(kl='one seed', sft='two seeds')
