"The study models as shipped: what they are and can do, how they were made, and that scores and surgery treat all alike"

import json
import pytest
import torch
from test_surgery import KINDS, plan_for, zeroed
from transformers import AutoModelForImageTextToText
from lvlm_study.core.store import read_rows
from lvlm_study.data.instruction_data import Collator
from lvlm_study.evaluation.metrics import TOP_SCORE
from lvlm_study.importance.importance import score
from lvlm_study.models.architecture import count_parameters
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER, study_models
from lvlm_study.models.architecture import parameter_sizes
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.models.loading import generate_greedy
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.study.families import STUDY_MODEL_PLANS, mha_to_gqa, study_model_card
from lvlm_study.study.finetuning import packed_finetune
from lvlm_study.study.pretraining import mean_losses, study_recipe


@pytest.fixture(scope='module')
def models():
    return {n: load_lvlm(n) for n in study_models()}


@pytest.fixture(scope='module')
def batches(models):
    return {n: Collator(m)([instructions('recovery', 4)[i] for i in range(4)]) for n, m in models.items()}


def original_row(name):
    "The stored scores of a model that nothing was removed from, with images and on the whole suite."
    return next(
        row
        for row in read_rows('layer_pruning').values()
        if (run := row['run'])['model'] == name
        and run['method'] == 'none'
        and run['use_images']
        and not run['limit']
        and not run['purpose']
    )


@torch.no_grad()
def logits(lvlm, batch):
    keep = batch['attention_mask'].bool()  # what stands after the end of a sample does not matter
    return lvlm.model(**{k: v for k, v in batch.items() if k != 'labels'}).logits[keep]


def test_four_are_there_and_each_is_another_architecture(models):
    assert set(models) == {*STUDY_MODEL_PLANS}
    kinds = {
        n: (
            m.architecture.parallel,
            bool(m.architecture.biases),
            'qkv' in m.architecture.attn,
            'gate_up' in m.architecture.mlp,
            m.architecture.query_heads // m.architecture.kv_heads,
        )
        for n, m in models.items()
    }
    assert kinds == {
        'tiny-llava': (False, False, False, False, 1),
        'tiny-bunny': (True, True, False, False, 1),
        'tiny-internvl': (False, False, True, True, 1),
        'tiny-gqa': (False, False, False, False, 4),
    }


@pytest.mark.parametrize('name', study_models())
def test_shipped_small_with_a_recipe(models, name):
    files = list((STUDY_MODELS_FOLDER / name).iterdir())
    recipe = json.loads((STUDY_MODELS_FOLDER / name / 'recipe.json').read_text())
    assert sum(f.stat().st_size for f in files) < 10e6 and not [
        f.name for f in files if f.suffix in ('.bin', '.pt', '.pkl', '.py')
    ]
    assert recipe['steps'] > 0 and recipe['seconds'] > 0 and recipe['loss'] and {'seed', 'env'} <= set(recipe)
    row = original_row(name)
    assert {*TOP_SCORE, 'AVG'} == set(recipe['scores']) and abs(recipe['scores']['AVG'] - row['metrics']['AVG']) < 1
    counts = count_parameters(models[name])
    assert (
        counts['total'] == sum(p.numel() for p in models[name].model.parameters())
        and 0.85 < counts['LM'] / counts['total'] < 0.95
    )


@pytest.mark.parametrize('name', study_models())
def test_what_it_can_do_is_stored_and_far_above_chance(name):
    row = original_row(name)
    above = [b for b in TOP_SCORE if row['metrics'][b] > 1.25 * row['curves']['chance'][b]]
    assert len(above) >= 7 and row['metrics']['AVG'] > 45


@pytest.mark.parametrize('name', study_models())
def test_scores_of_both_kinds(models, name):
    s = score(models[name], instructions('recovery', 4), criteria=('bi', 'taylor', 'activation'), progress=False)
    a = models[name].architecture
    assert (
        s.layers['bi'].shape == (a.num_layers,)
        and s.kv_heads['taylor'].shape == (a.num_layers, a.kv_heads)
        and s.mlp_channels['activation'].shape == (a.num_layers, a.mlp_channels)
    )
    assert all(
        (x > 0).all() and x.isfinite().all()
        for x in (s.layers['bi'], s.kv_heads['taylor'], s.mlp_channels['activation'])
    )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', study_models())
def test_removing_equals_zeroing_with_pictures(models, batches, name, kind):
    lvlm, batch = models[name], {k: v for k, v in batches[name].items() if k != 'labels'}
    plan = plan_for(lvlm, kind)
    student, keep = apply_plan(lvlm, plan), batch['attention_mask'].bool()
    got, want = logits(student, batches[name]), zeroed(lvlm, plan, batch)[keep]
    assert torch.allclose(got, want, atol=2e-3, rtol=1e-3) and (want - logits(lvlm, batches[name])).abs().max() > 0.5
    assert plan.remaining['parameters'] == parameter_sizes(student)['total']


@pytest.mark.parametrize('kind', ['layers', 'widths', 'combined'])
@pytest.mark.parametrize('name', study_models())
def test_saved_equals_loaded_and_cached_equals_uncached(models, batches, name, kind, tmp_path):
    lvlm = models[name]
    student = apply_plan(lvlm, plan_for(lvlm, kind))
    save_lvlm(student, tmp_path / 's')
    batch = {k: v for k, v in batches[name].items() if k != 'labels'}
    want = student.model(**batch).logits
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / 's').eval()
    assert torch.equal(stock(**batch).logits, want) and torch.equal(
        load_lvlm(tmp_path / 's').model(**batch).logits, want
    )
    one = {k: v[:1] for k, v in batch.items()}
    n = int(one['attention_mask'].sum())
    one = {k: v[:, :n] if k in ('input_ids', 'attention_mask') else v for k, v in one.items()}
    assert torch.equal(generate_greedy(student, one, 20), generate_greedy(student, one, 20, cache=False))


def test_plans_are_the_stored_recipes():
    for name, plan in STUDY_MODEL_PLANS.items():
        recipe = study_recipe(name)
        assert recipe['seed'] == plan['seed'] and recipe.get('parent') == plan.get('parent')
        first, later = recipe['steps'], [part['steps'] for part in recipe.get('continued', ())]
        if 'pretrain_steps' in plan:
            assert (first, recipe['finetuning']['steps']) == (plan['pretrain_steps'], plan['finetune_steps'])
        else:
            assert first == plan.get('until', plan['steps'])
            assert later == [steps for _, steps in plan.get('continued', ())]


@pytest.mark.parametrize('name', study_models())
def test_the_card_says_how_it_was_made(name):
    card = (STUDY_MODELS_FOLDER / name / 'README.md').read_text()
    assert study_model_card(name) in card
    assert ('not independent' in card) == ('parent' in STUDY_MODEL_PLANS[name])


@pytest.mark.slow
def test_the_first_steps_of_a_training_are_those_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv('LVLM_CACHE', str(tmp_path))
    plan, recipe = STUDY_MODEL_PLANS['tiny-gqa'], study_recipe('tiny-gqa')
    lvlm = mha_to_gqa(load_lvlm(plan['parent']), seed=plan['seed'])
    losses = packed_finetune(lvlm, 'again', plan['steps'], until=40)
    assert mean_losses(losses) == pytest.approx(recipe['loss'][:2], rel=0.02)
