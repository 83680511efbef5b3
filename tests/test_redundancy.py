"What little removals cost, against surgery; and how long a study is said to take."

from dataclasses import replace

import pytest
import torch

from lvlm_study import load_lvlm
from lvlm_study.core.store import Run, read_rows, temporary_results, write_row
from lvlm_study.models.loading import answer_loss
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.study.redundancy import random_tenth, redundancy, redundancy_batches
from lvlm_study.study.report import expected_time
from lvlm_study.study.runner import run_grid


@pytest.fixture(scope='module')
def tiny():
    return load_lvlm('tiny-llava')


@pytest.fixture(scope='module')
def batches(tiny):
    return redundancy_batches(Run('redundancy', model='tiny-llava', calibration=6), tiny)


def mean_loss(lvlm, batches):
    with torch.no_grad():
        return torch.cat([answer_loss(lvlm, batch) for batch in batches]).mean().item()


def test_a_layer_costs_what_it_costs_when_it_is_cut_out(tiny, batches):
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    found = redundancy(tiny, batches, draws=1)
    assert all(torch.equal(p, before[name]) for name, p in tiny.model.named_parameters())
    whole, n = mean_loss(tiny, batches), tiny.architecture.num_layers
    assert found['whole'][0] == pytest.approx(whole, rel=1e-5) and len(found['layers']) == n
    for i in (0, n // 2, n - 1):
        student = apply_plan(tiny, Plan.of(tiny, layers=[j for j in range(n) if j != i]))
        assert found['layers'][i] == pytest.approx(mean_loss(student, batches) - whole, abs=1e-4)


def test_a_tenth_is_a_tenth_of_every_layer(tiny):
    tenth = random_tenth(tiny, 3)
    a = tiny.architecture
    assert tenth.shape == (a.num_layers, round(0.1 * a.mlp_channels)) and tenth.max() < a.mlp_channels
    assert all(len(set(row.tolist())) == tenth.shape[1] for row in tenth)
    assert torch.equal(tenth, random_tenth(tiny, 3)) and not torch.equal(tenth, random_tenth(tiny, 4))


def test_time_is_that_of_the_rows_that_came_with_the_project():
    runs = run_grid('quick')
    seconds = [read_rows(run.experiment)[run.key]['seconds'] for run in runs]
    with temporary_results():
        assert f'{len(runs)} runs to go, about {sum(seconds) / 60:.1f} minutes' in expected_time(runs)
        write_row(read_shipped(runs[0]))
        assert expected_time(runs).startswith(f'{len(runs) - 1} runs to go')
        assert expected_time([replace(runs[0], calibration=49)]) == ''


def read_shipped(run):
    "A row as it could have been made here"
    return dict(key=run.key, run=vars(run).copy(), env={}, seconds=1.0, metrics={})


def test_a_preset_whose_model_is_not_here_is_refused_before_any_run(run, monkeypatch, tmp_path):
    from lvlm_study.study import cli as commands

    monkeypatch.setattr(commands, 'real_models', lambda: [])
    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    status, out, err = run('study_command', 'run', '--preset', 'smol')
    assert (status, out) == (2, '') and err.count('\n') == 1 and "'smol-llava' is no study model" in err
    assert not list(tmp_path.iterdir())
