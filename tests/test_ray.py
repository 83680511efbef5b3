"""A study on a cluster of two nodes: workers are killed, and no row is lost, none stored twice."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
import pytest
from lvlm_study.core.store import Run, read_rows, write_row

ray = pytest.importorskip('ray', reason='Ray is not installed: pip install "lvlm_study[ray]"')
from lvlm_study.study.ray_engine import compute_run, run_with_ray  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
RUNS = [Run('importance', criterion='bi', calibration=n) for n in range(1, 7)]


def quick(run):
    "Kills its worker the first time for calibration 2, always for 3, raises for 4."
    folder = Path(os.environ['LVLM_CACHE'])
    tries = folder / f'tries-{run.calibration}'
    with open(tries, 'a') as f:
        f.write('x')
    if run.calibration == 3 or run.calibration == 2 and tries.read_text() == 'x':
        os.kill(os.getpid(), signal.SIGKILL)
    if run.calibration == 4:
        raise ValueError('four is no number')
    time.sleep(0.2)
    return dict(metrics=dict(samples=run.calibration))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Two nodes with a core each, started for one test."
    from ray.cluster_utils import Cluster

    for name in ('LVLM_CACHE', 'LVLM_RESULTS'):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).resolve().parent.parent))
    nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    nodes.add_node(num_cpus=1)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_killed_workers_lose_nothing(cluster):
    lines = []
    count = run_with_ray(RUNS + RUNS[:2], cluster.address, log=lines.append, retries=1, compute=quick)
    assert count == dict(computed=4, stored=0, left=0, failed=2), lines
    assert len(ray.nodes()) == 2 and len(lines) == 6
    rows = read_rows('importance')
    results = {r['run']['calibration']: r['metrics'] for r in rows.values() if 'error' not in r}
    assert results == {n: dict(samples=n) for n in (1, 2, 5, 6)}
    errors = {r['run']['calibration']: r['error'] for r in rows.values() if 'error' in r}
    assert 'lost 2 times' in errors[3] and errors[4] == 'ValueError: four is no number'
    again = run_with_ray(RUNS, cluster.address, log=lines.append, retries=0, compute=quick)
    assert again == dict(computed=0, stored=4, left=0, failed=2)  # only what failed was tried
    assert {k: v['run'] for k, v in read_rows('importance').items()} == {k: v['run'] for k, v in rows.items()}


def test_an_error_never_replaces_a_result(tmp_path, monkeypatch):
    from lvlm_study.study.ray_engine import _store

    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    row = compute_run(RUNS[0], lambda run: dict(metrics=dict(samples=1)))
    write_row(row)
    count = dict(computed=0, failed=0)
    _store(compute_run(RUNS[0], lambda run: 1 / 0), count, print)
    assert read_rows('importance')[row['key']]['metrics'] == dict(samples=1) and count['failed'] == 0
    assert compute_run(replace(RUNS[0], calibration=9), lambda run: 1 / 0)['error'].startswith('ZeroDivisionError')
