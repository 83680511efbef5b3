"Recovery does what it says: exactly these parameters, exactly these losses, exactly the same after a kill."

import copy, gc, json, math, os, random, shutil, subprocess, sys, traceback
from dataclasses import replace
import numpy as np
import pytest
import torch
import transformers
import zoo
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from lvlm_study.core.store import Run
from lvlm_study.recovery import recipes
from lvlm_study.recovery import recovery as R
from lvlm_study.data.instruction_data import Collator
from lvlm_study.models.loading import load_lvlm
from lvlm_study.recovery import losses as L
from lvlm_study.recovery.losses import DistillationModel
from lvlm_study.recovery.teacher_cache import CachedTeacherDataset, TeacherCache, cache_teacher
from lvlm_study.recovery.losses import RECIPES, TRAINABLE, TrainingSamples, recovery_settings
from lvlm_study.recovery.recovery import prepare_student, recover, trained_names
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan

N = 24
QUICK = dict(max_steps=3, batch_size=4, lora_rank=4, progress=False)
transformers.logging.set_verbosity_error()


@pytest.fixture(scope='module', autouse=True)
def quick_gc():
    "Each training begins with a garbage collection; what the imports left behind need not be searched each time."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope='module')
def teacher():
    "Six layers of the study model, with a norm that is not all ones: else errors around it would not be seen."
    lvlm = load_lvlm('tiny-llava')
    lvlm = apply_plan(lvlm, Plan.of(lvlm, layers=[0, 1, 2, 9, 10, 11]))
    return replace(lvlm, plan=None)


@pytest.fixture(scope='module')
def student(teacher):
    lvlm = apply_plan(teacher, Plan.of(teacher, layers=[0, 2, 5]))
    torch.manual_seed(1)
    for p in lvlm.part('projector').parameters():
        p.data += 0.02 * torch.randn_like(p)  # not the teacher's projector
    return lvlm


@pytest.fixture(scope='module')
def rows():
    return instructions('recovery', N)


@pytest.fixture(scope='module')
def samples(teacher, rows):
    return TrainingSamples(teacher, rows)


@pytest.fixture(scope='module')
def batch(samples):
    samples.encode(range(4))
    return samples.collate([samples[i] for i in range(4)])


def weights(lvlm):
    return {n: p.detach().clone() for n, p in lvlm.model.named_parameters()}


def differ(a, b):
    return {n for n in a if not torch.equal(a[n], b[n])}


def gap(a, b):
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


def same_but_for_rounding(a, b):
    "Equal weights, but for one in a hundred thousand: Adam makes a whole step of a gradient that is all rounding."
    far = sum(int(((a[n].float() - b[n].float()).abs() > 1e-5).sum()) for n in a)
    return far <= sum(t.numel() for t in a.values()) / 100_000 and gap(a, b) < 1e-3


def run(student, samples, recipe='sft', **kw):
    return recover(student, samples, recipe, **QUICK | kw)


@pytest.fixture(scope='module')
def trained(student, teacher, samples):
    "Results of trainings by what was asked for: tests that only compare with the same training share it."
    results = {}

    def ask(recipe='sft', **kw):
        key = recipe, str(sorted(kw.items()))
        if key not in results:
            results[key] = run(student, samples, recipe, teacher=teacher, **kw)
        return results[key]

    return ask


# --- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('trainable', TRAINABLE)
def test_exactly_these_parameters_change(trainable, student, teacher, samples):
    before, of_teacher = weights(student), weights(teacher)
    result = run(
        student, samples, 'sft+hidden', teacher=teacher, trainable=trainable, weight_decay=0.1, lora_dropout=0.1
    )
    assert differ(weights(result.lvlm), before) == trained_names(student, trainable)
    assert not differ(weights(student), before) and not differ(weights(teacher), of_teacher)


def test_names_of_what_is_trained(student):
    names, everything = {t: trained_names(student, t) for t in TRAINABLE}, set(weights(student))
    vision = {n for n in everything if n.startswith(student.architecture.vision)}
    assert names['projector+lm'] == everything - vision
    assert names['projector+lora'] == names['projector'] | names['lora'] and not names['projector'] & names['lora']
    assert len(names['lora']) == 7 * student.architecture.num_layers and len(names['projector']) == 4


@pytest.mark.parametrize('trainable', TRAINABLE)
def test_only_what_is_trained_has_a_gradient_and_trains(trainable, student, teacher):
    lvlm, _ = prepare_student(student, recovery_settings('sft', trainable=trainable))
    step = DistillationModel(lvlm, recovery_settings('sft+hidden', trainable=trainable), teacher).train()
    assert not any(p.requires_grad for p in lvlm.part('vision').parameters())
    assert not lvlm.part('vision').training and not teacher.model.training
    assert lvlm.part('lm').training == ('lora' in trainable or 'lm' in trainable)
    assert not any('teacher' in n for n in step.state_dict()) and not set(map(id, teacher.model.parameters())) & set(
        map(id, step.parameters())
    )


def test_nothing_outside_is_touched(student, teacher, samples):
    student.model.train()
    teacher.model.train()
    states = (
        random.getstate(),
        np.random.get_state()[1].copy(),
        torch.get_rng_state(),
        transformers.logging.get_verbosity(),
        dict(os.environ),
    )
    flags = [p.requires_grad for p in student.model.parameters()]
    result = run(student, samples, 'hidden', teacher=teacher)
    assert student.model.training and teacher.model.training and not result.lvlm.model.training
    assert [p.requires_grad for p in result.lvlm.model.parameters()] == flags
    assert (
        random.getstate() == states[0]
        and (np.random.get_state()[1] == states[1]).all()
        and torch.equal(torch.get_rng_state(), states[2])
    )
    assert transformers.logging.get_verbosity() == states[3] and {
        k for k in os.environ if os.environ[k] != states[4].get(k)
    } <= {'ACCELERATE_MIXED_PRECISION'}
    student.model.eval()
    teacher.model.eval()


def test_merged_equals_unmerged(student, batch):
    lvlm, peft = prepare_student(student, recovery_settings('sft', lora_rank=4))
    torch.manual_seed(0)
    for n, p in lvlm.model.named_parameters():
        if 'lora_B' in n:
            p.data.normal_(std=0.05)
        if 'modules_to_save' in n:
            p.data.mul_(1.1)

    def see(l):
        return L.last_states(l, batch['input_ids'], batch['attention_mask'], batch['features']).detach()

    apart = see(lvlm)
    merged = R.merge_adapters(lvlm, peft, student)
    assert torch.allclose(see(merged), apart, atol=1e-4) and not torch.allclose(see(student), apart, atol=1e-2)
    assert weights(merged).keys() == weights(student).keys()
    assert {type(m) for m in merged.model.modules()} == {type(m) for m in student.model.modules()}


# --- the losses -------------------------------------------------------------------------------------------------


def plain(student, teacher, collated, s):
    "Each loss from full logits and hidden states, in a few lines."
    raw = [[], []]  # what enters the last norm: transformers shows it after the norm only
    hooks = [
        l.part('norm').register_forward_pre_hook(lambda m, args, r=r: r.append(args[0]))
        for l, r in zip((student, teacher), raw)
    ]
    with torch.no_grad():
        a, b = (l.model(**collated, output_hidden_states=True) for l in (student, teacher))
    for h in hooks:
        h.remove()
    there, answer = collated['attention_mask'].bool(), F.pad(collated['labels'][:, 1:] != -100, (0, 1))
    on = {'answer': answer, 'all': there}
    ce = F.cross_entropy(a.logits[:, :-1].flatten(0, 1), collated['labels'][:, 1:].flatten())
    ls, lt = ((l.logits[on[s.kd_tokens]] / s.temperature).log_softmax(-1) for l in (a, b))

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1).mean() * s.temperature**2

    m = ((ls.exp() + lt.exp()) / 2).log()

    def after(o, r):
        return [*o.hidden_states[1:-1], r[0]]  # of each layer

    layers = (
        [
            (after(a, raw[0])[i], after(b, raw[1])[n])
            for i, n in enumerate(student.plan['layers'])
            if s.states == 'all' or n in s.states
        ]
        if s.states != 'last'
        else []
    )
    pairs = [
        (x[on[s.hidden_tokens]], y[on[s.hidden_tokens]])
        for x, y in [(a.hidden_states[-1], b.hidden_states[-1])] * (s.states in ('last', 'all')) + layers
    ]

    def cosine(x, y):
        return (1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean()

    def relative(x, y):
        return (((x - y) ** 2).sum(-1) / (y**2).sum(-1)).mean()

    hidden = sum(dict(squared=F.mse_loss, cosine=cosine, relative=relative)[s.hidden](x, y) for x, y in pairs) / len(
        pairs
    )
    return {'sft': ce, 'kl': kl(lt, ls), 'rkl': kl(ls, lt), 'jsd': (kl(lt, m) + kl(ls, m)) / 2, 'hidden': hidden}


CASES = [(r, {}) for r in RECIPES] + [
    ('kl', dict(kd_tokens='all')),
    ('sft+rkl', dict(kd_tokens='all', temperature=1.0)),
    ('hidden', dict(hidden_tokens='answer')),
    ('sft+hidden', dict(hidden='cosine')),
    ('sft+hidden', dict(hidden='cosine', hidden_tokens='answer')),
    ('hidden', dict(states=(0, 5))),
    ('sft+layers', dict(hidden_tokens='answer')),
]


@pytest.mark.parametrize('recipe, change', CASES, ids=str)
def test_each_loss_is_the_plain_one(recipe, change, student, teacher, samples, rows):
    s, four = recovery_settings(recipe, **change), [0, 1, 2, 3]
    b, collated = samples.collate([samples[i] for i in four]), Collator(student)([rows[i] for i in four])
    with torch.no_grad():
        got = DistillationModel(student, s, teacher).eval()(**b)
    n = {'answer': int((b['labels'][:, 1:] != -100).sum()), 'all': int(b['attention_mask'].sum())}
    tokens = {'sft': 'answer', s.kd: s.kd_tokens, 'hidden': s.hidden_tokens}
    want = plain(student, teacher, collated, s)
    assert got.keys() == s.terms.keys()
    for k in s.terms:
        assert float(got[k]) / n[tokens[k]] == pytest.approx(float(want[k]), rel=1e-4), k


@pytest.mark.parametrize('recipe', ['reference', 'sft+hidden+rkl'])
def test_what_is_logged_is_the_plain_loss(recipe, student, teacher, samples, rows):
    "The first step of a real run, in two pieces, logs each loss in its own unit over the whole batch."
    s = recovery_settings(recipe)
    result = run(
        student, samples, recipe, teacher=teacher, trainable='projector', max_steps=1, accumulation=2, batch_size=3
    )
    order = R.training_order(samples.lengths(range(N)), result.settings)
    want = plain(student, teacher, Collator(student)([rows[i] for i in order]), s)
    for k, w in s.terms.items():
        assert float(result.curves[k][0]) == pytest.approx(float(want[k]), rel=1e-4), k
    assert float(result.curves.loss[0]) == pytest.approx(sum(w * float(want[k]) for k, w in s.terms.items()), rel=1e-4)


def test_training_is_the_plain_loop(student, samples, rows):
    "Three steps of AdamW by hand give the same projector."
    result = run(student, samples, trainable='projector', lr=1e-2, projector_lr=2e-3, max_grad_norm=0.5, warmup=0.4)
    lvlm = replace(student, model=copy.deepcopy(student.model))
    ps = list(lvlm.part('projector').parameters())
    opt = torch.optim.AdamW(ps, weight_decay=0)
    order = R.training_order(samples.lengths(range(N)), result.settings)
    for k, share in enumerate((1, 1, 0.5)):
        opt.param_groups[0]['lr'] = 2e-3 * share
        lvlm.model(**Collator(student)([rows[i] for i in order[4 * k : 4 * k + 4]])).loss.backward()
        torch.nn.utils.clip_grad_norm_(ps, 0.5)
        opt.step()
        lvlm.model.zero_grad()
    assert gap(weights(lvlm), weights(result.lvlm)) < 2e-5 and gap(weights(lvlm), weights(student)) > 1e-3
    assert result.curves.lr.tolist() == pytest.approx([2e-3, 2e-3, 1e-3])


ALL = dict(recipe='sft+hidden+kl')


def sums(student, teacher, b, **kw):
    with torch.no_grad():
        return DistillationModel(student, recovery_settings(ALL['recipe'], **kw), teacher).eval()(**b)


def test_padding_has_no_influence(student, teacher, samples, batch):
    want = sums(student, teacher, batch)
    off = batch['attention_mask'] == 0
    assert off.any()
    other = sums(student, teacher, batch | dict(input_ids=batch['input_ids'].masked_fill(off, 9)))
    one_by_one = [sums(student, teacher, samples.collate([samples[i]])) for i in range(4)]
    for k, w in want.items():
        assert float(other[k]) == pytest.approx(float(w), rel=1e-5)
        assert float(sum(o[k] for o in one_by_one)) == pytest.approx(float(w), rel=1e-4)


def test_prompt_tokens_have_no_influence(student, teacher, batch):
    "The words of the vocabulary are asked for at answers only: what the head would say at the prompt plays no part."
    asked = []
    hooks = [
        m.part('head').register_forward_pre_hook(lambda m, args: asked.append(len(args[0]))) for m in (student, teacher)
    ]
    sums(student, teacher, batch)
    for h in hooks:
        h.remove()
    answers = int((batch['labels'][:, 1:] != -100).sum())
    assert asked == [answers, answers]
    logits = torch.randn(4, batch['labels'].shape[1], 50, requires_grad=True)
    L.sft_loss(logits.flatten(0, 1), L.next_labels(batch['labels']).clamp(max=49).flatten()).sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, L.next_labels(batch['labels']) != -100)


@pytest.mark.parametrize('name', ['mha', 'phi', 'phi3'])
def test_one_look_serves_both(name):
    "Features are computed once a picture, of several tiles in InternVL, and equal each model's own forward pass."
    student, teacher = zoo.build(name), zoo.build(name)
    x = zoo.inputs(student)
    n = student.config.image_seq_length
    with torch.no_grad():
        for p in teacher.part('projector').parameters():
            p += 0.1 * torch.randn_like(p)
    if name == 'phi3':
        x['input_ids'][0, 5:7] = 3
        x['pixel_values'] = torch.randn(4, 3, 16, 16)  # three tiles and one
    f, (tokens, mask) = (
        L.vision_features(student, dict(pixel_values=x['pixel_values'])),
        (x['input_ids'], x['attention_mask']),
    )
    assert len(f) == (4 if name == 'phi3' else 2 * n) == int((tokens == 3).sum())
    with torch.no_grad():
        logits = [(l.part('head')(L.last_states(l, tokens, mask, f)), l.model(**x).logits) for l in (student, teacher)]
    for ours, stock in logits:
        assert torch.allclose(ours, stock, atol=1e-5)
    assert not torch.allclose(logits[0][0], logits[1][0], atol=1e-3)
    looks = []
    hooks = [l.part('vision').register_forward_hook(lambda *a: looks.append(1)) for l in (student, teacher)]
    with torch.no_grad():
        DistillationModel(student, recovery_settings('sft+hidden'), teacher)(
            tokens, mask, tokens, images=dict(pixel_values=x['pixel_values'])
        )
    for h in hooks:
        h.remove()
    assert len(looks) == 1


@pytest.mark.parametrize('tokens', ['answer', 'all'])
def test_where_hidden_states_count(tokens, student, teacher, batch):
    "Moving the state of a token moves the loss where it should: never at padding, elsewhere only if asked."
    h, t = torch.randn(
        2, *batch['labels'].shape, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    where = dict(answer=L.next_labels(batch['labels']) != -100, all=batch['attention_mask'].bool())
    h.requires_grad_()
    DistillationModel(student, recovery_settings('hidden', hidden_tokens=tokens), teacher)._hidden_sum([(h, t)], where)[
        'hidden'
    ].backward()
    assert torch.equal(h.grad.abs().sum(-1) > 0, where[tokens])
    image = batch['input_ids'] == student.config.image_token_id
    assert image.any() and bool((h.grad[image] != 0).any()) == (tokens == 'all')


def test_an_answer_token_does(student, teacher, batch):
    at = (batch['labels'] != -100).nonzero()[0]
    labels = batch['labels'].clone()
    labels[tuple(at)] += 1
    assert float(sums(student, teacher, batch | dict(labels=labels))['sft']) != pytest.approx(
        float(sums(student, teacher, batch)['sft']), rel=1e-4
    )


@pytest.mark.parametrize(
    'change',
    [dict(chunk=7), dict(gradient_checkpointing=True), dict(feature_gb=0.0), dict(feature_gb=0.0, workers=1)],
    ids=str,
)
def test_saving_memory_changes_nothing(change, student, teacher, rows, trained):
    kw = dict(trainable='projector+lora', max_steps=2)
    want, got = trained(ALL['recipe'], **kw), run(student, rows, ALL['recipe'], teacher=teacher, **kw | change)
    assert gap(weights(want.lvlm), weights(got.lvlm)) < 1e-4
    for k in want.settings.terms:
        assert got.curves[k].tolist() == pytest.approx(want.curves[k].tolist(), rel=1e-4)
    assert not any(getattr(b, 'gradient_checkpointing', False) for b in got.lvlm.layers)


def test_gradient_checkpointing_recomputes(student, batch):
    "Layers run a second time in the backward pass, also where they are frozen."
    lvlm, _ = prepare_student(student, recovery_settings('sft', trainable='projector', gradient_checkpointing=True))
    calls = []
    handle = lvlm.layers[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    DistillationModel(lvlm, recovery_settings('sft', trainable='projector', gradient_checkpointing=True)).train()(
        **batch
    )['sft'].backward()
    handle.remove()
    assert len(calls) == 2


# --- the teacher cache --------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teacher_cache(teacher, samples, tmp_path_factory):
    words = teacher.part('head').weight.shape[0]
    return cache_teacher(
        teacher,
        samples,
        tmp_path_factory.mktemp('cache') / 'o',
        top=words - 1,
        dtype=torch.float32,
        part=10,
        progress=False,
    )


@pytest.mark.parametrize('kind', ['kl', 'rkl', 'jsd'])
def test_cached_losses_are_those_beside_the_teacher(kind, student, teacher, samples, teacher_cache):
    "With all words but one kept, a student with a teacher cache has the losses of one with its teacher in memory."
    s = recovery_settings(f'sft+{kind}', hidden_weight=1.0, hidden_tokens='answer', chunk=7)
    cached = CachedTeacherDataset(samples, teacher_cache)
    with torch.no_grad():
        a = DistillationModel(student, s).eval()(**cached.collate([cached[i] for i in (5, 0, 3)]))
        b = DistillationModel(student, s, teacher).eval()(**samples.collate([samples[i] for i in (5, 0, 3)]))
    for k in b:
        assert float(a[k]) == pytest.approx(float(b[k]), rel=1e-4), k


def test_a_student_alone_learns_the_same(student, samples, teacher_cache, trained):
    kw = dict(hidden_tokens='answer', trainable='projector')
    alone, beside = run(student, samples, 'sft+hidden+kl', teacher=teacher_cache, **kw), trained('sft+hidden+kl', **kw)
    assert gap(weights(alone.lvlm), weights(beside.lvlm)) < 1e-4 < gap(weights(alone.lvlm), weights(student))
    for k in alone.settings.terms:
        assert alone.curves[k].tolist() == pytest.approx(beside.curves[k].tolist(), rel=1e-3)


def test_a_cache_is_added_to_and_survives_a_kill(teacher, samples, teacher_cache, tmp_path):
    shutil.copytree(teacher_cache.folder, tmp_path / 'o')
    (tmp_path / 'o' / 'part-00001.safetensors').unlink()
    (tmp_path / 'o' / '.part-00009.safetensors.7.partial').write_bytes(b'half')
    fewer = TeacherCache(tmp_path / 'o')
    gone = fewer.missing(samples, range(N))
    assert len(fewer) == N - 10 and len(gone) == 10
    again = cache_teacher(
        teacher,
        samples,
        tmp_path / 'o',
        range(N - 1, -1, -1),
        top=teacher_cache.about['top'],
        dtype=torch.float32,
        progress=False,
    )
    for key in teacher_cache.where:
        for k, v in teacher_cache.read(key).items():
            assert torch.allclose(v.float(), again.read(key)[k].float(), atol=1e-3) or k == 'ids'


@pytest.mark.parametrize(
    'recipe, kw, says',
    [
        ('kl', dict(temperature=1.0), 'written for temperature 2, not 1'),
        ('kl', dict(kd_tokens='all'), "say kd_tokens='answer'"),
        ('hidden', {}, "say hidden_tokens='answer'"),
        ('sft+layers', dict(hidden_tokens='answer'), "say states='last'"),
    ],
    ids=str,
)
def test_a_cache_that_does_not_serve(recipe, kw, says, student, samples, teacher_cache):
    with pytest.raises(ValueError, match=says) as e:
        run(student, samples, recipe, teacher=teacher_cache, **kw)
    assert '\n' not in str(e.value)


def test_a_cache_of_other_samples(student, teacher, rows, samples, teacher_cache):
    other = TrainingSamples(teacher, instructions('recovery', N + 4).select(range(4, N + 4)))
    with pytest.raises(ValueError, match="lacks 4 of the 24 samples, such as 'recovery-24'"):
        run(student, other, 'kl', teacher=teacher_cache)


# --- steps and orders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('recipe', ['sft', 'sft+hidden+kl'])
def test_accumulated_batches_are_one_batch(recipe, student, teacher, samples):
    a, b = (run(student, samples, recipe, teacher=teacher, batch_size=n, accumulation=k) for n, k in ((8, 1), (4, 2)))
    for k in ('loss', 'grad_norm', *a.settings.terms):
        assert a.curves[k].tolist() == pytest.approx(b.curves[k].tolist(), rel=1e-4)
    assert gap(weights(a.lvlm), weights(b.lvlm)) < 1e-4


def test_order():
    lengths = list(range(50))

    def order(processes=1, **kw):
        return R.training_order(lengths, recovery_settings('sft', **kw), processes)

    for by_length in (True, False):
        assert sorted(order(by_length=by_length)) == list(range(50)) and sorted(
            order(epochs=2, by_length=by_length)
        ) == sorted([*range(50)] * 2)
        assert order(seed=1, by_length=by_length) != order(by_length=by_length) == order(by_length=by_length)
    assert order(batch_size=4, processes=2) == order(batch_size=2, accumulation=4) == order(batch_size=8)
    assert len(order(max_steps=3, batch_size=4, accumulation=2)) == 24 and len(order(epochs=0.5)) == 25
    assert order(epochs=2)[:50] == order(epochs=1)


def test_every_sample_is_seen_once(student, samples):
    result = recover(student, samples, trainable='projector', batch_size=10, progress=False)
    assert len(result.curves) == 3 and result.indices == list(range(N))


def test_fractions_are_nested_and_only_they_are_encoded(student, teacher, rows):
    fresh = TrainingSamples(teacher, rows)
    small, large = (run(student, fresh, fraction=f, max_steps=1, trainable='projector') for f in (0.25, 0.5))
    assert set(small.indices) < set(large.indices) and len(large.indices) == N // 2
    assert set(fresh.encoded) == set(large.indices) | {0}
    assert run(student, fresh, fraction=0.25, seed=1, max_steps=1, trainable='projector').indices != small.indices


def test_same_seed_same_weights(student, samples, trained):
    a, c = (
        weights(run(student, samples, lora_dropout=0.2).lvlm),
        weights(run(student, samples, seed=4, lora_dropout=0.2).lvlm),
    )
    b = weights(trained(lora_dropout=0.2).lvlm)
    assert not differ(a, b) and differ(a, c)


def test_check_is_called_and_changes_nothing(student, samples, trained):
    def check(lvlm):
        assert not lvlm.model.training and not torch.is_grad_enabled()
        return dict(draw=torch.rand(()), norm=lvlm.part('projector').linear_1.weight.norm())

    a, b = trained(lora_dropout=0.2), run(student, samples, lora_dropout=0.2, check=check, check_every=2)
    assert not differ(weights(a.lvlm), weights(b.lvlm))
    assert b.curves.norm.notna().tolist() == [False, True, True] and 'norm' not in a.curves


def test_half_precision(student, samples):
    "What is trained is trained in float32; what comes back is as it came."
    half = replace(student, model=copy.deepcopy(student.model).bfloat16())
    eyes = TrainingSamples(half, samples.ds)
    for bf16 in (False, True):
        lvlm, _ = prepare_student(half, recovery_settings('sft', bf16=bf16))
        assert {p.dtype for p in lvlm.model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in lvlm.part('vision').parameters()} == {torch.bfloat16 if bf16 else torch.float32}
        result = run(half, eyes, bf16=bf16, max_steps=2)
        assert {p.dtype for p in result.lvlm.model.parameters()} == {torch.bfloat16} and result.curves.sft[
            1
        ] < result.curves.sft[0]


def test_adapters_start_exactly_where_channels_are_zero(student):
    masked = replace(student, model=copy.deepcopy(student.model))
    with torch.no_grad():
        for layer in masked.layers:
            layer.mlp.up_proj.weight[5:40] = 0
            layer.mlp.gate_proj.weight[5:40] = 0
        inputs = dict(input_ids=torch.arange(5, 30)[None])
        lvlm, peft = prepare_student(masked, recovery_settings('sft', trainable='lora'))
        assert torch.equal(lvlm.model(**inputs).logits, masked.model(**inputs).logits)
    lvlm.model(**inputs, labels=inputs['input_ids']).loss.backward()
    assert all(p.grad.isfinite().all() for p in peft.parameters() if p.grad is not None)


# --- killed and called again ------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    "Dies when `step` steps are done."

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == self.step:
            raise Killed


def stopped(student, samples, out, at, recipe='sft', **kw):
    with pytest.raises(Killed):
        run(student, samples, recipe, out=out, callbacks=[Kill(at)], **kw)


@pytest.mark.parametrize(
    'recipe, kw',
    [
        ('sft+hidden+kl', dict(lora_dropout=0.2)),
        ('sft', dict(trainable='projector+lm', weight_decay=0.1, accumulation=2, batch_size=3)),
    ],
)
def test_resumed_equals_uninterrupted(recipe, kw, student, teacher, samples, tmp_path):
    "Two kills, over the end of an epoch, with dropout: the same bits."
    kw = dict(kw, teacher=teacher, max_steps=8, save_every=2, fraction=0.75)
    whole = run(student, samples, recipe, **kw)
    for at in (3, 7):
        stopped(student, samples, tmp_path / 'out', at, recipe, **kw)
    assert R.last_checkpoint(tmp_path / 'out' / 'work').name == 'checkpoint-6'
    resumed = run(student, samples, recipe, out=tmp_path / 'out', **kw)
    assert not differ(weights(whole.lvlm), weights(resumed.lvlm))
    for k in ('step', 'loss', 'lr', 'grad_norm', *whole.settings.terms):
        assert whole.curves[k].tolist() == resumed.curves[k].tolist(), k
    assert not differ(weights(load_lvlm(tmp_path / 'out' / 'model')), weights(resumed.lvlm))


def test_a_half_written_checkpoint_is_not_taken(student, samples, tmp_path):
    kw = dict(trainable='projector', save_every=1, max_steps=4)
    stopped(student, samples, tmp_path / 'out', 2, **kw)
    work = tmp_path / 'out' / 'work'
    (work / 'checkpoint-3').mkdir()
    (work / 'checkpoint-3' / 'model.safetensors').write_bytes(b'half')
    (work / 'checkpoint-3' / 'trainer_state.json').write_text('{"global_st')
    assert not differ(
        weights(run(student, samples, out=tmp_path / 'out', **kw).lvlm), weights(run(student, samples, **kw).lvlm)
    )


def test_killed_between_training_and_keeping(student, samples, tmp_path, monkeypatch):
    def dies(*args, **kw):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(R, 'save_lvlm', dies)
        run(student, samples, out=tmp_path / 'out')
    assert not (tmp_path / 'out' / 'model').exists()
    result = run(student, samples, out=tmp_path / 'out', callbacks=[Kill(0)])  # no step is taken again
    assert (tmp_path / 'out' / 'model').is_dir() and len(result.curves) == 3


def test_the_folder(student, samples, teacher, tmp_path):
    from peft import PeftModel

    stopped(student, samples, tmp_path / 'out', 2, save_every=1)
    held = sorted(p.name for p in (tmp_path / 'out' / 'work' / 'checkpoint-2').iterdir())
    assert held == ['model.safetensors', 'optimizer.pt', 'rng_state.pth', 'scheduler.pt', 'trainer_state.json']
    result = run(student, samples, out=tmp_path / 'out', save_every=1)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'adapter',
        'curves.jsonl',
        'indices.json',
        'model',
        'settings.json',
    ]
    assert not [p for p in (tmp_path / 'out').rglob('*') if p.suffix in ('.bin', '.pt', '.pth', '.pkl')]
    assert json.loads((tmp_path / 'out' / 'indices.json').read_text()) == result.indices
    assert (
        'projector+lora' in (tmp_path / 'out' / 'model' / 'README.md').read_text()
        and (tmp_path / 'out' / 'model' / 'plan.json').exists()
    )
    again = run(student, samples, out=tmp_path / 'out', callbacks=[Kill(0)])  # finished: read, not trained
    assert not differ(weights(again.lvlm), weights(result.lvlm)) and again.settings == result.settings
    stock = PeftModel.from_pretrained(copy.deepcopy(student.model), tmp_path / 'out' / 'adapter').merge_and_unload()
    assert gap(weights(replace(student, model=stock)), weights(result.lvlm)) < 1e-6


# --- from a run of the study ------------------------------------------------------------------------------------


def of_recipe(recipe, **kw):
    return Run('recovery', method='layer', recipe=recipe, trainable='projector+lora', calibration=8, **kw)


@pytest.fixture
def steps_taken(monkeypatch):
    "Counts steps; the step in `die_at` raises `Killed`."
    counter = dict(n=0, die_at=0)
    step = R.RecoveryTrainer.training_step

    def counted(*args, **kw):
        counter['n'] += 1
        if counter['n'] == counter['die_at']:
            raise Killed
        return step(*args, **kw)

    monkeypatch.setattr(R.RecoveryTrainer, 'training_step', counted)
    return counter


@pytest.mark.parametrize('recipe', ['sft+hidden', *recipes.STAGED_RECIPES])
def test_a_killed_run_goes_on(recipe, teacher, samples, tmp_path, steps_taken):
    "The third step dies; called again, only steps that are missing are taken, and the weights are the same bits."
    plan, kw = Plan.of(teacher, layers=[0, 2, 5]), dict(batch_size=4, lora_rank=4, max_steps=3, save_every=1)
    whole = recipes.recover_run(teacher, of_recipe(recipe), samples, plan, **kw)
    steps_taken.update(n=0, die_at=3)
    with pytest.raises(Killed):
        recipes.recover_run(teacher, of_recipe(recipe), samples, plan, out=tmp_path / 'out', **kw)
    steps_taken.update(n=0, die_at=0)
    again = recipes.recover_run(teacher, of_recipe(recipe), samples, plan, out=tmp_path / 'out', **kw)
    assert steps_taken['n'] == 1 and again.steps == whole.steps == 3
    assert not differ(weights(whole.lvlm), weights(again.lvlm))
    assert again.lvlm.name == whole.lvlm.name and len(again.lvlm.layers) == 3
    assert again.curves.step.tolist() == [1, 2, 3] and again.curves.loss.tolist() == whole.curves.loss.tolist()
    assert isinstance(again, recipes.StagedResult) == (recipe in recipes.STAGED_RECIPES)


def test_a_run_is_recovered_as_it_says(teacher, samples):
    plan = Plan.of(teacher, layers=[0, 2, 5])
    given = dict(trainable='projector', seed=3, fraction=0.5)
    run_ = replace(of_recipe('sft'), **given)
    a = recipes.recover_run(teacher, run_, samples, plan)
    b = recover(apply_plan(teacher, plan), samples, 'sft', progress=False, **given)
    assert a.settings == b.settings and a.indices == b.indices and not differ(weights(a.lvlm), weights(b.lvlm))
    assert recipes.recover_run(teacher, replace(run_, budget='steps'), samples, plan).steps == 3 > a.steps


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(recipe='sft+l2'), r"no recipe 'sft\+l2'; there are sft, kl"),
        (dict(recipe='none'), "no recipe 'none'"),
        (dict(budget='hours'), "budget is epochs or steps, not 'hours'"),
        (dict(teacher='drifting'), "its original as the teacher, not 'drifting'"),
        (dict(trainable='full'), 'is not offered'),
    ],
    ids=str,
)
def test_runs_that_cannot_be_recovered(change, says, teacher, samples):
    with pytest.raises(ValueError, match=says):
        recipes.recover_run(teacher, replace(of_recipe('sft'), **change), samples, Plan.of(teacher, layers=[0, 2, 5]))


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(recipe='sft+l2'), r"no recipe 'sft\+l2'; there are sft, kl"),
        (dict(recipe='kl'), 'learning from kl needs a teacher'),
        (dict(trainable='all'), "trainable is one of projector, .*not 'all'"),
        (dict(sft_weight=0.0), 'nothing to learn from'),
        (dict(sft_weight=-1.0), 'sft_weight must be at least 0, not -1'),
        (dict(fraction=0.0), 'up to 1, not 0'),
        (dict(fraction=1.5), 'up to 1, not 1.5'),
        (dict(lr=0.0), 'lr must be above 0'),
        (dict(lr=math.nan), 'lr must be above 0, not nan'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(kd='l2'), "kd is one of kl, rkl, jsd, not 'l2'"),
        (dict(schedule='step'), 'schedule is one of cosine'),
        (dict(learning_rate=1.0), "'learning_rate' is no setting"),
        (dict(trainable='full'), "trainable='full' is not offered: the vision encoder stays frozen"),
        *((dict([(old, 1.0)]), f"the setting '{old}' is called '{new}' now") for old, new in L.OLD_SETTINGS.items()),
    ],
    ids=lambda o: str(o)[:40],
)
def test_bad_settings_are_refused_in_a_sentence(kw, says, student, samples):
    with pytest.raises(ValueError, match=says) as e:
        recover(student, samples, **kw)
    assert '\n' not in str(e.value)


def test_teacher_that_does_not_fit(student, teacher, samples):
    stranger = replace(teacher, tokenizer=copy.deepcopy(teacher.tokenizer))
    stranger.tokenizer.add_tokens(['polka'])
    with pytest.raises(ValueError, match='different vocabularies'):
        run(student, samples, 'kl', teacher=stranger)
    other_encoder = replace(teacher, model=copy.deepcopy(teacher.model))
    next(other_encoder.part('vision').parameters()).data += 1
    with pytest.raises(ValueError, match='vision encoder of the teacher is another one'):
        run(student, samples, 'kl', teacher=other_encoder)
    with pytest.raises(ValueError, match='vision encoder of the model that the samples'):
        run(student, TrainingSamples(other_encoder, samples.ds))
    assert run(
        student, samples, 'sft', teacher=stranger, max_steps=1
    ).settings.sft_weight  # SFT does not ask the teacher


def test_bad_data(student, samples, rows):
    from datasets import Dataset

    bare = Dataset.from_list(
        [dict(r, messages=r['messages'][:1]) for r in rows.select(range(2))], features=rows.features
    )
    with pytest.raises(ValueError, match="'recovery-0' has no answer"):
        run(student, bare)
    with pytest.raises(ValueError, match='training set is empty'):
        run(student, rows.select([]))
    with pytest.raises(ValueError, match='cuts through its picture'):
        run(student, rows, max_length=20)
    with pytest.raises(ValueError, match='leaves none of its answer'):
        run(student, rows, max_length=32)
    table = rows.select(range(3)).to_list()
    table[1]['images'][0]['bytes'] = b'no picture'
    broken = Dataset.from_list(table, features=rows.features)
    with pytest.raises(ValueError, match="'recovery-1': its picture does not decode"):
        run(student, broken)
    assert len(run(student, rows, max_length=150, max_steps=1).curves) == 1


@pytest.mark.parametrize('feature_gb', [2.0, 0.0], ids=['kept', 'not kept'])
def test_pictures_that_do_not_decode(feature_gb, student, rows, tmp_path):
    "Stopped before the first step, or left out by name; a whole folder remembers it."
    from datasets import Dataset

    table = rows.select(range(12)).to_list()
    for i in (0, 7):
        table[i]['images'][0]['bytes'] = table[i]['images'][0]['bytes'][:60]
    damaged, kw = Dataset.from_list(table, features=rows.features), dict(feature_gb=feature_gb, trainable='projector')
    with pytest.raises(ValueError, match="'recovery-[07]': its picture does not decode"):
        run(student, damaged, callbacks=[Kill(0)], **kw)
    r = run(student, damaged, skip_broken=True, out=tmp_path / 'out', **kw)
    assert (
        r.skipped == ['recovery-0', 'recovery-7']
        and r.indices == [i for i in range(12) if i not in (0, 7)]
        and '2 left out' in repr(r)
    )
    again = run(student, damaged, skip_broken=True, out=tmp_path / 'out', callbacks=[Kill(0)], **kw)
    assert (again.skipped, again.indices) == (r.skipped, r.indices)
    only = Dataset.from_list([table[0]], features=rows.features)
    with pytest.raises(ValueError, match='no picture .* decodes'):
        run(student, only, skip_broken=True, **kw)


def test_trackers_are_off_unless_asked(student, samples, tmp_path, monkeypatch):
    assert R.training_arguments(recovery_settings('sft'), tmp_path, False).report_to == []
    with pytest.raises(ValueError, match="a tracker is tensorboard or wandb, not 'mlflow'"):
        recovery_settings('sft', trackers=('mlflow',))
    monkeypatch.setattr(R, 'is_wandb_available', lambda: False)
    monkeypatch.setattr(R, 'is_tensorboard_available', lambda: True)
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"):
        run(student, samples, trackers=('wandb',))
    assert R.training_arguments(recovery_settings('sft', trackers=('tensorboard',)), tmp_path, False).report_to == [
        'tensorboard'
    ]


def test_sharded_training_is_refused(student, samples, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ValueError, match='launch it without FSDP'):
        run(student, samples)


def test_layers_that_are_not_left(student, teacher, samples):
    with pytest.raises(ValueError, match='layer 3 is not in student and teacher: both have 0, 2, 5'):
        run(student, samples, 'hidden', teacher=teacher, states=(0, 3))
    for bad in ('first', (), (-1,)):
        with pytest.raises(ValueError, match="states is 'last', 'all', or the numbers"):
            recovery_settings('hidden', states=bad)
    assert recovery_settings('hidden', states=[0, 2]).states == (0, 2)


def test_a_folder_belongs_to_one_recovery(student, teacher, samples, rows, tmp_path):
    out, kw = tmp_path / 'out', dict(trainable='projector', max_steps=1)
    run(student, samples, out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with lr 0.001, not 0.01: choose another folder'):
        run(student, samples, out=out, lr=0.01, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with student'):
        run(teacher, samples, out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with data'):
        run(student, rows.select(range(N - 1, -1, -1)), out=out, **kw)
    with pytest.raises(ValueError, match='out holds a recovery with fraction 1.0, not 0.5'):
        run(student, samples, out=out, fraction=0.5, **kw)
    assert run(student, samples, out=out, log_every=2, save_every=7, **kw).folder == out  # changes no weight
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='mine is in use and holds no recovery'):
        run(student, samples, out=tmp_path / 'mine', **kw)
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['thesis.txt']


def test_folders_of_earlier_versions_are_refused(student, samples, tmp_path):
    out, kw = tmp_path / 'out', dict(trainable='projector', max_steps=1)
    run(student, samples, out=out, **kw)
    settings = json.loads((out / 'settings.json').read_text())
    settings['settings']['trains'] = settings['settings'].pop('trainable')
    (out / 'settings.json').write_text(json.dumps(settings))
    for again in (lambda: run(student, samples, out=out, **kw), lambda: R.load_recovery(out)):
        with pytest.raises(ValueError, match="of an earlier version .'trains' is called 'trainable' now") as e:
            again()
        assert '\n' not in str(e.value)
    (out / 'settings.json').write_text('{}')
    with pytest.raises(ValueError, match='out is in use and holds no recovery'):
        run(student, samples, out=out, **kw)
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'opinions.json').write_text('{}')
    with pytest.raises(ValueError, match='cache holds a cache of an earlier version'):
        TeacherCache(tmp_path / 'cache')


def test_a_diverging_run_says_so(student, samples):
    with pytest.raises(FloatingPointError, match='the loss is .* at step .: lower lr') as e:
        run(student, samples, trainable='projector+lm', lr=1e30, max_grad_norm=0)
    assert '\n' not in str(e.value)


def test_a_plain_language_model(teacher, samples):
    "No eye, no projector: LoRA on text; the projector is missed in a sentence."
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from lvlm_study.data.instruction_data import CONVERSATION_FEATURES, prompt_and_answer
    from lvlm_study.models.architecture import LVLM

    torch.manual_seed(0)
    lm = LVLM(
        AutoModelForCausalLM.from_config(teacher.config.text_config), tokenizer=teacher.tokenizer, name='a text model'
    )
    text = Dataset.from_list(
        [dict(id=str(i), images=[], messages=prompt_and_answer(f'What is {i}?', 'red')) for i in range(8)],
        features=CONVERSATION_FEATURES,
    )
    assert run(lm, text, trainable='lora').curves.sft.iloc[-1] < run(lm, text, trainable='lora').curves.sft[0]
    with pytest.raises(ValueError, match='a text model has no projector to train'):
        run(lm, text)


# --- many processes ---------------------------------------------------------------------------------------------

TWO = """
import sys, transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from lvlm_study.models.loading import load_lvlm
from lvlm_study.recovery.recovery import recover
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
def work(out, batch):
    teacher = load_lvlm('tiny-llava')
    teacher = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 10, 11]))
    teacher.plan = None
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 3]))
    kw = dict(batch_size=int(batch), max_steps=3, fraction=.75, lora_rank=4, progress=False)
    r = recover(student, instructions('recovery', 24), 'sft+hidden+kl', teacher=teacher, out=out, **kw)
    assert len(r.curves) == 3
if __name__ == '__main__': work(*sys.argv[1:])
"""


def one_process(rank, port, work, *args):
    "What one of two processes does that were born from this one. Like a worker of a DataLoader it has one thread."
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    work(*args)
    torch.distributed.destroy_process_group()


def born(*args):
    "A process that is born from this one, so nothing is imported again: its id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        one_process(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def same_curves(one, two):
    for k in ('loss', 'sft', 'kl', 'hidden', 'grad_norm'):
        assert one.curves[k].tolist() == pytest.approx(two.curves[k].tolist(), rel=1e-4)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not hasattr(os, 'fork') or torch.cuda.is_available(), reason='needs os.fork, and a CPU')
def test_two_processes_are_one(tmp_path):
    "Same subset, same losses, same weights as one process with the same global batch, over gloo."
    here = {'__name__': 'two'}
    exec(TWO, here)
    port = free_port()
    pids = [born(rank, port, here['work'], tmp_path / 'by2', 4) for rank in (0, 1)]
    here['work'](tmp_path / 'by1', 8)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0]
    one, two = map(R.load_recovery, (tmp_path / 'by1', tmp_path / 'by2'))
    assert one.indices == two.indices and same_but_for_rounding(weights(one.lvlm), weights(two.lvlm))
    same_curves(one, two)


@pytest.mark.slow
def test_torchrun(tmp_path):
    (tmp_path / 'two.py').write_text(TWO)
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node']
    for n, batch in ((1, 8), (2, 4)):
        where = ['--master_port', str(free_port()), tmp_path / 'two.py', tmp_path / f'by{n}', str(batch)]
        subprocess.run([*start, str(n), *where], check=True, capture_output=True)
    one, two = map(R.load_recovery, (tmp_path / 'by1', tmp_path / 'by2'))
    assert one.indices == two.indices and same_but_for_rounding(weights(one.lvlm), weights(two.lvlm))
    same_curves(one, two)
