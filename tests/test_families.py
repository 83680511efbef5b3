"The study models as they are shipped: what they are, what they can do, and that scores, surgery and recovery treat all alike."
import json
import pytest
import torch
from test_surgery import KINDS, made, silenced
from transformers import AutoModelForImageTextToText
from lvlm_study.core import read_rows
from lvlm_study.data import Collator
from lvlm_study.evaluation import TOP
from lvlm_study.families import FAMILIES, POOLED
from lvlm_study.importance import score
from lvlm_study.models import STUDY_MODELS, count_parameters, load_lvlm, save_lvlm, study_models
from lvlm_study.plans import sizes
from lvlm_study.suite import instructions
from lvlm_study.surgery import apply_plan, says

@pytest.fixture(scope='module')
def models(): return {n: load_lvlm(n) for n in study_models()}

@pytest.fixture(scope='module')
def batches(models): return {n: Collator(m)([instructions('recovery', 4)[i] for i in range(4)]) for n,m in models.items()}

@torch.no_grad()
def logits(lvlm, batch):
    keep = batch['attention_mask'].bool()                                              # what stands behind the end is nobody's business
    return lvlm.model(**{k: v for k,v in batch.items() if k!='labels'}).logits[keep]

def test_four_are_there_and_each_is_another_architecture(models):
    assert set(models)=={'tiny-llava', *FAMILIES, *POOLED}
    kinds = {n: (m.anatomy.parallel, bool(m.anatomy.biases), 'qkv' in m.anatomy.attn, 'gate_up' in m.anatomy.mlp, m.anatomy.heads//m.anatomy.kv_heads) for n,m in models.items()}
    assert kinds=={'tiny-llava': (False, False, False, False, 1), 'tiny-bunny': (True, True, False, False, 1), 'tiny-internvl': (False, False, True, True, 1),
        'tiny-gqa': (False, False, False, False, 4)}

@pytest.mark.parametrize('name', study_models())
def test_shipped_small_with_a_recipe(models, name):
    files = list((STUDY_MODELS/name).iterdir()); recipe = json.loads((STUDY_MODELS/name/'recipe.json').read_text())
    assert sum(f.stat().st_size for f in files)<10e6 and not [f.name for f in files if f.suffix in ('.bin', '.pt', '.pkl', '.py')]
    assert recipe['steps']>0 and recipe['secs']>0 and recipe['loss'] and {'seed', 'env'}<=set(recipe)
    row = next(r for r in read_rows('layer_pruning').values() if r['run']['model']==name and r['run']['method']=='none' and not r['run']['note'] and not r['run']['limit'])
    assert {*TOP, 'AVG'}==set(recipe['scores']) and abs(recipe['scores']['AVG']-row['metrics']['AVG'])<1
    counts = count_parameters(models[name])
    assert counts['total']==sum(p.numel() for p in models[name].model.parameters()) and .85<counts['LM']/counts['total']<.95

@pytest.mark.parametrize('name', study_models())
def test_what_it_can_do_is_stored_and_far_above_chance(name):
    row = next(r for r in read_rows('layer_pruning').values() if r['run']['model']==name and r['run']['method']=='none' and not r['run']['note'] and not r['run']['limit'])
    above = [b for b in TOP if row['metrics'][b]>1.25*row['curves']['chance'][b]]
    assert len(above)>=7 and row['metrics']['AVG']>45

@pytest.mark.parametrize('name', study_models())
def test_scores_of_both_kinds(models, name):
    s = score(models[name], instructions('recovery', 4), criteria=('bi', 'taylor', 'activation'), progress=False); a = models[name].anatomy
    assert s.blocks['bi'].shape==(a.depth,) and s.heads['taylor'].shape==(a.depth, a.kv_heads) and s.channels['activation'].shape==(a.depth, a.channels)
    assert all((x>0).all() and x.isfinite().all() for x in (s.blocks['bi'], s.heads['taylor'], s.channels['activation']))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', study_models())
def test_removing_equals_zeroing_with_pictures(models, batches, name, kind):
    lvlm,batch = models[name], {k: v for k,v in batches[name].items() if k!='labels'}; plan = made(lvlm, kind)
    student,keep = apply_plan(lvlm, plan), batch['attention_mask'].bool()
    got,want = logits(student, batches[name]), silenced(lvlm, plan, batch)[keep]
    assert torch.allclose(got, want, atol=2e-3, rtol=1e-3) and (want-logits(lvlm, batches[name])).abs().max()>.5
    assert plan.left['parameters']==sizes(student)['total']

@pytest.mark.parametrize('kind', ['layers', 'widths', 'combined'])
@pytest.mark.parametrize('name', study_models())
def test_saved_equals_loaded_and_cached_equals_uncached(models, batches, name, kind, tmp_path):
    lvlm = models[name]; student = apply_plan(lvlm, made(lvlm, kind)); save_lvlm(student, tmp_path/'s')
    batch = {k: v for k,v in batches[name].items() if k!='labels'}; want = student.model(**batch).logits
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path/'s').eval()
    assert torch.equal(stock(**batch).logits, want) and torch.equal(load_lvlm(tmp_path/'s').model(**batch).logits, want)
    one = {k: v[:1] for k,v in batch.items()}; n = int(one['attention_mask'].sum())
    one = {k: v[:, :n] if k in ('input_ids', 'attention_mask') else v for k,v in one.items()}
    assert torch.equal(says(student, one, 20), says(student, one, 20, cache=False))
