"Plans and surgery on every shape of layer: four invariants, the target ratio, folders and what loads them, bad input."

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
)
from lvlm_study.efficiency.engines import engine_rules
from lvlm_study.importance.importance import Scores
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.models.loading import generate_greedy, heterogeneous_layers, is_heterogeneous, layer_class
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.layer_pruning import LAYER_CHOICES, layer_plan
from lvlm_study.pruning.plan import (
    OLD_PLAN_WORDS,
    Plan,
    compose_plans,
    make_plan,
    number_ranges,
    plan_card,
    removal_accounting,
)
from lvlm_study.pruning.surgery import MIXED_WIDTHS_NOTE, apply_plan, as_mistral_config, config_refusal
from lvlm_study.pruning.width_pruning import (
    FEW_KV_HEADS,
    WIDTH_METHODS,
    drop_lowest,
    legal_widths,
    nearest_pair,
    same_size_plans,
    width_plan,
)
from lvlm_study.study.cli import examine_folder


@pytest.fixture(scope='module')
def models():
    return {k: zoo.build(k) for k in zoo.BUILD}


def scores_of(sizes, seed=0, **fields):
    "Random scores for given counts: surgery must not care where they come from."
    g, n = torch.Generator().manual_seed(seed), len(sizes['layers'])

    def draw(*s):
        return dict(taylor=torch.rand(s, generator=g) + 0.01, l2=torch.rand(s, generator=g))

    samples = dict(
        layers=dict(bi=draw(1, n)['taylor'], taylor=draw(1, n)['l2']),
        kv_heads=draw(1, n, sizes['kv_heads']),
        mlp_channels=draw(1, n, sizes['mlp_channels']),
    )
    return Scores(samples, model='x', sizes=sizes, **fields)


def plan_for(lvlm, kind, ratio=0.3):
    s = scores_of(parameter_sizes(lvlm))
    if kind == 'layers':
        return layer_plan(s, ratio)
    if kind == 'combined':
        return width_plan(s, ratio + 0.15, within=layer_plan(s, ratio - 0.1))
    alone = 0 if (lvlm.name, kind) == ('long', 'mixed') else None  # no config holds mixed heads and a long table
    return width_plan(s, ratio, how='global' if kind == 'mixed' else 'uniform', split=alone)


KINDS = ['layers', 'widths', 'mixed', 'combined']


@torch.no_grad()
def logits(lvlm):
    return lvlm.model(**zoo.inputs(lvlm)).logits


@torch.no_grad()
def zeroed(lvlm, plan, batch=None):
    "The independent version: what is to be removed contributes nothing, because the columns that carry it are zero."
    m, a = copy.deepcopy(lvlm.model), lvlm.architecture
    per = a.query_heads // a.kv_heads * a.head_dim
    for i, layer in enumerate(m.get_submodule(a.layers)):
        o, down = layer.get_submodule(a.attn['o']), layer.get_submodule(a.mlp['down'])
        if i not in plan.layers:
            for x in (o, down):
                x.weight.zero_()
                if x.bias is not None:
                    x.bias.zero_()
            continue
        for g in range(a.kv_heads):
            if g not in plan.kv_heads[i]:
                o.weight[:, g * per : (g + 1) * per] = 0
        down.weight[:, [c for c in range(a.mlp_channels) if c not in plan.mlp_channels[i]]] = 0
    return m(**(batch or zoo.inputs(lvlm))).logits


# --- the four invariants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', zoo.BUILD)
def test_nothing_removed_changes_nothing(models, name):
    copied = apply_plan(models[name], Plan.of(models[name]))
    assert torch.equal(logits(copied), logits(models[name]))
    a, b = ({p.data_ptr() for p in m.model.parameters()} for m in (copied, models[name]))
    assert type(copied.model) is type(models[name].model) and not a & b


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', zoo.BUILD)
def test_removing_equals_zeroing_and_the_accounts_are_right(models, name, kind):
    lvlm, plan = models[name], plan_for(models[name], kind)
    before = {k: v.clone() for k, v in lvlm.model.state_dict().items()}
    config = lvlm.config.to_dict()
    student = apply_plan(lvlm, plan)
    want = zeroed(lvlm, plan)
    assert plan.uniform == (kind != 'mixed') and plan.shares['lm'] > 0.2
    assert torch.allclose(logits(student), want, atol=2e-4, rtol=1e-3)
    assert (want - logits(lvlm)).abs().max() > 0.05  # else the test says nothing
    assert (
        sum(p.numel() for p in student.model.parameters())
        == plan.remaining['parameters']
        == parameter_sizes(student)['total']
    )
    assert (
        all(torch.equal(v, before[k]) for k, v in lvlm.model.state_dict().items()) and lvlm.config.to_dict() == config
    )
    assert (
        [b.self_attn.layer_idx for b in student.layers]
        == list(range(len(plan.layers)))
        == list(range(student.config.get_text_config().num_hidden_layers))
    )
    b = zoo.inputs(student)
    assert torch.equal(generate_greedy(student, b, 12), generate_greedy(student, b, 12, cache=False))
    assert Plan.from_json(student.plan).kv_heads == plan.kv_heads


def test_one_head_of_two_in_a_group_is_never_cut(models):
    "Grouped queries: 16 query heads, 8 groups; what stays is two query heads for each group that stays."
    student = apply_plan(models['gqa'], plan_for(models['gqa'], 'widths'))
    assert student.architecture.query_heads == 2 * student.architecture.kv_heads < 16


def test_tied_embeddings_stay_tied(models, tmp_path):
    student = apply_plan(models['tied'], plan_for(models['tied'], 'combined'))
    assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    student.model.save_pretrained(tmp_path)
    assert torch.equal(logits(LVLM(AutoModelForCausalLM.from_pretrained(tmp_path).eval())), logits(student))


def test_what_else_a_model_carries_comes_along(models):
    m = copy.deepcopy(models['phi'].model).to(torch.bfloat16).train()
    m.generation_config.max_length = 77
    for p in m.model.vision_tower.parameters():
        p.requires_grad_(False)
    s = apply_plan(LVLM(m, name='phi'), plan_for(models['phi'], 'combined')).model
    assert s.training and s.generation_config.max_length == 77 and {p.dtype for p in s.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in s.model.vision_tower.parameters()) and all(
        p.requires_grad for p in s.model.language_model.parameters()
    )


def test_steps_equal_one_plan(models):
    "Layers, then widths on the student with its own numbers, then layers again; and the same at once."
    lvlm = models['phi3']
    first = apply_plan(lvlm, plan_for(lvlm, 'layers'))
    second = apply_plan(first, width_plan(scores_of(parameter_sizes(first), 3), 0.2))
    third = apply_plan(second, Plan.of(second, layers=[0, 2]))
    plan = Plan.from_json(third.plan)
    assert set(plan.layers) <= set(plan_for(lvlm, 'layers').layers) and torch.allclose(
        logits(apply_plan(lvlm, plan)), logits(third), atol=1e-5
    )
    assert torch.allclose(zeroed(lvlm, plan), logits(third), atol=2e-4, rtol=1e-3)
    assert plan.remaining['parameters'] == parameter_sizes(third)['total'] and plan.sizes == parameter_sizes(lvlm)


# --- the target ratio -------------------------------------------------------------------------------------------


def shape(layers, width, kv_heads, mlp_channels, vocab, kv=None, mats=3, bias=False, rest=300_000_000):
    "Parameter counts of a language model of the usual shape."
    dim, kv = width // kv_heads, kv or kv_heads
    q = kv_heads // kv
    head, channel = dim * width * (2 * q + 2) + bias * dim * (q + 2), mats * width + bias * (mats - 1)
    each = kv * head + mlp_channels * channel + 2 * width + bias * 2 * width
    lm = layers * each + 2 * vocab * width + width
    return dict(
        lm=lm,
        total=lm + rest,
        layers=[each] * layers,
        head=head,
        channel=channel,
        kv_heads=kv,
        mlp_channels=mlp_channels,
    )


FULL = {
    'llava-7b': shape(32, 4096, 32, 11008, 32064),
    'bunny-3b': shape(32, 2560, 32, 10240, 51200, mats=2, bias=True),
    'internvl-4b': shape(32, 3072, 32, 8192, 32064),
    'gqa-8b': shape(32, 4096, 32, 14336, 128256, kv=8),
    'kv2': shape(28, 1536, 12, 8960, 151936, kv=2),
}


def test_the_shapes_are_those_of_the_paper():
    for k, n in {'llava-7b': 6.74e9, 'bunny-3b': 2.78e9, 'internvl-4b': 3.82e9}.items():
        assert FULL[k]['lm'] == pytest.approx(n, rel=0.01)


@pytest.mark.parametrize('family', FULL)
def test_layers_are_within_half_a_layer(family):
    s = scores_of(FULL[family])
    n, one = 32 if family != 'kv2' else 28, FULL[family]['layers'][0] / FULL[family]['lm']
    for r in range(5, 81):
        p = layer_plan(s, r / 100)
        assert p.target_ratio == r / 100 and abs(p.shares['lm'] - r / 100) <= max(
            one / 2 + 1e-9, r / 100 - (n - 1) * one
        )


@pytest.mark.parametrize('how', WIDTH_METHODS)
@pytest.mark.parametrize('family', FULL)
def test_widths_are_within_a_point_and_nearest(family, how):
    z = FULL[family]
    s = scores_of(z)
    L, step = len(z['layers']), 64 * z['channel'] * (len(z['layers']) if how == 'uniform' else 1) / z['lm']
    most = (
        sum(z['layers'])
        - L * (z['head'] * (1 if z['kv_heads'] > FEW_KV_HEADS else z['kv_heads']) + 64 * z['channel'] + 4 * 4096)
    ) / z['lm']
    for r in range(5, 81, 5 if how == 'uniform' else 15):
        p = width_plan(s, r / 100, how=how)
        assert p.target_ratio == r / 100 and len(p.layers) == L and all(c % 64 == 0 for _, c in p.widths)
        if r / 100 < most:
            assert abs(p.shares['lm'] - r / 100) <= min(0.01, step / 2 + 1e-9), (r, p)
        else:
            assert abs(p.shares['lm'] - r / 100) > 0
        if z['kv_heads'] > FEW_KV_HEADS and how == 'uniform' and r / 100 < most - 0.03:
            h, c = p.widths[0]
            assert (
                abs(h / z['kv_heads'] - c / z['mlp_channels'])
                <= (0.5 / z['kv_heads'] * (1 + z['kv_heads'] * z['head'] / (z['mlp_channels'] * z['channel'])))
                + 64 / z['mlp_channels']
            )
        if z['kv_heads'] <= FEW_KV_HEADS:
            assert {h for h, _ in p.widths} == {z['kv_heads']} and 'too few' in p.notes[0]


def test_uniform_is_the_nearest_of_all_pairs_of_its_head_count():
    z = parameter_sizes(zoo.build('mha'))
    s = scores_of(z)
    for r in range(5, 81, 5):
        p = width_plan(s, r / 100)
        h = p.widths[0][0]
        all_widths = [
            removal_accounting(z, range(4), {b: range(h) for b in range(4)}, {b: range(c) for b in range(4)})[0]['lm']
            for c in range(1, 97)
        ]
        assert abs(p.shares['lm'] - r / 100) <= min(abs(g - r / 100) for g in all_widths) + 1e-12


def test_a_miss_beyond_tolerance_names_the_legal_neighbors():
    s = scores_of(FULL['llava-7b'])
    for call, ratio in (
        (lambda r, t: layer_plan(s, r, tolerance=t), 0.28),
        (lambda r, t: width_plan(s, r, multiple=512, split=0, tolerance=t), 0.3),
    ):
        call(ratio, 0.05)
        with pytest.raises(ValueError) as e:
            call(ratio, 0.0001)
        below, above = (float(x) / 100 for x in re.findall(r'([\d.]+)%', str(e.value))[1:3])
        assert below < ratio < above and above - below < 0.05 and '\n' not in str(e.value)
        for legal in (below, above):
            assert abs(call(legal, 0.002).shares['lm'] - legal) < 0.001
    assert width_plan(s, 0.3, tolerance=0.01).shares['lm'] == pytest.approx(0.3, abs=0.01)


def test_both_paradigms_at_one_size():
    for z in FULL.values():
        s = scores_of(z)
        layers, widths = same_size_plans(s, 0.3)
        assert (
            abs(layers.remaining['parameters'] - widths.remaining['parameters'])
            <= len(z['layers']) * 64 * z['channel'] / 2
            and layers.target_ratio == widths.target_ratio == 0.3
        )


def test_more_is_never_less():
    "What goes at a small ratio goes at a larger one: widths by one order of scores."
    s = scores_of(FULL['llava-7b'])
    for how in WIDTH_METHODS:
        a, b = (width_plan(s, r, how=how, split=0) for r in (0.2, 0.4))
        assert all(set(b.mlp_channels[i]) <= set(a.mlp_channels[i]) for i in a.layers)


def test_the_lowest_go_and_ties_are_settled():
    g = np.random.default_rng(0)
    for _ in range(100):
        s = g.integers(0, 6, 20)
        k = int(g.integers(0, 20))
        stay = drop_lowest(s, k)
        assert set(range(20)) - set(stay) == set(np.argsort(s, kind='stable')[:k])


def test_global_ranking_takes_the_cheapest_steps():
    "Brute force on a small case: no step that stays is cheaper than one that went."
    z = shape(6, 32, 8, 40, 50, rest=0)
    s = scores_of(z, 5)
    p = width_plan(s, 0.35, how='global')
    for k, n in (('kv_heads', 8), ('mlp_channels', 40)):
        rel = np.asarray(getattr(s, k)['taylor'], dtype=float)
        rel = rel / rel.mean(1, keepdims=True)
        kept = getattr(p, k)
        gone = [rel[b, i] for b in range(6) for i in range(n) if i not in kept[b]]
        could = [rel[b, i] for b in range(6) for i in kept[b] if len(kept[b]) > 1]
        assert gone and max(gone) <= min(could) + 1e-6 and len({len(v) for v in kept.values()}) > 1


def test_windows_splits_counts_and_criteria():
    z = FULL['llava-7b']
    s = scores_of(z)
    w = width_plan(s, 0.15, window=range(4, 30))
    assert {b for b, x in zip(w.layers, w.widths) if x != (32, 11008)} == set(range(4, 30))
    assert w.actual_ratio == pytest.approx(0.15, abs=0.01)
    assert {h for h, _ in width_plan(s, 0.3, split=0).widths} == {32}
    only = width_plan(s, 0.2, split=1)
    assert {c for _, c in only.widths} == {11008} and only.actual_ratio == pytest.approx(0.2, abs=0.01)
    half = width_plan(s, 0.3, split=0.5)
    gone = 32 * (32 - half.widths[0][0]) * z['head'] / z['lm']
    assert gone == pytest.approx(0.15, abs=0.01)
    assert width_plan(s, 0.3, counts=(8, 16, 32)).widths[0][0] == 16
    assert (
        width_plan(s, 0.3).mlp_channels != width_plan(s, 0.3, 'l2').mlp_channels
        and '(l2' in width_plan(s, 0.3, 'l2').method
    )
    assert (
        legal_widths(11008)[1] == 10944
        and legal_widths(1000)[1] == 992
        and legal_widths(500)[1] == 499
        and legal_widths(2000, 128)[:3] == [2000, 1920, 1792]
    )


def test_solve_against_all_pairs():
    g = np.random.default_rng(1)
    for _ in range(300):
        h, c = (np.r_[0, g.integers(1, 30, g.integers(0, 12)).cumsum()].astype(float) for _ in range(2))
        t = g.uniform(0, 1.2 * (h[-1] + c[-1] + 1))
        i, j = nearest_pair(t, h, c, g.uniform(0, t))
        every = np.abs(h[:, None] + c - t)
        slack = np.diff(c).max() / 2 if len(c) > 1 else 0
        assert every[i, j] <= max(every.min(), slack) + 1e-9 and every[i, j] <= every[i].min() + 1e-9


# --- plans as data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_json_there_and_back(models, kind):
    p = plan_for(models['gqa'], kind)
    q = Plan.from_json(json.loads(json.dumps(json.loads(p.to_json()))))
    assert q == p and json.loads(p.to_json())['layers'] == list(p.layers) and repr(q) == repr(p)
    assert len(repr(p)) < 500 and len(repr(p).splitlines()) <= 8 and f'{p.target_ratio:.1%}' in p._repr_markdown_()


def test_a_plan_in_old_words_is_refused_with_the_new_ones():
    old = dict(blocks=[0, 2], depth=3, asked=0.3, realised={}, left={}, heads={}, channels={})
    for data in (old, json.dumps(old), dict(layers=[0], num_layers=1, heads={})):
        with pytest.raises(ValueError) as e:
            Plan.from_json(data)
        words = [w for w in OLD_PLAN_WORDS if w in (json.loads(data) if isinstance(data, str) else data)]
        assert words and all(w in str(e.value) and OLD_PLAN_WORDS[w] in str(e.value) for w in words)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'data',
    ['', '[1]', '{}', '3', dict(layers=[0]), dict(layers=0, num_layers=2), dict(layers=[0], num_layers=2, what=1)],
)
def test_what_is_no_plan_is_refused_in_one_sentence(data):
    with pytest.raises(ValueError, match='this is no plan') as e:
        Plan.from_json(data)
    assert '\n' not in str(e.value)


def test_numbers_as_ranges():
    assert number_ranges([0, 1, 2, 4, 5, 7, 9, 10, 11, 12]) == '0-2, 4, 5, 7, 9-12' and number_ranges([]) == ''


def test_megabytes_are_of_the_parameters_that_remain(models):
    p = plan_for(models['mha'], 'layers')
    for bits in (16, 8, 4):
        assert p.remaining[f'megabytes_{bits}bit'] == round(p.remaining['parameters'] * bits / 8e6, 3)


def test_notes_on_loading_hold_for_the_result_of_two_steps(models):
    "A second step that makes all widths equal takes the note on different widths away; that on the config type stays."
    lvlm = models['mha']
    mixed = apply_plan(lvlm, Plan.of(lvlm, kv_heads={0: range(7)}, mlp_channels={1: range(50)}))
    assert mixed.plan['notes'][-1] == MIXED_WIDTHS_NOTE and 'mistral' in mixed.plan['notes'][0]
    equal = Plan.of(mixed, kv_heads={i: range(7) for i in range(1, 4)}, mlp_channels={i: range(50) for i in (0, 2, 3)})
    notes = apply_plan(mixed, equal).plan['notes']
    assert len(notes) == 1 and 'mistral' in notes[0]


def test_a_plan_without_groups_is_filled_in(models):
    "Made from counts of whole layers only."
    lvlm = models['mha']
    z = {k: parameter_sizes(lvlm)[k] for k in ('lm', 'total', 'layers')}
    p = make_plan(z, [0, 2])
    assert p.kv_heads == {} and Plan.from_json(p.to_json()) == p
    assert torch.equal(logits(apply_plan(lvlm, p)), logits(apply_plan(lvlm, Plan.of(lvlm, layers=[0, 2]))))


def test_composition_is_associative(models):
    lvlm = models['gqa']
    a = plan_for(lvlm, 'layers')
    one = apply_plan(lvlm, a)
    b = width_plan(scores_of(parameter_sizes(one), 1), 0.2)
    two = apply_plan(one, b)
    c = Plan.of(two, layers=[0, 1], mlp_channels={1: range(5)})
    left, right = compose_plans(compose_plans(a, b), c), compose_plans(a, compose_plans(b, c))
    assert (left.layers, left.kv_heads, left.mlp_channels, left.remaining) == (
        right.layers,
        right.kv_heads,
        right.mlp_channels,
        right.remaining,
    )


def test_the_card_says_what_was_asked_and_came_out(models):
    p = plan_for(models['phi3'], 'combined')
    text = plan_card(p, scores_of(parameter_sizes(models['phi3']), sample_ids=list('abc')))
    assert (
        f'{p.target_ratio:.1%}' in text
        and f'{p.shares["lm"]:.1%}' in text
        and '3 calibration samples' in text
        and f'{p.remaining["parameters"]:,}' in text
    )


# --- folders, and what loads them -------------------------------------------------------------------------------

STOCK = """import sys, json, torch, transformers
out = {}
for name,folder in json.loads(sys.argv[1]).items():
    cls = transformers.AutoModelForCausalLM if name.startswith('tied') else transformers.AutoModelForImageTextToText
    try: m = cls.from_pretrained(folder).eval()
    except Exception as e: out[name] = str(e); continue
    b = torch.load(folder+'/in.pt', weights_only=True); n = b['input_ids'].shape[1]
    with torch.no_grad(): z = m(**b).logits
    s = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    out[name] = [z, *(m.generate(**b, **s, use_cache=c)[:, n:] for c in (True, False))]
assert not [n for n in sys.modules if n.startswith('lvlm')]
torch.save(out, sys.argv[2])"""


@pytest.fixture(scope='module')
def loaded(models, tmp_path_factory):
    "Every model, cut in every way, saved, and loaded in one process that never imports this package."
    d = tmp_path_factory.mktemp('stock')
    students, folders = {}, {}
    for name, lvlm in models.items():
        for kind in KINDS:
            k = f'{name} {kind}'
            students[k] = apply_plan(lvlm, plan_for(lvlm, kind))
            folders[k] = str(d / k.replace(' ', '-'))
            students[k].model.save_pretrained(folders[k])
            torch.save(zoo.inputs(lvlm), folders[k] + '/in.pt')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    run = subprocess.run(
        [sys.executable, '-P', '-c', STOCK, json.dumps(folders), str(d / 'out.pt')],
        cwd=d,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-800:]
    return students, folders, torch.load(d / 'out.pt')


@pytest.mark.parametrize('kind', ['layers', 'widths', 'combined'])
@pytest.mark.parametrize('name', zoo.BUILD)
def test_stock_transformers_loads_it(loaded, name, kind):
    students, folders, out = loaded
    k = f'{name} {kind}'
    assert not isinstance(out[k], str), out[k]
    z, cached, plain = out[k]
    assert torch.equal(z, logits(students[k])) and torch.equal(cached, plain)
    assert torch.equal(cached, generate_greedy(students[k], zoo.inputs(students[k])))


def test_a_mistral_config_is_used_only_where_it_must_be(loaded):
    def config(k):
        return json.loads(Path(loaded[1][k], 'config.json').read_text())

    def kind(k):
        return config(k).get('text_config', config(k))['model_type']

    want = {
        'mha layers': 'llama',
        'mha widths': 'mistral',
        'phi widths': 'phi',
        'phi3 widths': 'phi3',
        'long layers': 'phi3',
        'long widths': 'mistral',
        'tied widths': 'mistral',
    }
    assert {k: kind(k) for k in want} == want
    assert (
        any('mistral' in n for n in loaded[0]['long widths'].plan['notes'])
        and loaded[0]['phi widths'].plan['notes'] == []
    )
    assert config('tied widths')['architectures'] == ['MistralForCausalLM']


@pytest.mark.parametrize('name', zoo.BUILD)
def test_mixed_widths_load_with_load_lvlm_and_are_refused_clearly_without(loaded, name):
    students, folders, out = loaded
    k = f'{name} mixed'
    assert isinstance(out[k], str) and 'per-layer attribute' in out[k]
    config = AutoConfig.from_pretrained(folders[k])
    plain = layer_class(config).__init__
    auto = AutoModelForCausalLM if name == 'tied' else AutoModelForImageTextToText
    with heterogeneous_layers(config), heterogeneous_layers(config):
        m = LVLM(auto.from_pretrained(folders[k]).eval())  # nested: as when load_lvlm does it too
    assert (
        is_heterogeneous(config)
        and layer_class(config).__init__ is plain
        and torch.equal(logits(m), logits(students[k]))
    )
    b = zoo.inputs(m)
    assert torch.equal(generate_greedy(m, b), generate_greedy(m, b, cache=False))


def test_mixed_models_learn(models):
    s = apply_plan(models['mha'], plan_for(models['mha'], 'mixed'))
    b = zoo.inputs(s)
    s.model(**b, labels=b['input_ids']).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in s.model.model.language_model.parameters())


def test_a_long_text_is_read_by_the_long_table(models):
    "Beyond the original length Phi-3 turns its heads by another table; its mistral form must do the same after saving."
    lvlm = models['long']
    s = apply_plan(lvlm, plan_for(lvlm, 'widths'))
    ids = torch.randint(4, 64, (1, 200))
    with torch.no_grad():
        got = s.model(input_ids=ids).logits
    assert torch.allclose(got, zeroed(lvlm, plan_for(lvlm, 'widths'), dict(input_ids=ids)), atol=2e-4, rtol=1e-3)


def test_mistral_configs_and_refusals():
    assert (
        as_mistral_config(PhiConfig(**zoo.LM)) is None
        and as_mistral_config(LlamaConfig(**zoo.LM, mlp_bias=True)) is None
    )
    c = LlamaConfig(**zoo.LM)
    c.num_attention_heads = c.num_key_value_heads = 7
    assert (
        'multiple' in config_refusal(c)
        and config_refusal(as_mistral_config(c)) == ''
        and as_mistral_config(c).head_dim == 8
    )


# --- doctor -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    lvlm = load_lvlm('tiny-llava')
    d = tmp_path_factory.mktemp('doctor')
    for kind in ('widths', 'mixed'):
        save_lvlm(apply_plan(lvlm, plan_for(lvlm, kind)), d / kind)
    return d


def spoil(folder, tmp_path, how):
    p = tmp_path / 'x'
    shutil.copytree(folder / 'widths', p)
    config = json.loads((p / 'config.json').read_text())
    w = p / 'model.safetensors'
    if how == 'pickle':
        torch.save({}, p / 'optimizer.pt')
    if how == 'code':
        (p / 'modeling_x.py').write_text('')
    if how == 'config':
        config['text_config']['intermediate_size'] += 8
    if how == 'kv_heads':
        config['text_config']['num_attention_heads'] -= 1
    if how == 'truncated':
        w.write_bytes(w.read_bytes()[:-9])
    if how == 'nan':
        t = load_file(w)
        t['language_model.model.norm.weight'][:] = float('nan')
        save_file(t, w, metadata=dict(format='pt'))
    if how == 'plan':
        d = json.loads((p / 'plan.json').read_text())
        d['remaining']['parameters'] += 1
        (p / 'plan.json').write_text(json.dumps(d))
    if how == 'name':
        p = p.rename(tmp_path / 'x.partial')
    if how in ('config', 'kv_heads'):
        (p / 'config.json').write_text(json.dumps(config))
    return p


@pytest.mark.parametrize('how', ['pickle', 'code', 'config', 'kv_heads', 'truncated', 'nan', 'plan', 'name'])
def test_doctor_finds(folder, tmp_path, how):
    p = spoil(folder, tmp_path, how)
    lines = []
    assert not doctor(p).ok.all() and examine_folder(p, lines.append) == 1
    assert any(line.startswith('FAIL') for line in lines)


@pytest.mark.parametrize('kind', ['widths', 'mixed'])
def test_doctor_passes_what_is_sound(folder, kind):
    assert doctor(folder / kind).ok.all()
    assert is_heterogeneous(load_lvlm(folder / kind).config) == (kind == 'mixed')
    assert (MIXED_WIDTHS_NOTE in (folder / kind / 'README.md').read_text()) == (kind == 'mixed')
    assert 'saved with a mistral config' in (folder / kind / 'README.md').read_text()
    takes = engine_rules(AutoConfig.from_pretrained(folder / kind)).takes.tolist()
    assert takes[:2] == ['yes' if kind == 'widths' else 'no', 'yes']


# --- bad input --------------------------------------------------------------------------------------------------


def BIASED():
    return LVLM(LlamaForCausalLM(LlamaConfig(**zoo.LM, attention_bias=True)))


BAD = dict(
    zero=(lambda s, m: width_plan(s, 0), '0'),
    one=(lambda s, m: width_plan(s, 1), '1'),
    above=(lambda s, m: width_plan(s, 1.2), '1.2'),
    text=(lambda s, m: width_plan(s, '30%'), "'30%'"),
    layers_text=(lambda s, m: layer_plan(s, '30%'), "'30%'"),
    true=(lambda s, m: width_plan(s, True), 'True'),
    nan=(lambda s, m: width_plan(s, float('nan')), 'nan'),
    criterion=(lambda s, m: width_plan(s, 0.3, 'taylr'), 'taylor, l2'),
    how=(lambda s, m: width_plan(s, 0.3, how='even'), 'uniform or global'),
    split=(lambda s, m: width_plan(s, 0.3, split=2), '2'),
    window=(lambda s, m: width_plan(s, 0.3, window=[9]), '0 to 3'),
    multiple=(lambda s, m: width_plan(s, 0.3, multiple=0), '0'),
    multiple_large=(lambda s, m: width_plan(s, 0.3, multiple=97), '97'),
    done=(lambda s, m: width_plan(s, 0.1, within=layer_plan(s, 0.3)), 'already'),
    twice=(lambda s, m: width_plan(s, 0.5, within=width_plan(s, 0.3)), 'widths already'),
    no_groups=(
        lambda s, m: width_plan(Scores(dict(layers=s.samples['layers']), sizes=s.sizes), 0.3),
        'nothing of KV heads',
    ),
    no_order=(lambda s, m: layer_plan(s, 0.3, 'iterative'), 'order'),
    bad_order=(lambda s, m: layer_plan(s, 0.3, order=[0, 0, 1]), 'each once'),
    no_group=(lambda s, m: Plan.of(m, kv_heads={0: []}), 'no KV head left in layer 0'),
    group=(lambda s, m: Plan.of(m, kv_heads={0: [8]}), 'no KV head 8'),
    channel=(lambda s, m: Plan.of(m, mlp_channels={1: [-1]}), 'no MLP channel -1'),
    floats=(lambda s, m: Plan.of(m, mlp_channels={1: [0.5]}), 'whole numbers'),
    gone=(lambda s, m: Plan.of(m, layers=[0], kv_heads={1: [0]}), 'layer 1'),
    layers=(lambda s, m: Plan.of(m, layers=[4]), 'no layer 4'),
    none=(lambda s, m: Plan.of(m, layers=[]), 'no layer left'),
    json=(lambda s, m: Plan.from_json('{"a": 1}'), 'no plan'),
    other=(lambda s, m: apply_plan(zoo.build('phi'), Plan.of(m)), 'made for mha'),
    biases=(
        lambda s, m: apply_plan(BIASED(), Plan.of(BIASED(), kv_heads={i: range(7) for i in range(4)})),
        'prune MLP channels alone',
    ),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence(models, name):
    call, text = BAD[name]
    with pytest.raises(ValueError) as e:
        call(scores_of(parameter_sizes(models['mha'])), models['mha'])
    assert text in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400, str(e.value)


def test_layers_by_any_criterion_or_order():
    s = scores_of(parameter_sizes(zoo.build('mha')), orders=dict(iterative=[2, 0, 3]))
    assert layer_plan(s, 0.25, 'taylor').removed == (int(s.layers['taylor'].argmin()),) and layer_plan(
        s, 0.25, 'iterative'
    ).removed == (2,)
    assert layer_plan(s, 0.25, order=[3, 1, 0]).removed == (3,)
    s.spans = dict(angular=torch.tensor([[3.0, 9, 9, 9], [4, 1, 9, 9], [2, 7, 9, 9], [5, 9, 9, 9]]))
    assert layer_plan(s, 0.25, 'angular').removed == (2,) and layer_plan(s, 0.5, 'angular').removed == (1, 2)
    assert set(LAYER_CHOICES) == {'bi', 'last', 'span', 'random'}


@pytest.mark.parametrize('first, then', [('sdpa', 'eager'), ('eager', 'sdpa')])
def test_a_kernel_that_is_set_later_reaches_layers_of_every_width(first, then):
    "Equal logits, and no token sees a later one, whatever the kernel was when the model was cut."
    lvlm = load_lvlm('tiny-llava')
    lvlm.model.set_attn_implementation(first)
    student = apply_plan(lvlm, Plan.of(lvlm, range(9), {3: [0, 5, 6]}, {3: range(100), 7: range(257)}))
    ids = torch.randint(5, 700, (1, 24), generator=torch.Generator().manual_seed(0))
    other = torch.cat([ids[:, :12], ids[:, :12].flip(1)], 1)
    with torch.no_grad():
        before = student.model(input_ids=ids).logits
        student.model.set_attn_implementation(then)
        after, changed = (student.model(input_ids=x).logits for x in (ids, other))
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after[:, :12], changed[:, :12], atol=1e-3)
