"""A study on a cluster of two nodes: workers, the driver and a node are killed; no row is lost, none stored twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
from lvlm_study.core.store import Run, read_rows, write_row

ray = pytest.importorskip('ray', reason='Ray is not installed: pip install "lvlm_study[ray]"')
from lvlm_study.study.ray_engine import compute_run, run_with_ray  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
RUNS = [Run('importance', criterion='bi', calibration=n) for n in range(1, 7)]
DRIVER = """
import os, sys, time
from pathlib import Path
from lvlm_study.core.store import Run
from lvlm_study.study.ray_engine import run_with_ray

def counted(run):
    with open(Path(os.environ['LVLM_CACHE']) / f'tries-{run.calibration}', 'a') as f:
        f.write('x')
    time.sleep(1)
    return dict(metrics=dict(samples=run.calibration))

runs = [Run('importance', criterion='bi', calibration=n) for n in range(1, 13)]
run_with_ray(runs, sys.argv[1], compute=counted)
"""


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


def counted(run):
    "Writes that it was started; on the node that is to be lost it never ends, elsewhere it waits for that."
    folder, lost = Path(os.environ['LVLM_CACHE']), ''
    with open(folder / f'tries-{run.calibration}', 'a') as f:
        f.write('x')
    if (folder / 'doomed').exists():
        lost = (folder / 'doomed').read_text()
    if lost == ray.get_runtime_context().get_node_id():
        (folder / 'there').write_text(str(run.calibration))
        time.sleep(3600)
    while lost and not (folder / 'there').exists():
        time.sleep(0.1)
    return dict(metrics=dict(samples=run.calibration))


def tries(folder):
    "How often each run was started."
    found = Path(folder).glob('tries-*')
    return {int(p.name.split('-')[1]): len(p.read_text()) for p in found}


def stored_once(folder):
    "Rows as they lie in the file, without an error, and no key twice."
    lines = [json.loads(line) for line in (Path(folder) / 'importance.jsonl').read_text().splitlines()]
    assert len({row['key'] for row in lines}) == len(lines) and not any('error' in row for row in lines)
    return {row['run']['calibration']: row['metrics'] for row in lines}


def wait_for(condition, seconds=600):
    "Ask again and again until something is true."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'nothing happened'
        time.sleep(0.1)


def patient_seconds():
    "Ray gives a node half a minute to start, which is short on a busy machine: by this clock it has five."
    return time.monotonic() / 10


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Two nodes with a core each, started for one test."
    from ray.cluster_utils import Cluster

    for name in ('LVLM_CACHE', 'LVLM_RESULTS'):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).resolve().parent.parent))
    clock = SimpleNamespace(**{k: getattr(time, k) for k in dir(time)})
    clock.monotonic = patient_seconds
    monkeypatch.setattr('ray._private.node.time', clock)
    nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    nodes.second = nodes.add_node(num_cpus=1)
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


def test_a_killed_driver_is_resumed(cluster):
    "The process that writes rows is killed in the middle; the next one computes what is missing and nothing else."
    with subprocess.Popen([sys.executable, '-c', DRIVER, cluster.address], stdout=subprocess.DEVNULL) as driver:
        wait_for(lambda: driver.poll() is None and len(read_rows('importance')) >= 3 or driver.poll() is not None)
        assert driver.poll() is None
        driver.kill()
    stored = stored_once(os.environ['LVLM_RESULTS'])
    assert 3 <= len(stored) < 12
    runs = [Run('importance', criterion='bi', calibration=n) for n in range(1, 13)]
    count = run_with_ray(runs, cluster.address, compute=counted)
    assert count == dict(computed=12 - len(stored), stored=len(stored), left=0, failed=0)
    assert stored_once(os.environ['LVLM_RESULTS']) == {n: dict(samples=n) for n in range(1, 13)}
    started = tries(os.environ['LVLM_CACHE'])
    assert all(started[n] == 1 for n in stored) and max(started.values()) <= 2
    print(f'driver killed after {len(stored)} of 12 rows, {sum(started.values())} starts')


def test_a_lost_node_loses_nothing(cluster):
    "One of two nodes dies with all its processes while a run is on it; the other node computes that run again."
    folder = Path(os.environ['LVLM_CACHE'])
    (folder / 'doomed').write_text(cluster.second.node_id)

    def lose():
        wait_for((folder / 'there').exists)
        cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=lose)
    killer.start()
    count = run_with_ray(RUNS, cluster.address, compute=counted)
    killer.join()
    assert count == dict(computed=6, stored=0, left=0, failed=0)
    assert stored_once(os.environ['LVLM_RESULTS']) == {n: dict(samples=n) for n in range(1, 7)}
    wait_for(lambda: sum(node['Alive'] for node in ray.nodes()) == 1)  # the head notices it after the run is over
    started = tries(folder)
    assert started[int((folder / 'there').read_text())] == 2 and sum(started.values()) == 7, started
    print(f'node lost, 6 rows of {sum(started.values())} starts')


def test_an_error_never_replaces_a_result(tmp_path, monkeypatch):
    from lvlm_study.study.ray_engine import _store

    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    row = compute_run(RUNS[0], lambda run: dict(metrics=dict(samples=1)))
    write_row(row)
    count = dict(computed=0, failed=0)
    _store(compute_run(RUNS[0], lambda run: 1 / 0), count, print)
    assert read_rows('importance')[row['key']]['metrics'] == dict(samples=1) and count['failed'] == 0
    assert compute_run(replace(RUNS[0], calibration=9), lambda run: 1 / 0)['error'].startswith('ZeroDivisionError')
