"Plans and surgery on every shape of block: four invariants, the ratio that was asked, folders that load anywhere, and bad input."
import copy, json, os, re, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, PhiConfig
from lvlm_study.layer_pruning import CHOICES, layer_plan
from lvlm_study.models import LVLM, load_lvlm, save_lvlm
from lvlm_study.plans import Plan, account, compose, make_plan, plan_card, sizes
from lvlm_study.surgery import apply_plan, doctor, engines, examine, load_pruned, says
from lvlm_study.width_pruning import FEW, HOW, drop_lowest, legal_widths, same_size, solve, width_plan
from lvlm_study.widths import block_class, is_mixed, mistral_twin, mixed_widths, refusal

@pytest.fixture(scope='module')
def models(): return {k: zoo.build(k) for k in zoo.BUILD}

def scores_of(sizes, seed=0, **meta):
    "Random scores for given counts: surgery must not care where they come from."
    g,n = torch.Generator().manual_seed(seed), len(sizes['blocks'])
    draw = lambda *s: dict(taylor=torch.rand(s, generator=g)+.01, l2=torch.rand(s, generator=g))
    return SimpleNamespace(blocks=dict(bi=draw(n)['taylor'], taylor=draw(n)['l2']), heads=draw(n, sizes['heads']), channels=draw(n, sizes['channels']),
        meta=dict(sizes=sizes, model='x') | meta)

def made(lvlm, kind, ratio=.3):
    s = scores_of(sizes(lvlm))
    if kind=='layers': return layer_plan(s, ratio)
    if kind=='combined': return width_plan(s, ratio+.15, within=layer_plan(s, ratio-.1))
    alone = 0 if (lvlm.name, kind)==('long', 'mixed') else None                        # no config holds mixed heads and a long table
    return width_plan(s, ratio, how='global' if kind=='mixed' else 'uniform', split=alone)
KINDS = ['layers', 'widths', 'mixed', 'combined']

@torch.no_grad()
def logits(lvlm): return lvlm.model(**zoo.inputs(lvlm)).logits

@torch.no_grad()
def silenced(lvlm, plan, batch=None):
    "The independent version: what is to go says nothing, because the columns that carry it are zero."
    m,a = copy.deepcopy(lvlm.model), lvlm.anatomy
    per = a.heads//a.kv_heads*a.head_dim
    for i,block in enumerate(m.get_submodule(a.blocks)):
        o,down = block.get_submodule(a.attn['o']), block.get_submodule(a.mlp['down'])
        if i not in plan.blocks:
            for x in (o, down):
                x.weight.zero_()
                if x.bias is not None: x.bias.zero_()
            continue
        for g in range(a.kv_heads):
            if g not in plan.heads[i]: o.weight[:, g*per:(g+1)*per] = 0
        down.weight[:, [c for c in range(a.channels) if c not in plan.channels[i]]] = 0
    return m(**(batch or zoo.inputs(lvlm))).logits

# --- the four invariants ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', zoo.BUILD)
def test_nothing_removed_changes_nothing(models, name):
    copied = apply_plan(models[name], Plan.of(models[name]))
    assert torch.equal(logits(copied), logits(models[name]))
    a,b = ({p.data_ptr() for p in m.model.parameters()} for m in (copied, models[name]))
    assert type(copied.model) is type(models[name].model) and not a & b

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', zoo.BUILD)
def test_removing_equals_zeroing_and_the_accounts_are_right(models, name, kind):
    lvlm,plan = models[name], made(models[name], kind)
    before = {k: v.clone() for k,v in lvlm.model.state_dict().items()}; config = lvlm.config.to_dict()
    student = apply_plan(lvlm, plan); want = silenced(lvlm, plan)
    assert plan.uniform==(kind!='mixed') and plan.realised['lm']>.2
    assert torch.allclose(logits(student), want, atol=2e-4, rtol=1e-3)
    assert (want-logits(lvlm)).abs().max()>.05                                         # else the test says nothing
    assert sum(p.numel() for p in student.model.parameters())==plan.left['parameters']==sizes(student)['total']
    assert all(torch.equal(v, before[k]) for k,v in lvlm.model.state_dict().items()) and lvlm.config.to_dict()==config
    assert [b.self_attn.layer_idx for b in student.blocks]==list(range(len(plan.blocks)))==list(range(student.config.get_text_config().num_hidden_layers))
    b = zoo.inputs(student); assert torch.equal(says(student, b, 12), says(student, b, 12, cache=False))
    assert Plan.from_json(student.plan).heads==plan.heads

def test_one_head_of_two_in_a_group_is_never_cut(models):
    "Grouped queries: 16 query heads, 8 groups; what stays is two query heads for each group that stays."
    student = apply_plan(models['gqa'], made(models['gqa'], 'widths'))
    assert student.anatomy.heads==2*student.anatomy.kv_heads<16

def test_tied_embeddings_stay_tied(models, tmp_path):
    student = apply_plan(models['tied'], made(models['tied'], 'combined'))
    assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    student.model.save_pretrained(tmp_path)
    assert torch.equal(logits(LVLM(AutoModelForCausalLM.from_pretrained(tmp_path).eval())), logits(student))

def test_what_else_a_model_carries_comes_along(models):
    m = copy.deepcopy(models['phi'].model).to(torch.bfloat16).train(); m.generation_config.max_length = 77
    for p in m.model.vision_tower.parameters(): p.requires_grad_(False)
    s = apply_plan(LVLM(m, name='phi'), made(models['phi'], 'combined')).model
    assert s.training and s.generation_config.max_length==77 and {p.dtype for p in s.parameters()}=={torch.bfloat16}
    assert not any(p.requires_grad for p in s.model.vision_tower.parameters()) and all(p.requires_grad for p in s.model.language_model.parameters())

def test_steps_equal_one_plan(models):
    "Blocks, then widths on the student with its own numbers, then blocks again; and the same at once."
    lvlm = models['phi3']; first = apply_plan(lvlm, made(lvlm, 'layers'))
    second = apply_plan(first, width_plan(scores_of(sizes(first), 3), .2)); third = apply_plan(second, Plan.of(second, blocks=[0, 2]))
    plan = Plan.from_json(third.plan)
    assert set(plan.blocks)<=set(made(lvlm, 'layers').blocks) and torch.allclose(logits(apply_plan(lvlm, plan)), logits(third), atol=1e-5)
    assert torch.allclose(silenced(lvlm, plan), logits(third), atol=2e-4, rtol=1e-3)
    assert plan.left['parameters']==sizes(third)['total'] and plan.sizes==sizes(lvlm)

# --- the ratio that was asked -----------------------------------------------------------------------------------

def shape(blocks, width, heads, channels, vocab, kv=None, mats=3, bias=False, rest=300_000_000):
    "Parameter counts of a language model of the usual shape."
    dim,kv = width//heads, kv or heads; q = heads//kv
    head,channel = dim*width*(2*q+2)+bias*dim*(q+2), mats*width+bias*(mats-1); each = kv*head+channels*channel+2*width+bias*2*width
    lm = blocks*each+2*vocab*width+width
    return dict(lm=lm, total=lm+rest, blocks=[each]*blocks, head=head, channel=channel, heads=kv, channels=channels)
FULL = {'llava-7b': shape(32, 4096, 32, 11008, 32064), 'bunny-3b': shape(32, 2560, 32, 10240, 51200, mats=2, bias=True),
    'internvl-4b': shape(32, 3072, 32, 8192, 32064), 'gqa-8b': shape(32, 4096, 32, 14336, 128256, kv=8), 'kv2': shape(28, 1536, 12, 8960, 151936, kv=2)}

def test_the_shapes_are_those_of_the_paper():
    for k,n in {'llava-7b': 6.74e9, 'bunny-3b': 2.78e9, 'internvl-4b': 3.82e9}.items(): assert FULL[k]['lm']==pytest.approx(n, rel=.01)

@pytest.mark.parametrize('family', FULL)
def test_layers_are_within_half_a_block(family):
    s = scores_of(FULL[family]); n,one = 32 if family!='kv2' else 28, FULL[family]['blocks'][0]/FULL[family]['lm']
    for r in range(5, 81):
        p = layer_plan(s, r/100)
        assert p.asked==r/100 and abs(p.realised['lm']-r/100)<=max(one/2+1e-9, r/100-(n-1)*one)

@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('family', FULL)
def test_widths_are_within_a_point_and_nearest(family, how):
    z = FULL[family]; s = scores_of(z); L,step = len(z['blocks']), 64*z['channel']*(len(z['blocks']) if how=='uniform' else 1)/z['lm']
    most = (sum(z['blocks']) - L*(z['head']*(1 if z['heads']>FEW else z['heads'])+64*z['channel']+4*4096))/z['lm']
    for r in range(5, 81, 5 if how=='uniform' else 15):
        p = width_plan(s, r/100, how=how)
        assert p.asked==r/100 and len(p.blocks)==L and all(c%64==0 for _,c in p.widths)
        if r/100<most: assert abs(p.realised['lm']-r/100)<=min(.01, step/2+1e-9), (r, p)
        else: assert abs(p.realised['lm']-r/100)>0
        if z['heads']>FEW and how=='uniform' and r/100<most-.03:
            h,c = p.widths[0]; assert abs(h/z['heads']-c/z['channels'])<=(.5/z['heads']*(1+z['heads']*z['head']/(z['channels']*z['channel'])))+64/z['channels']
        if z['heads']<=FEW: assert {h for h,_ in p.widths}=={z['heads']} and 'too few' in p.notes[0]

def test_uniform_is_the_nearest_of_all_pairs_of_its_head_count():
    z = sizes(zoo.build('mha')); s = scores_of(z)
    for r in range(5, 81, 5):
        p = width_plan(s, r/100); h = p.widths[0][0]
        all_widths = [account(z, range(4), {b: range(h) for b in range(4)}, {b: range(c) for b in range(4)})[0]['lm'] for c in range(1, 97)]
        assert abs(p.realised['lm']-r/100)<=min(abs(g-r/100) for g in all_widths)+1e-12

def test_a_miss_beyond_tolerance_names_the_legal_neighbours():
    s = scores_of(FULL['llava-7b'])
    for call,ratio in ((lambda r, t: layer_plan(s, r, tolerance=t), .28), (lambda r, t: width_plan(s, r, multiple=512, split=0, tolerance=t), .3)):
        call(ratio, .05)
        with pytest.raises(ValueError) as e: call(ratio, .0001)
        below,above = (float(x)/100 for x in re.findall(r'([\d.]+)%', str(e.value))[1:3])
        assert below<ratio<above and above-below<.05 and '\n' not in str(e.value)
        for legal in (below, above): assert abs(call(legal, .002).realised['lm']-legal)<.001
    assert width_plan(s, .3, tolerance=.01).realised['lm']==pytest.approx(.3, abs=.01)

def test_both_paradigms_at_one_size():
    for z in FULL.values():
        s = scores_of(z); short,narrow = same_size(s, .3)
        assert abs(short.left['parameters']-narrow.left['parameters'])<=len(z['blocks'])*64*z['channel']/2 and short.asked==narrow.asked==.3

def test_more_is_never_less():
    "What goes at a small ratio goes at a larger one: widths by one order of scores."
    s = scores_of(FULL['llava-7b'])
    for how in HOW:
        a,b = (width_plan(s, r, how=how, split=0) for r in (.2, .4))
        assert all(set(b.channels[i])<=set(a.channels[i]) for i in a.blocks)

def test_the_lowest_go_and_ties_are_settled():
    g = np.random.default_rng(0)
    for _ in range(100):
        s = g.integers(0, 6, 20); k = int(g.integers(0, 20)); stay = drop_lowest(s, k)
        assert set(range(20))-set(stay)==set(np.argsort(s, kind='stable')[:k])

def test_global_ranking_takes_the_cheapest_steps():
    "Brute force on a small case: no step that stays is cheaper than one that went."
    z = shape(6, 32, 8, 40, 50, rest=0); s = scores_of(z, 5); p = width_plan(s, .35, how='global')
    for k,n in (('heads', 8), ('channels', 40)):
        rel = np.asarray(getattr(s, k)['taylor'], dtype=float); rel = rel/rel.mean(1, keepdims=True); kept = getattr(p, k)
        gone = [rel[b, i] for b in range(6) for i in range(n) if i not in kept[b]]
        could = [rel[b, i] for b in range(6) for i in kept[b] if len(kept[b])>1]
        assert gone and max(gone)<=min(could)+1e-6 and len({len(v) for v in kept.values()})>1

def test_windows_splits_counts_and_criteria():
    z = FULL['llava-7b']; s = scores_of(z)
    w = width_plan(s, .15, window=range(4, 30))
    assert {b for b,x in zip(w.blocks, w.widths) if x!=(32, 11008)}==set(range(4, 30)) and w.realised['lm']==pytest.approx(.15, abs=.01)
    assert {h for h,_ in width_plan(s, .3, split=0).widths}=={32}
    only = width_plan(s, .2, split=1); assert {c for _,c in only.widths}=={11008} and only.realised['lm']==pytest.approx(.2, abs=.01)
    half = width_plan(s, .3, split=.5); gone = 32*(32-half.widths[0][0])*z['head']/z['lm']; assert gone==pytest.approx(.15, abs=.01)
    assert width_plan(s, .3, counts=(8, 16, 32)).widths[0][0]==16
    assert width_plan(s, .3).channels!=width_plan(s, .3, 'l2').channels and '(l2' in width_plan(s, .3, 'l2').method
    assert legal_widths(11008)[1]==10944 and legal_widths(1000)[1]==999 and legal_widths(2000, 128)[:3]==[2000, 1920, 1792]

def test_solve_against_all_pairs():
    g = np.random.default_rng(1)
    for _ in range(300):
        h,c = (np.r_[0, g.integers(1, 30, g.integers(0, 12)).cumsum()].astype(float) for _ in range(2)); t = g.uniform(0, 1.2*(h[-1]+c[-1]+1))
        i,j = solve(t, h, c, g.uniform(0, t)); every = np.abs(h[:,None]+c-t); slack = np.diff(c).max()/2 if len(c)>1 else 0
        assert every[i, j]<=max(every.min(), slack)+1e-9 and every[i, j]<=every[i].min()+1e-9

# --- plans as data ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_json_there_and_back(models, kind):
    p = made(models['gqa'], kind); q = Plan.from_json(json.loads(json.dumps(json.loads(p.to_json()))))
    assert q==p and json.loads(p.to_json())['blocks']==list(p.blocks) and repr(q)==repr(p) and len(repr(p))<300

def test_a_plan_of_the_first_kind_is_still_read(models):
    "Without groups, as plans were written before there were widths."
    lvlm = models['mha']; z = {k: sizes(lvlm)[k] for k in ('lm', 'total', 'blocks')}; p = make_plan(z, [0, 2])
    assert p.heads=={} and Plan.from_json(p.to_json())==p
    assert torch.equal(logits(apply_plan(lvlm, p)), logits(apply_plan(lvlm, Plan.of(lvlm, blocks=[0, 2]))))

def test_composition_is_associative(models):
    lvlm = models['gqa']; a = made(lvlm, 'layers'); one = apply_plan(lvlm, a); b = width_plan(scores_of(sizes(one), 1), .2); two = apply_plan(one, b)
    c = Plan.of(two, blocks=[0, 1], channels={1: range(5)})
    left,right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert (left.blocks, left.heads, left.channels, left.left)==(right.blocks, right.heads, right.channels, right.left)

def test_the_card_says_what_was_asked_and_came_out(models):
    p = made(models['phi3'], 'combined'); text = plan_card(p, scores_of(sizes(models['phi3']), ids=list('abc')))
    assert f'{p.asked:.1%}' in text and f'{p.realised["lm"]:.1%}' in text and '3 calibration samples' in text and f'{p.left["parameters"]:,}' in text

# --- folders that load anywhere ---------------------------------------------------------------------------------

STOCK = '''import sys, json, torch, transformers
out = {}
for name,folder in json.loads(sys.argv[1]).items():
    cls = transformers.AutoModelForCausalLM if name.startswith('tied') else transformers.AutoModelForImageTextToText
    try: m = cls.from_pretrained(folder).eval()
    except Exception as e: out[name] = str(e); continue
    b = torch.load(folder+'/in.pt', weights_only=True); n = b['input_ids'].shape[1]
    with torch.no_grad(): z = m(**b).logits
    out[name] = [z, *(m.generate(**b, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=c)[:, n:] for c in (True, False))]
assert not [n for n in sys.modules if n.startswith('lvlm')]
torch.save(out, sys.argv[2])'''

@pytest.fixture(scope='module')
def loaded(models, tmp_path_factory):
    "Every model, cut in every way, saved, and loaded in one process that has never heard of us."
    d = tmp_path_factory.mktemp('stock'); students,folders = {}, {}
    for name,lvlm in models.items():
        for kind in KINDS:
            k = f'{name} {kind}'; students[k] = apply_plan(lvlm, made(lvlm, kind)); folders[k] = str(d/k.replace(' ', '-'))
            students[k].model.save_pretrained(folders[k]); torch.save(zoo.inputs(lvlm), folders[k]+'/in.pt')
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    run = subprocess.run([sys.executable, '-P', '-c', STOCK, json.dumps(folders), str(d/'out.pt')], cwd=d, env=env, capture_output=True, text=True)
    assert run.returncode==0, run.stderr[-800:]
    return students, folders, torch.load(d/'out.pt')

@pytest.mark.parametrize('kind', ['layers', 'widths', 'combined'])
@pytest.mark.parametrize('name', zoo.BUILD)
def test_stock_transformers_loads_it(loaded, name, kind):
    students,folders,out = loaded; k = f'{name} {kind}'
    assert not isinstance(out[k], str), out[k]
    z,cached,plain = out[k]
    assert torch.equal(z, logits(students[k])) and torch.equal(cached, plain)
    assert torch.equal(cached, says(students[k], zoo.inputs(students[k])))

def test_the_twin_is_used_only_where_it_must_be(loaded):
    config = lambda k: json.loads(Path(loaded[1][k], 'config.json').read_text())
    kind = lambda k: config(k).get('text_config', config(k))['model_type']
    want = {'mha layers': 'llama', 'mha widths': 'mistral', 'phi widths': 'phi', 'phi3 widths': 'phi3', 'long layers': 'phi3', 'long widths': 'mistral', 'tied widths': 'mistral'}
    assert {k: kind(k) for k in want}==want
    assert any('mistral' in n for n in loaded[0]['long widths'].plan['notes']) and loaded[0]['phi widths'].plan['notes']==[]
    assert config('tied widths')['architectures']==['MistralForCausalLM']

@pytest.mark.parametrize('name', zoo.BUILD)
def test_mixed_widths_load_through_us_and_are_refused_clearly_without(loaded, name):
    students,folders,out = loaded; k = f'{name} mixed'
    assert isinstance(out[k], str) and 'per-layer attribute' in out[k]
    config = AutoConfig.from_pretrained(folders[k]); plain = block_class(config).__init__
    auto = AutoModelForCausalLM if name=='tied' else AutoModelForImageTextToText
    with mixed_widths(config), mixed_widths(config): m = LVLM(auto.from_pretrained(folders[k]).eval())      # nested: as when load_lvlm does it too
    assert is_mixed(config) and block_class(config).__init__ is plain and torch.equal(logits(m), logits(students[k]))
    b = zoo.inputs(m); assert torch.equal(says(m, b), says(m, b, cache=False))

def test_mixed_models_learn(models):
    s = apply_plan(models['mha'], made(models['mha'], 'mixed')); b = zoo.inputs(s)
    s.model(**b, labels=b['input_ids']).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in s.model.model.language_model.parameters())

def test_a_long_text_is_read_by_the_long_table(models):
    "Beyond the original length Phi-3 turns its heads by another table; its twin must do the same after saving."
    lvlm = models['long']; s = apply_plan(lvlm, made(lvlm, 'widths')); ids = torch.randint(4, 64, (1, 200))
    with torch.no_grad(): got = s.model(input_ids=ids).logits
    assert torch.allclose(got, silenced(lvlm, made(lvlm, 'widths'), dict(input_ids=ids)), atol=2e-4, rtol=1e-3)

def test_twin_and_refusals():
    assert mistral_twin(PhiConfig(**zoo.LM)) is None and mistral_twin(LlamaConfig(**zoo.LM, mlp_bias=True)) is None
    c = LlamaConfig(**zoo.LM); c.num_attention_heads = c.num_key_value_heads = 7
    assert 'multiple' in refusal(c) and refusal(mistral_twin(c))=='' and mistral_twin(c).head_dim==8

# --- doctor -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    lvlm = load_lvlm('tiny-llava'); d = tmp_path_factory.mktemp('doctor')
    for kind in ('widths', 'mixed'): save_lvlm(apply_plan(lvlm, made(lvlm, kind)), d/kind)
    return d

def spoil(folder, tmp_path, how):
    p = tmp_path/'x'; shutil.copytree(folder/'widths', p); config = json.loads((p/'config.json').read_text()); w = p/'model.safetensors'
    if how=='pickle': torch.save({}, p/'optimizer.pt')
    if how=='code': (p/'modeling_x.py').write_text('')
    if how=='config': config['text_config']['intermediate_size'] += 8
    if how=='heads': config['text_config']['num_attention_heads'] -= 1
    if how=='truncated': w.write_bytes(w.read_bytes()[:-9])
    if how=='nan': t = load_file(w); t['language_model.model.norm.weight'][:] = float('nan'); save_file(t, w, metadata=dict(format='pt'))
    if how=='plan': d = json.loads((p/'plan.json').read_text()); d['left']['parameters'] += 1; (p/'plan.json').write_text(json.dumps(d))
    if how=='name': p = p.rename(tmp_path/'x.partial')
    if how in ('config', 'heads'): (p/'config.json').write_text(json.dumps(config))
    return p

@pytest.mark.parametrize('how', ['pickle', 'code', 'config', 'heads', 'truncated', 'nan', 'plan', 'name'])
def test_doctor_finds(folder, tmp_path, how):
    p = spoil(folder, tmp_path, how); said = []
    assert not doctor(p).attrs['ok'] and examine(p, said.append)==1 and any(s.startswith('FAIL') for s in said)

@pytest.mark.parametrize('kind', ['widths', 'mixed'])
def test_doctor_passes_what_is_sound(folder, kind):
    assert doctor(folder/kind).attrs['ok'] and is_mixed(load_pruned(folder/kind).config)==(kind=='mixed')
    assert set(engines(AutoConfig.from_pretrained(folder/kind)).takes.iloc[:2])=={'yes' if kind=='widths' else 'no'}

# --- bad input --------------------------------------------------------------------------------------------------

def BIASED(): return LVLM(LlamaForCausalLM(LlamaConfig(**zoo.LM, attention_bias=True)))

BAD = dict(
    zero=(lambda s, m: width_plan(s, 0), '0'),
    one=(lambda s, m: width_plan(s, 1), '1'),
    above=(lambda s, m: width_plan(s, 1.2), '1.2'),
    text=(lambda s, m: width_plan(s, '30%'), "'30%'"),
    layers_text=(lambda s, m: layer_plan(s, '30%'), "'30%'"),
    true=(lambda s, m: width_plan(s, True), 'True'),
    nan=(lambda s, m: width_plan(s, float('nan')), 'nan'),
    criterion=(lambda s, m: width_plan(s, .3, 'taylr'), 'taylor, l2'),
    how=(lambda s, m: width_plan(s, .3, how='even'), 'uniform or global'),
    split=(lambda s, m: width_plan(s, .3, split=2), '2'),
    window=(lambda s, m: width_plan(s, .3, window=[9]), '0 to 3'),
    multiple=(lambda s, m: width_plan(s, .3, multiple=0), '0'),
    multiple_large=(lambda s, m: width_plan(s, .3, multiple=97), '97'),
    done=(lambda s, m: width_plan(s, .1, within=layer_plan(s, .3)), 'already'),
    twice=(lambda s, m: width_plan(s, .5, within=width_plan(s, .3)), 'widths already'),
    no_groups=(lambda s, m: width_plan(SimpleNamespace(meta=s.meta, blocks=s.blocks), .3), 'nothing of KV groups'),
    no_order=(lambda s, m: layer_plan(s, .3, 'iterative'), 'order'),
    bad_order=(lambda s, m: layer_plan(s, .3, order=[0, 0, 1]), 'each once'),
    no_group=(lambda s, m: Plan.of(m, heads={0: []}), 'no KV group left in block 0'),
    group=(lambda s, m: Plan.of(m, heads={0: [8]}), 'no KV group 8'),
    channel=(lambda s, m: Plan.of(m, channels={1: [-1]}), 'no channel -1'),
    floats=(lambda s, m: Plan.of(m, channels={1: [.5]}), 'whole numbers'),
    gone=(lambda s, m: Plan.of(m, blocks=[0], heads={1: [0]}), 'block 1'),
    blocks=(lambda s, m: Plan.of(m, blocks=[4]), 'no block 4'),
    none=(lambda s, m: Plan.of(m, blocks=[]), 'no block left'),
    json=(lambda s, m: Plan.from_json('{"a": 1}'), 'no plan'),
    other=(lambda s, m: apply_plan(zoo.build('phi'), Plan.of(m)), 'made for mha'),
    biases=(lambda s, m: apply_plan(BIASED(), Plan.of(BIASED(), heads={i: range(7) for i in range(4)})), 'prune channels alone'))

@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence(models, name):
    call,says_ = BAD[name]
    with pytest.raises(ValueError) as e: call(scores_of(sizes(models['mha'])), models['mha'])
    assert says_ in str(e.value) and '\n' not in str(e.value) and len(str(e.value))<400, str(e.value)

def test_blocks_by_any_criterion_or_order():
    s = scores_of(sizes(zoo.build('mha')), orders=dict(iterative=[2, 0, 3]))
    assert layer_plan(s, .25, 'taylor').removed==(int(s.blocks['taylor'].argmin()),) and layer_plan(s, .25, 'iterative').removed==(2,)
    assert layer_plan(s, .25, order=[3, 1, 0]).removed==(3,)
    s.spans = dict(angular=torch.tensor([[3., 9, 9, 9], [4, 1, 9, 9], [2, 7, 9, 9], [5, 9, 9, 9]]))
    assert layer_plan(s, .25, 'angular').removed==(2,) and layer_plan(s, .5, 'angular').removed==(1, 2)
    assert set(CHOICES)=={'bi', 'last', 'span', 'random'}
