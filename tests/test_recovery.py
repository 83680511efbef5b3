"Recovery does what it says: exactly these parameters, exactly these losses, exactly the same after a kill."
import copy, gc, json, math, os, random, subprocess, sys
from dataclasses import replace
import numpy as np
import pytest
import torch
import transformers
import zoo
from torch.nn import functional as F
from lvlm_study import recovery as R
from lvlm_study.data import Collator
from lvlm_study.models import load_lvlm
from lvlm_study import losses as L
from lvlm_study.losses import Healing
from lvlm_study.opinions import Opinions, Told, write_opinions
from lvlm_study.recovery import RECIPES, TRAINS, Samples, learner, recover, settings, trained_names
from lvlm_study.suite import instructions
from lvlm_study.surgery import Plan, apply_plan

N = 24
QUICK = dict(max_steps=3, batch_size=4, lora_rank=4, progress=False)
transformers.logging.set_verbosity_error()

@pytest.fixture(scope='module', autouse=True)
def quick_gc():
    "Each training begins with a garbage collection; what the imports left behind need not be searched each time."
    gc.collect(); gc.freeze()
    yield
    gc.unfreeze()

@pytest.fixture(scope='module')
def teacher():
    "Six blocks of the study model, with a norm that is not all ones: errors before and after it would not be seen otherwise."
    lvlm = load_lvlm('tiny-llava')
    lvlm = apply_plan(lvlm, Plan.of(lvlm, blocks=[0,1,2,9,10,11]))
    return replace(lvlm, plan=None)

@pytest.fixture(scope='module')
def student(teacher):
    lvlm = apply_plan(teacher, Plan.of(teacher, blocks=[0,2,5]))
    torch.manual_seed(1)
    for p in lvlm.part('projector').parameters(): p.data += .02*torch.randn_like(p)     # not the teacher's projector
    return lvlm

@pytest.fixture(scope='module')
def rows(): return instructions('recovery', N)
@pytest.fixture(scope='module')
def samples(teacher, rows): return Samples(teacher, rows)
@pytest.fixture(scope='module')
def batch(samples): samples.need(range(4)); return samples.collate([samples[i] for i in range(4)])

def weights(lvlm): return {n: p.detach().clone() for n,p in lvlm.model.named_parameters()}
def differ(a, b): return {n for n in a if not torch.equal(a[n], b[n])}
def gap(a, b): return max(float((a[n].float()-b[n].float()).abs().max()) for n in a)
def run(student, samples, recipe='sft', **kw): return recover(student, samples, recipe, **QUICK | kw)

# --- what is trained --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trains', TRAINS)
def test_exactly_these_parameters_change(trains, student, teacher, samples):
    before,of_teacher = weights(student), weights(teacher)
    result = run(student, samples, 'sft+hidden', teacher=teacher, trains=trains, weight_decay=.1, lora_dropout=.1)
    assert differ(weights(result.lvlm), before) == trained_names(student, trains)
    assert not differ(weights(student), before) and not differ(weights(teacher), of_teacher)

def test_names_of_what_is_trained(student):
    names,everything = {t: trained_names(student, t) for t in TRAINS}, set(weights(student))
    vision = {n for n in everything if n.startswith(student.anatomy.vision)}
    assert names['projector+lm'] == everything-vision
    assert names['projector+lora'] == names['projector'] | names['lora'] and not names['projector'] & names['lora']
    assert len(names['lora']) == 7*student.anatomy.depth and len(names['projector']) == 4

@pytest.mark.parametrize('trains', TRAINS)
def test_only_what_is_trained_has_a_gradient_and_trains(trains, student, teacher):
    lvlm,_ = learner(student, settings('sft', trains=trains))
    step = Healing(lvlm, settings('sft+hidden', trains=trains), teacher).train()
    assert not any(p.requires_grad for p in lvlm.part('vision').parameters())
    assert not lvlm.part('vision').training and not teacher.model.training
    assert lvlm.part('lm').training == ('lora' in trains or 'lm' in trains)
    assert not any('teacher' in n for n in step.state_dict()) and not set(map(id, teacher.model.parameters())) & set(map(id, step.parameters()))

def test_nothing_outside_is_touched(student, teacher, samples):
    student.model.train(); teacher.model.train()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), transformers.logging.get_verbosity(), dict(os.environ)
    flags = [p.requires_grad for p in student.model.parameters()]
    result = run(student, samples, 'hidden', teacher=teacher)
    assert student.model.training and teacher.model.training and not result.lvlm.model.training
    assert [p.requires_grad for p in result.lvlm.model.parameters()] == flags
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert transformers.logging.get_verbosity() == states[3] and {k for k in os.environ if os.environ[k] != states[4].get(k)} <= {'ACCELERATE_MIXED_PRECISION'}
    student.model.eval(); teacher.model.eval()

def test_merged_equals_unmerged(student, batch):
    lvlm,peft = learner(student, settings('sft', lora_rank=4))
    torch.manual_seed(0)
    for n,p in lvlm.model.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.05)
        if 'modules_to_save' in n: p.data.mul_(1.1)
    see = lambda l: L.last_states(l, batch['input_ids'], batch['attention_mask'], batch['features']).detach()
    apart = see(lvlm)
    merged = R.healed(lvlm, peft, student)
    assert torch.allclose(see(merged), apart, atol=1e-4) and not torch.allclose(see(student), apart, atol=1e-2)
    assert weights(merged).keys() == weights(student).keys()
    assert {type(m) for m in merged.model.modules()} == {type(m) for m in student.model.modules()}

# --- the losses -------------------------------------------------------------------------------------------------

def plain(student, teacher, collated, s):
    "Each loss from full logits and hidden states, in a few lines."
    raw = [[], []]                                                        # what enters the last norm: transformers shows it after the norm only
    hooks = [l.part('norm').register_forward_pre_hook(lambda m, args, r=r: r.append(args[0])) for l,r in zip((student, teacher), raw)]
    with torch.no_grad(): a,b = (l.model(**collated, output_hidden_states=True) for l in (student, teacher))
    for h in hooks: h.remove()
    there,answer = collated['attention_mask'].bool(), F.pad(collated['labels'][:, 1:] != -100, (0, 1))
    on = {'answer': answer, 'all': there}
    ce = F.cross_entropy(a.logits[:, :-1].flatten(0, 1), collated['labels'][:, 1:].flatten())
    ls,lt = ((l.logits[on[s.kd_tokens]]/s.tau).log_softmax(-1) for l in (a, b))
    kl = lambda p,q: (p.exp()*(p-q)).sum(-1).mean()*s.tau**2
    m = ((ls.exp()+lt.exp())/2).log()
    after = lambda o, r: [*o.hidden_states[1:-1], r[0]]                   # of each block
    blocks = [(after(a, raw[0])[i], after(b, raw[1])[n]) for i,n in enumerate(student.plan['blocks']) if s.states=='all' or n in s.states] if s.states!='last' else []
    pairs = [(x[on[s.hidden_tokens]], y[on[s.hidden_tokens]]) for x,y in [(a.hidden_states[-1], b.hidden_states[-1])]*(s.states in ('last', 'all'))+blocks]
    cosine = lambda x, y: (1-(x*y).sum(-1)/x.norm(dim=-1)/y.norm(dim=-1)).mean()
    relative = lambda x, y: (((x-y)**2).sum(-1)/(y**2).sum(-1)).mean()
    hidden = sum(dict(squared=F.mse_loss, cosine=cosine, relative=relative)[s.hidden](x, y) for x,y in pairs)/len(pairs)
    return {'sft': ce, 'kl': kl(lt, ls), 'rkl': kl(ls, lt), 'jsd': (kl(lt, m)+kl(ls, m))/2, 'hidden': hidden}

CASES = [(r, {}) for r in RECIPES] + [('kl', dict(kd_tokens='all')), ('sft+rkl', dict(kd_tokens='all', tau=1.)), ('hidden', dict(hidden_tokens='answer')),
    ('sft+hidden', dict(hidden='cosine')), ('sft+hidden', dict(hidden='cosine', hidden_tokens='answer')), ('hidden', dict(states=(0, 5))), ('sft+blocks', dict(hidden_tokens='answer'))]
@pytest.mark.parametrize('recipe, change', CASES, ids=str)
def test_each_loss_is_the_plain_one(recipe, change, student, teacher, samples, rows):
    s,four = settings(recipe, **change), [0, 1, 2, 3]
    b,collated = samples.collate([samples[i] for i in four]), Collator(student)([rows[i] for i in four])
    with torch.no_grad(): got = Healing(student, s, teacher).eval()(**b)
    n = {'answer': int((b['labels'][:, 1:] != -100).sum()), 'all': int(b['attention_mask'].sum())}
    tokens = {'sft': 'answer', s.kd: s.kd_tokens, 'hidden': s.hidden_tokens}
    want = plain(student, teacher, collated, s)
    assert got.keys() == s.terms.keys()
    for k in s.terms: assert float(got[k])/n[tokens[k]] == pytest.approx(float(want[k]), rel=1e-4), k

@pytest.mark.parametrize('recipe', ['reference', 'sft+hidden+rkl'])
def test_what_is_logged_is_the_plain_loss(recipe, student, teacher, samples, rows):
    "The first step of a real run, in two pieces, logs each loss in its own unit over the whole batch."
    s = settings(recipe)
    result = run(student, samples, recipe, teacher=teacher, trains='projector', max_steps=1, accumulation=2, batch_size=3)
    order = R.training_order(samples._lengths(range(N)), result.settings)
    want = plain(student, teacher, Collator(student)([rows[i] for i in order]), s)
    for k,w in s.terms.items(): assert float(result.curves[k][0]) == pytest.approx(float(want[k]), rel=1e-4), k
    assert float(result.curves.loss[0]) == pytest.approx(sum(w*float(want[k]) for k,w in s.terms.items()), rel=1e-4)

def test_training_is_the_plain_loop(student, samples, rows):
    "Three steps of AdamW by hand give the same projector."
    result = run(student, samples, trains='projector', lr=1e-2, projector_lr=2e-3, max_grad_norm=.5, warmup=.4)
    lvlm = replace(student, model=copy.deepcopy(student.model))
    ps = list(lvlm.part('projector').parameters()); opt = torch.optim.AdamW(ps, weight_decay=0)
    order = R.training_order(samples._lengths(range(N)), result.settings)
    for k,share in enumerate((1, 1, .5)):
        opt.param_groups[0]['lr'] = 2e-3*share
        lvlm.model(**Collator(student)([rows[i] for i in order[4*k:4*k+4]])).loss.backward()
        torch.nn.utils.clip_grad_norm_(ps, .5); opt.step(); lvlm.model.zero_grad()
    assert gap(weights(lvlm), weights(result.lvlm)) < 2e-5 and gap(weights(lvlm), weights(student)) > 1e-3
    assert result.curves.lr.tolist() == pytest.approx([2e-3, 2e-3, 1e-3])

ALL = dict(recipe='sft+hidden+kl')
def sums(student, teacher, b, **kw):
    with torch.no_grad(): return Healing(student, settings(ALL['recipe'], **kw), teacher).eval()(**b)

def test_padding_has_no_influence(student, teacher, samples, batch):
    want = sums(student, teacher, batch)
    off = batch['attention_mask']==0
    assert off.any()
    other = sums(student, teacher, batch | dict(input_ids=batch['input_ids'].masked_fill(off, 9)))
    one_by_one = [sums(student, teacher, samples.collate([samples[i]])) for i in range(4)]
    for k,w in want.items():
        assert float(other[k]) == pytest.approx(float(w), rel=1e-5)
        assert float(sum(o[k] for o in one_by_one)) == pytest.approx(float(w), rel=1e-4)

def test_prompt_tokens_have_no_influence(student, teacher, batch):
    "The words of the vocabulary are asked for at answers only: what the head would say at the prompt plays no part."
    asked = []
    heads = [m.part('head').register_forward_pre_hook(lambda m, args: asked.append(len(args[0]))) for m in (student, teacher)]
    sums(student, teacher, batch)
    for h in heads: h.remove()
    answers = int((batch['labels'][:, 1:] != -100).sum())
    assert asked == [answers, answers]
    logits = torch.randn(4, batch['labels'].shape[1], 50, requires_grad=True)
    L.sft_loss(logits.flatten(0, 1), L.next_labels(batch['labels']).clamp(max=49).flatten()).sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, L.next_labels(batch['labels']) != -100)

@pytest.mark.parametrize('name', ['mha', 'phi', 'phi3'])
def test_one_look_serves_both(name):
    "Features are computed once a picture, of several tiles in InternVL, and give each model what its own forward pass gives."
    student,teacher = zoo.build(name), zoo.build(name); x = zoo.inputs(student); n = student.config.image_seq_length
    with torch.no_grad():
        for p in teacher.part('projector').parameters(): p += .1*torch.randn_like(p)
    if name=='phi3': x['input_ids'][0, 5:7] = 3; x['pixel_values'] = torch.randn(4, 3, 16, 16)      # three tiles and one
    f,(tokens,mask) = L.vision_features(student, dict(pixel_values=x['pixel_values'])), (x['input_ids'], x['attention_mask'])
    assert len(f) == (4 if name=='phi3' else 2*n) == int((tokens==3).sum())
    with torch.no_grad(): said = [(l.part('head')(L.last_states(l, tokens, mask, f)), l.model(**x).logits) for l in (student, teacher)]
    for ours,stock in said: assert torch.allclose(ours, stock, atol=1e-5)
    assert not torch.allclose(said[0][0], said[1][0], atol=1e-3)
    looks = []
    hooks = [l.part('vision').register_forward_hook(lambda *a: looks.append(1)) for l in (student, teacher)]
    with torch.no_grad(): Healing(student, settings('sft+hidden'), teacher)(tokens, mask, tokens, images=dict(pixel_values=x['pixel_values']))
    for h in hooks: h.remove()
    assert len(looks) == 1

@pytest.mark.parametrize('tokens', ['answer', 'all'])
def test_where_hidden_states_count(tokens, student, teacher, batch):
    "Moving the state of a token moves the loss exactly where it should: never at padding, and at images and questions only if asked."
    h,t = torch.randn(2, *batch['labels'].shape, student.anatomy.width, generator=torch.Generator().manual_seed(0))
    where = dict(answer=L.next_labels(batch['labels'])!=-100, all=batch['attention_mask'].bool()); h.requires_grad_()
    Healing(student, settings('hidden', hidden_tokens=tokens), teacher)._states([(h, t)], where)['hidden'].backward()
    assert torch.equal(h.grad.abs().sum(-1)>0, where[tokens])
    image = batch['input_ids']==student.config.image_token_id
    assert image.any() and bool((h.grad[image]!=0).any()) == (tokens=='all')

def test_an_answer_token_does(student, teacher, batch):
    at = (batch['labels'] != -100).nonzero()[0]
    labels = batch['labels'].clone(); labels[tuple(at)] += 1
    assert float(sums(student, teacher, batch | dict(labels=labels))['sft']) != pytest.approx(float(sums(student, teacher, batch)['sft']), rel=1e-4)

@pytest.mark.parametrize('change', [dict(chunk=7), dict(gradient_checkpointing=True), dict(feature_gb=0.), dict(feature_gb=0., workers=1)], ids=str)
def test_saving_memory_changes_nothing(change, student, teacher, rows, samples):
    kw = dict(teacher=teacher, trains='projector+lora', max_steps=2)
    want,got = run(student, samples, ALL['recipe'], **kw), run(student, rows, ALL['recipe'], **kw | change)
    assert gap(weights(want.lvlm), weights(got.lvlm)) < 1e-4
    for k in want.settings.terms: assert got.curves[k].tolist() == pytest.approx(want.curves[k].tolist(), rel=1e-4)
    assert not any(getattr(b, 'gradient_checkpointing', False) for b in got.lvlm.blocks)

def test_gradient_checkpointing_recomputes(student, batch):
    "Blocks run a second time in the backward pass, also where they are frozen."
    lvlm,_ = learner(student, settings('sft', trains='projector', gradient_checkpointing=True))
    calls = []
    handle = lvlm.blocks[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    Healing(lvlm, settings('sft', trains='projector', gradient_checkpointing=True)).train()(**batch)['sft'].backward()
    handle.remove()
    assert len(calls) == 2

# --- a teacher that spoke before ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def opinions(teacher, samples, tmp_path_factory):
    words = teacher.part('head').weight.shape[0]
    return write_opinions(teacher, samples, tmp_path_factory.mktemp('said')/'o', top=words-1, dtype=torch.float32, part=10, progress=False)

@pytest.mark.parametrize('kind', ['kl', 'rkl', 'jsd'])
def test_told_is_beside(kind, student, teacher, samples, opinions):
    "With all words but one kept, the student that is told has the losses of the one that sits beside its teacher."
    s,told = settings(f'sft+{kind}', gamma=1., hidden_tokens='answer', chunk=7), Told(samples, opinions)
    with torch.no_grad():
        a = Healing(student, s).eval()(**told.collate([told[i] for i in (5, 0, 3)]))
        b = Healing(student, s, teacher).eval()(**samples.collate([samples[i] for i in (5, 0, 3)]))
    for k in b: assert float(a[k]) == pytest.approx(float(b[k]), rel=1e-4), k

def test_a_student_alone_learns_the_same(student, teacher, samples, opinions):
    kw = dict(hidden_tokens='answer', trains='projector')
    alone,beside = (run(student, samples, 'sft+hidden+kl', teacher=t, **kw) for t in (opinions, teacher))
    assert gap(weights(alone.lvlm), weights(beside.lvlm)) < 1e-4 < gap(weights(alone.lvlm), weights(student))
    for k in alone.settings.terms: assert alone.curves[k].tolist() == pytest.approx(beside.curves[k].tolist(), rel=1e-3)

def test_opinions_are_added_and_survive_a_kill(teacher, samples, opinions, tmp_path):
    import shutil
    shutil.copytree(opinions.folder, tmp_path/'o'); (tmp_path/'o'/'part-00001.safetensors').unlink(); (tmp_path/'o'/'.part-00009.safetensors.7.partial').write_bytes(b'half')
    fewer = Opinions(tmp_path/'o'); gone = fewer.missing(samples, range(N))
    assert len(fewer) == N-10 and len(gone) == 10
    again = write_opinions(teacher, samples, tmp_path/'o', range(N-1, -1, -1), top=opinions.about['top'], dtype=torch.float32, progress=False)
    for key in opinions.where:
        for k,v in opinions.of(key).items(): assert torch.allclose(v.float(), again.of(key)[k].float(), atol=1e-3) or k=='ids'

@pytest.mark.parametrize('recipe, kw, says', [('kl', dict(tau=1.), 'kept for temperature 2, not 1'), ('kl', dict(kd_tokens='all'), "say kd_tokens='answer'"), ('hidden', {}, "say hidden_tokens='answer'"),
    ('sft+blocks', dict(hidden_tokens='answer'), "say states='last'")], ids=str)
def test_opinions_that_do_not_serve(recipe, kw, says, student, samples, opinions):
    with pytest.raises(ValueError, match=says) as e: run(student, samples, recipe, teacher=opinions, **kw)
    assert '\n' not in str(e.value)

def test_opinions_on_other_samples(student, teacher, rows, samples, opinions):
    other = Samples(teacher, instructions('recovery', N+4).select(range(4, N+4)))
    with pytest.raises(ValueError, match="no opinions on 4 of the 24 samples, such as 'recovery-24'"): run(student, other, 'kl', teacher=opinions)

# --- steps and orders -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('recipe', ['sft', 'sft+hidden+kl'])
def test_accumulated_batches_are_one_batch(recipe, student, teacher, samples):
    a,b = (run(student, samples, recipe, teacher=teacher, batch_size=n, accumulation=k) for n,k in ((8, 1), (4, 2)))
    for k in ('loss', 'grad_norm', *a.settings.terms): assert a.curves[k].tolist() == pytest.approx(b.curves[k].tolist(), rel=1e-4)
    assert gap(weights(a.lvlm), weights(b.lvlm)) < 1e-4

def test_order():
    lengths = list(range(50))
    order = lambda processes=1, **kw: R.training_order(lengths, settings('sft', **kw), processes)
    for by_length in (True, False):
        assert sorted(order(by_length=by_length)) == list(range(50)) and sorted(order(epochs=2, by_length=by_length)) == sorted([*range(50)]*2)
        assert order(seed=1, by_length=by_length) != order(by_length=by_length) == order(by_length=by_length)
    assert order(batch_size=4, processes=2) == order(batch_size=2, accumulation=4) == order(batch_size=8)
    assert len(order(max_steps=3, batch_size=4, accumulation=2)) == 24 and len(order(epochs=.5)) == 25
    assert order(epochs=2)[:50] == order(epochs=1)

def test_every_sample_is_seen_once(student, samples):
    result = recover(student, samples, trains='projector', batch_size=10, progress=False)
    assert len(result.curves) == 3 and result.indices == list(range(N))

def test_fractions_are_nested_and_only_they_are_encoded(student, teacher, rows):
    fresh = Samples(teacher, rows)
    small,large = (run(student, fresh, fraction=f, max_steps=1, trains='projector') for f in (.25, .5))
    assert set(small.indices) < set(large.indices) and len(large.indices) == N//2
    assert set(fresh.encoded) == set(large.indices) | {0}
    assert run(student, fresh, fraction=.25, seed=1, max_steps=1, trains='projector').indices != small.indices

def test_same_seed_same_weights(student, samples):
    a,b,c = (weights(run(student, samples, seed=s, lora_dropout=.2).lvlm) for s in (3, 3, 4))
    assert not differ(a, b) and differ(a, c)

def test_check_is_called_and_changes_nothing(student, samples):
    def check(lvlm):
        assert not lvlm.model.training and not torch.is_grad_enabled()
        return dict(draw=torch.rand(()), norm=lvlm.part('projector').linear_1.weight.norm())
    a,b = run(student, samples, lora_dropout=.2), run(student, samples, lora_dropout=.2, check=check, check_every=2)
    assert not differ(weights(a.lvlm), weights(b.lvlm))
    assert b.curves.norm.notna().tolist() == [False, True, True] and 'norm' not in a.curves

def test_half_precision(student, samples):
    "What is trained is trained in float32; what comes back is as it came."
    half = replace(student, model=copy.deepcopy(student.model).bfloat16())
    eyes = Samples(half, samples.ds)
    for bf16 in (False, True):
        lvlm,_ = learner(half, settings('sft', bf16=bf16))
        assert {p.dtype for p in lvlm.model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in lvlm.part('vision').parameters()} == {torch.bfloat16 if bf16 else torch.float32}
        result = run(half, eyes, bf16=bf16, max_steps=2)
        assert {p.dtype for p in result.lvlm.model.parameters()} == {torch.bfloat16} and result.curves.sft[1] < result.curves.sft[0]

# --- killed and called again ------------------------------------------------------------------------------------

class Killed(Exception): pass
class Kill(transformers.TrainerCallback):
    "Dies when `step` steps are done."
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step==self.step: raise Killed

def stopped(student, samples, out, at, recipe='sft', **kw):
    with pytest.raises(Killed): run(student, samples, recipe, out=out, callbacks=[Kill(at)], **kw)

@pytest.mark.parametrize('recipe, kw', [('sft+hidden+kl', dict(lora_dropout=.2)), ('sft', dict(trains='projector+lm', weight_decay=.1, accumulation=2, batch_size=3))])
def test_resumed_equals_uninterrupted(recipe, kw, student, teacher, samples, tmp_path):
    "Two kills, over the end of an epoch, with dropout: the same bits."
    kw = dict(kw, teacher=teacher, max_steps=8, save_every=2, fraction=.75)
    whole = run(student, samples, recipe, **kw)
    for at in (3, 7): stopped(student, samples, tmp_path/'out', at, recipe, **kw)
    assert R.last_checkpoint(tmp_path/'out'/'work').name == 'checkpoint-6'
    resumed = run(student, samples, recipe, out=tmp_path/'out', **kw)
    assert not differ(weights(whole.lvlm), weights(resumed.lvlm))
    for k in ('step', 'loss', 'lr', 'grad_norm', *whole.settings.terms): assert whole.curves[k].tolist() == resumed.curves[k].tolist(), k
    assert not differ(weights(load_lvlm(tmp_path/'out'/'model')), weights(resumed.lvlm))

def test_a_half_written_checkpoint_is_not_taken(student, samples, tmp_path):
    kw = dict(trains='projector', save_every=1, max_steps=4)
    stopped(student, samples, tmp_path/'out', 2, **kw)
    work = tmp_path/'out'/'work'
    (work/'checkpoint-3').mkdir(); (work/'checkpoint-3'/'model.safetensors').write_bytes(b'half'); (work/'checkpoint-3'/'trainer_state.json').write_text('{"global_st')
    assert not differ(weights(run(student, samples, out=tmp_path/'out', **kw).lvlm), weights(run(student, samples, **kw).lvlm))

def test_killed_between_training_and_keeping(student, samples, tmp_path, monkeypatch):
    def dies(*args, **kw): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(R, 'save_lvlm', dies); run(student, samples, out=tmp_path/'out')
    assert not (tmp_path/'out'/'model').exists()
    result = run(student, samples, out=tmp_path/'out', callbacks=[Kill(0)])      # no step is taken again
    assert (tmp_path/'out'/'model').is_dir() and len(result.curves) == 3

def test_the_folder(student, samples, teacher, tmp_path):
    from peft import PeftModel
    stopped(student, samples, tmp_path/'out', 2, save_every=1)
    held = sorted(p.name for p in (tmp_path/'out'/'work'/'checkpoint-2').iterdir())
    assert held == ['model.safetensors', 'optimizer.pt', 'rng_state.pth', 'scheduler.pt', 'trainer_state.json']
    result = run(student, samples, out=tmp_path/'out', save_every=1)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['adapter', 'curves.jsonl', 'indices.json', 'model', 'settings.json']
    assert not [p for p in (tmp_path/'out').rglob('*') if p.suffix in ('.bin', '.pt', '.pth', '.pkl')]
    assert json.loads((tmp_path/'out'/'indices.json').read_text()) == result.indices
    assert 'projector+lora' in (tmp_path/'out'/'model'/'README.md').read_text() and (tmp_path/'out'/'model'/'plan.json').exists()
    again = run(student, samples, out=tmp_path/'out', callbacks=[Kill(0)])       # finished: read, not trained
    assert not differ(weights(again.lvlm), weights(result.lvlm)) and again.settings == result.settings
    stock = PeftModel.from_pretrained(copy.deepcopy(student.model), tmp_path/'out'/'adapter').merge_and_unload()
    assert gap(weights(replace(student, model=stock)), weights(result.lvlm)) < 1e-6

# --- bad input --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw, says', [
    (dict(recipe='sft+l2'), r"no recipe 'sft\+l2'; there are sft, kl"), (dict(recipe='kl'), 'learning from kl needs a teacher'), (dict(trains='all'), "trains is one of projector, .*not 'all'"),
    (dict(alpha=0.), 'nothing to learn from'), (dict(alpha=-1.), 'alpha must be at least 0, not -1'), (dict(fraction=0.), 'up to 1, not 0'), (dict(fraction=1.5), 'up to 1, not 1.5'),
    (dict(lr=0.), 'lr must be above 0'), (dict(lr=math.nan), 'lr must be above 0, not nan'), (dict(batch_size=0), 'batch_size must be at least 1'), (dict(kd='l2'), "kd is one of kl, rkl, jsd, not 'l2'"),
    (dict(schedule='step'), 'schedule is one of cosine'), (dict(learning_rate=1.), "'learning_rate' is no setting")], ids=lambda o: str(o)[:40])
def test_bad_settings_are_refused_in_a_sentence(kw, says, student, samples):
    with pytest.raises(ValueError, match=says) as e: recover(student, samples, **kw)
    assert '\n' not in str(e.value)

def test_teacher_that_does_not_fit(student, teacher, samples):
    stranger = replace(teacher, tokenizer=copy.deepcopy(teacher.tokenizer)); stranger.tokenizer.add_tokens(['polka'])
    with pytest.raises(ValueError, match='different vocabularies'): run(student, samples, 'kl', teacher=stranger)
    blinking = replace(teacher, model=copy.deepcopy(teacher.model)); next(blinking.part('vision').parameters()).data += 1
    with pytest.raises(ValueError, match='vision encoder of the teacher is another one'): run(student, samples, 'kl', teacher=blinking)
    with pytest.raises(ValueError, match='vision encoder of the model that the samples'): run(student, Samples(blinking, samples.ds))
    assert run(student, samples, 'sft', teacher=stranger, max_steps=1).settings.alpha    # SFT does not ask the teacher

def test_bad_data(student, samples, rows):
    from datasets import Dataset
    bare = Dataset.from_list([dict(r, messages=r['messages'][:1]) for r in rows.select(range(2))], features=rows.features)
    with pytest.raises(ValueError, match="'recovery-0' has no answer"): run(student, bare)
    with pytest.raises(ValueError, match='training set is empty'): run(student, rows.select([]))
    with pytest.raises(ValueError, match='cuts through its picture'): run(student, rows, max_length=20)
    with pytest.raises(ValueError, match='leaves none of its answer'): run(student, rows, max_length=32)
    table = rows.select(range(3)).to_list(); table[1]['images'][0]['bytes'] = b'no picture'
    broken = Dataset.from_list(table, features=rows.features)
    with pytest.raises(ValueError, match="'recovery-1': its picture does not decode"): run(student, broken)
    assert len(run(student, rows, max_length=150, max_steps=1).curves) == 1

@pytest.mark.parametrize('feature_gb', [2., 0.], ids=['kept', 'not kept'])
def test_pictures_that_do_not_decode(feature_gb, student, rows, tmp_path):
    "Stopped before the first step, or left out by name; a whole folder remembers it."
    from datasets import Dataset
    table = rows.select(range(12)).to_list()
    for i in (0, 7): table[i]['images'][0]['bytes'] = table[i]['images'][0]['bytes'][:60]
    torn,kw = Dataset.from_list(table, features=rows.features), dict(feature_gb=feature_gb, trains='projector')
    with pytest.raises(ValueError, match="'recovery-[07]': its picture does not decode"): run(student, torn, callbacks=[Kill(0)], **kw)
    r = run(student, torn, skip_broken=True, out=tmp_path/'out', **kw)
    assert r.skipped == ['recovery-0', 'recovery-7'] and r.indices == [i for i in range(12) if i not in (0, 7)] and '2 left out' in repr(r)
    again = run(student, torn, skip_broken=True, out=tmp_path/'out', callbacks=[Kill(0)], **kw)
    assert (again.skipped, again.indices) == (r.skipped, r.indices)
    only = Dataset.from_list([table[0]], features=rows.features)
    with pytest.raises(ValueError, match='no picture .* decodes'): run(student, only, skip_broken=True, **kw)

def test_trackers_are_off_unless_asked(student, samples, tmp_path, monkeypatch):
    assert R.training_arguments(settings('sft'), tmp_path, False).report_to == []
    with pytest.raises(ValueError, match="a tracker is tensorboard or wandb, not 'mlflow'"): settings('sft', trackers=('mlflow',))
    monkeypatch.setattr(R, 'is_wandb_available', lambda: False); monkeypatch.setattr(R, 'is_tensorboard_available', lambda: True)
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"): run(student, samples, trackers=('wandb',))
    assert R.training_arguments(settings('sft', trackers=('tensorboard',)), tmp_path, False).report_to == ['tensorboard']

def test_sharded_training_is_refused(student, samples, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ValueError, match='launch it without FSDP'): run(student, samples)

def test_blocks_that_are_not_left(student, teacher, samples):
    with pytest.raises(ValueError, match='block 3 is not in student and teacher: both have 0, 2, 5'): run(student, samples, 'hidden', teacher=teacher, states=(0, 3))
    for bad in ('first', (), (-1,)):
        with pytest.raises(ValueError, match="states is 'last', 'all', or the numbers"): settings('hidden', states=bad)
    assert settings('hidden', states=[0, 2]).states == (0, 2)

def test_a_folder_belongs_to_one_recovery(student, teacher, samples, rows, tmp_path):
    out,kw = tmp_path/'out', dict(trains='projector', max_steps=1)
    run(student, samples, out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with lr 0.001, not 0.01: choose another folder'): run(student, samples, out=out, lr=.01, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with student'): run(teacher, samples, out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with data'): run(student, rows.select(range(N-1, -1, -1)), out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with fraction 1.0, not 0.5'): run(student, samples, out=out, fraction=.5, **kw)
    assert run(student, samples, out=out, log_every=2, save_every=7, **kw).folder == out     # changes no weight
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='mine is in use and holds no recovery'): run(student, samples, out=tmp_path/'mine', **kw)
    assert [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis.txt']

def test_a_diverging_run_says_so(student, samples):
    with pytest.raises(FloatingPointError, match='the loss is .* at step .: lower lr') as e: run(student, samples, trains='projector+lm', lr=1e30, max_grad_norm=0)
    assert '\n' not in str(e.value)

def test_a_plain_language_model(teacher, samples):
    "No eye, no projector: LoRA on text; the projector is missed in a sentence."
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from lvlm_study.data import FEATURES, ask
    from lvlm_study.models import LVLM
    torch.manual_seed(0)
    lm = LVLM(AutoModelForCausalLM.from_config(teacher.config.text_config), tokenizer=teacher.tokenizer, name='a text model')
    text = Dataset.from_list([dict(id=str(i), images=[], messages=ask(f'What is {i}?', 'red')) for i in range(8)], features=FEATURES)
    assert run(lm, text, trains='lora').curves.sft.iloc[-1] < run(lm, text, trains='lora').curves.sft[0]
    with pytest.raises(ValueError, match='a text model has no projector to train'): run(lm, text)

# --- many processes ---------------------------------------------------------------------------------------------

TWO = '''
import os, sys, torch, transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from lvlm_study.models import load_lvlm
from lvlm_study.recovery import recover
from lvlm_study.suite import instructions
from lvlm_study.surgery import Plan, apply_plan
def work(out, batch):
    teacher = load_lvlm('tiny-llava'); teacher = apply_plan(teacher, Plan.of(teacher, blocks=[0,1,10,11])); teacher.plan = None; student = apply_plan(teacher, Plan.of(teacher, blocks=[0,3]))
    r = recover(student, instructions('recovery', 24), 'sft+hidden+kl', teacher=teacher, out=out, batch_size=int(batch), max_steps=3, fraction=.75, lora_rank=4, progress=False)
    assert len(r.curves) == 3
def process(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[3])
    work(sys.argv[1], sys.argv[2])
    torch.distributed.destroy_process_group()
if 'RANK' in os.environ or sys.argv[3]=='0': work(sys.argv[1], sys.argv[2]); sys.exit()
born = []
for rank in (0, 1):                                # the libraries are imported once
    born.append(os.fork())
    if not born[-1]:
        code = 1
        try: process(rank); code = 0
        finally: sys.stdout.flush(); os._exit(code)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in born))
'''
def same_curves(one, two):
    for k in ('loss', 'sft', 'kl', 'hidden', 'grad_norm'): assert one.curves[k].tolist() == pytest.approx(two.curves[k].tolist(), rel=1e-4)

def free_port():
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_two_processes_are_one(tmp_path):
    "Same subset, same losses, same weights as one process with the same global batch, over gloo."
    (tmp_path/'two.py').write_text(TWO); here = {}
    exec(TWO.split('def process')[0], here); here['work'](tmp_path/'by1', 8)
    subprocess.run([sys.executable, tmp_path/'two.py', tmp_path/'by2', '4', str(free_port())], check=True)
    one,two = map(R.load_recovery, (tmp_path/'by1', tmp_path/'by2'))
    assert one.indices == two.indices and gap(weights(one.lvlm), weights(two.lvlm)) < 1e-5
    same_curves(one, two)

@pytest.mark.slow
def test_torchrun(tmp_path):
    (tmp_path/'two.py').write_text(TWO)
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node']
    for n,batch in ((1, 8), (2, 4)): subprocess.run([*start, str(n), '--master_port', str(free_port()), tmp_path/'two.py', tmp_path/f'by{n}', str(batch), '0'], check=True, capture_output=True)
    one,two = map(R.load_recovery, (tmp_path/'by1', tmp_path/'by2'))
    assert one.indices == two.indices and gap(weights(one.lvlm), weights(two.lvlm)) < 1e-5
    same_curves(one, two)
