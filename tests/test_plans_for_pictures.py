"Plans of equal size and mixtures for models that look: what is fitted on is never tested on, and gaps are fair."

from dataclasses import replace
import numpy as np
import pytest
import torch
from lvlm_study.core.store import Run, load_results
from lvlm_study.evaluation.language import LANGUAGE_BLOCKS, text_blocks
from lvlm_study.models.loading import check_finite, load_lvlm
from lvlm_study.recovery.recipes import recipe_values
from lvlm_study.study.picture_plans import MIXTURES, mixture_runs, plan_runs, retention_gap
from lvlm_study.study.repair_results import calibration_data, repair_plan, run_repair

ASKED = Run('repair', model='tiny-llava', calibration=20)


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-llava')


def pieces(batches):
    "The texts among some batches, each as a tuple of token ids."
    return [tuple(row.tolist()) for batch in batches if 'pixel_values' not in batch for row in batch['input_ids']]


def test_no_text_is_fitted_on_and_read(lvlm):
    read = {tuple(row.tolist()) for row in text_blocks(lvlm, 'reference', LANGUAGE_BLOCKS)}
    draws = [pieces(calibration_data(lvlm, replace(ASKED, seed=seed), ['reference'])) for seed in range(3)]
    assert [len(draw) for draw in draws] == [10] * 3
    every = [piece for draw in draws for piece in draw]
    assert len(set(every)) == len(every) and not read & set(every)


def test_a_mixture_takes_turns(lvlm):
    batches = calibration_data(lvlm, ASKED, MIXTURES[2].split('+'))
    pictures = sum(len(batch['input_ids']) for batch in batches if 'pixel_values' in batch)
    assert (pictures, len(pieces(batches))) == (10, 5)
    assert 'pixel_values' in batches[0] and 'pixel_values' not in batches[1]


@pytest.mark.parametrize('criterion', ['wanda', 'wanda global', 'bi_max+wanda', 'bi_max+taylor'])
def test_plans_are_as_large_as_the_layers(criterion):
    layers = repair_plan(replace(ASKED, method='layer', criterion='bi', ratio=0.3))
    plan = repair_plan(replace(ASKED, method='width', criterion=criterion, ratio=0.3, size_match=True))
    assert abs(plan.shares['lm'] - layers.shares['lm']) < 2e-3
    assert bool(plan.removed) == ('+' in criterion)


def test_random_plans_follow_the_seed():
    plans = [repair_plan(replace(ASKED, method='layer', criterion='random', ratio=0.3, seed=s)) for s in (0, 1, 2)]
    assert len({plan.removed for plan in plans}) > 1


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(purpose='repaired on licenses'), 'is repaired on instructions, reference, docstrings'),
        (dict(purpose='plain on reference'), 'is repaired on instructions'),
        (dict(purpose='recovered', recipe='sft'), 'needs the share of the data'),
        (dict(purpose='repaired on instructions', model='smollm2'), 'is repaired on reference, docstrings, licenses'),
        (dict(purpose='mended'), 'a repair is one of plain, repaired'),
    ],
)
def test_what_a_run_cannot_be_repaired_on(changes, said):
    with pytest.raises(ValueError, match=said):
        run_repair(replace(ASKED, method='width', criterion='wanda', ratio=0.3, **changes))


def test_mixtures_are_for_models_with_a_language():
    with pytest.raises(ValueError, match='mixtures are for smol-llava'):
        list(mixture_runs('tiny-llava'))


def test_every_plan_has_a_row_of_its_own():
    runs = [*plan_runs(), *mixture_runs()]
    trained = [run for run in runs if 'recovered' in run.purpose]
    assert len({run.key for run in plan_runs()}) == len(list(plan_runs()))
    assert all(run.recipe == 'sft' and run.fraction == 0.05 for run in trained) and trained


def test_gaps_are_of_the_same_draws():
    def row(value):
        return dict(retention=value, retention_low=value - 2, retention_high=value + 2)

    ours, others = {0: row(90), 1: row(92), 2: row(91)}, {0: row(80), 1: row(81), 2: row(83), 3: row(0)}
    gap = retention_gap(ours, others)
    assert np.isclose(gap.value, np.mean([10, 11, 8])) and gap.seeds == 3 and gap.verdict == 'holds'
    assert retention_gap(others, ours).verdict == 'reversed'
    assert retention_gap({0: row(1)}, {1: row(1)}) is None
    assert retention_gap({0: row(9)}, {0: row(1)}).verdict == 'one seed'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('values', [[float('nan')], [float('inf')], [float('inf'), -float('inf')]])
def test_one_value_that_is_not_finite_is_found(dtype, values):
    lvlm = load_lvlm('tiny-llava', dtype=dtype)
    weight = lvlm.layers[3].mlp.up_proj.weight
    with torch.no_grad():
        weight[:] = 3e4  # a sum of large values is no fault
        check_finite(lvlm)
        weight.view(-1)[-len(values) :] = torch.tensor(values, dtype=dtype)
    with pytest.raises(ValueError, match='layers.3.mlp.up_proj.weight'):
        check_finite(lvlm)


def test_bars_of_the_card_are_means_over_all_seeds():
    stored = dict(recovery=load_results('recovery'))
    stored |= {method: load_results(f'{method}_pruning') for method in ('layer', 'width')}
    d = stored['recovery']
    d = d[(d.model == 'smol-llava') & (d.method == 'layer') & (d.ratio == 0.3) & (d.recipe == 'sft')]
    d = d[(d.metric == 'retention') & (d.trainable == 'projector+lora') & (d.fraction == 0.05)]
    trained, learned = recipe_values(stored, 0.3, 'smol-llava', 'layer')
    assert d.seed.nunique() >= 3 and np.isclose(learned['sft'], d.value.mean())
    assert trained['no recovery'] < trained['projector'] < trained['projector + LoRA']
    with pytest.raises(ValueError, match='layer or width'):
        recipe_values(stored, 0.3, 'smol-llava', 'depth')
