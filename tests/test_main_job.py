"What the steps of the main job cost, from stored rows."

import pytest
from lvlm_study.efficiency import main_job
from lvlm_study.efficiency.main_job import JOB_COUNTS, JOB_MODELS, JOB_UNITS, job_costs, job_minutes, job_run, job_step


@pytest.fixture
def store(monkeypatch):
    rows = {}
    monkeypatch.setattr(main_job, 'read_rows', lambda experiment: rows)
    return rows


def row_of(name, step, units, cpu_seconds):
    metrics = dict(units=units, cpu_seconds=cpu_seconds, seconds=2 * cpu_seconds, peak=900.0, before=500.0)
    return {job_run(name, step).key: dict(metrics=metrics)}


def test_minutes_follow_by_the_rule_of_three(store):
    store |= row_of('smol-llava', 'score', 4, 24.0)
    store |= row_of('smol-llava', 'evaluate', 90, 45.0)
    assert job_costs().loc[('smol-llava', 'score'), 'CPU seconds'] == 6
    minutes = job_minutes('smol-llava', dict(score=20, evaluate=240))
    assert minutes.to_dict() == dict(score=2, evaluate=2)


def test_what_was_not_measured_has_no_time(store):
    assert job_costs().empty
    store |= row_of('tiny-llava', 'score', 4, 24.0)
    assert job_minutes('tiny-llava').dropna().index.tolist() == ['score']


def test_a_step_that_does_not_exist():
    for call in (lambda: job_step('heal', 'tiny-llava', 1), lambda: job_minutes('tiny-llava', dict(heal=1))):
        with pytest.raises(ValueError, match="there is no step 'heal': take one of load, score, prune"):
            call()


@pytest.mark.parametrize('step', ['load', 'prune', 'score', 'recover'])
def test_work_is_ready_before_the_clock_starts(step, monkeypatch):
    work = job_step(step, 'tiny-gqa', 1)
    if step != 'load':
        monkeypatch.setattr(main_job, 'load_lvlm', lambda *args: pytest.fail('a model was loaded while timed'))
    assert work() is not None


def test_both_halves_of_a_model_lose_what_is_said():
    lvlm = main_job.load_lvlm('tiny-llava')
    shorter, narrower = main_job._shorter(lvlm), main_job._narrower(lvlm)
    L, F = len(lvlm.layers), lvlm.architecture.mlp_channels
    assert len(shorter.layers) == round(0.7 * L) and narrower.architecture.mlp_channels == round(0.7 * F)


def test_every_step_is_stored():
    costs = job_costs()
    assert set(costs.index) == {(name, step) for name in JOB_MODELS for step in JOB_COUNTS}
    assert set(JOB_UNITS) <= set(JOB_COUNTS) and (costs['MB at most'] >= costs['MB before']).all()
