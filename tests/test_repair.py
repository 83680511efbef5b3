"Repair: exact where nothing is wrong, equal to an independent solver, on every shape of layer, and bad input."

import copy
import numpy as np
import pytest
import torch
import zoo
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.folder_repair import repair_folder
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.repair import HeldOut, LeastSquares, choose_ridge, repair
from lvlm_study.pruning.surgery import apply_plan


@pytest.fixture(scope='module')
def models():
    return {name: zoo.build(name) for name in zoo.BUILD}


def calibration(lvlm, samples=24, length=40, seed=3):
    "Texts, with an image in each where the model reads images; the last four samples are padded."
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (samples, length), generator=g)
    mask = torch.ones_like(ids)
    mask[-4:, -7:] = 0
    if not lvlm.architecture.vision:
        return dict(input_ids=ids, attention_mask=mask)
    n = lvlm.config.image_seq_length
    ids = torch.cat([ids[:, :2], torch.full((samples, n), 3), ids[:, 2:]], 1)
    mask = torch.cat([torch.ones(samples, n, dtype=mask.dtype), mask], 1)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(samples, 3, 16, 16, generator=g))


@torch.no_grad()
def states(lvlm, batch):
    "Last hidden states of the tokens that are no padding."
    h = lvlm.model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return h[batch['attention_mask'].bool()]


def distance(student, teacher, batch):
    "Error of the last hidden states, relative to the teacher's."
    want = states(teacher, batch)
    return float((states(student, batch) - want).norm() / want.norm())


def widths(lvlm, mixed=False):
    "A plan that keeps half of the KV heads and two thirds of the channels, fewer in odd layers if `mixed`."
    a = lvlm.architecture
    kv_heads = {i: range(0, a.kv_heads, 2 if not mixed or i % 2 else 1) for i in range(a.num_layers)}
    channels = {i: [c for c in range(a.mlp_channels) if c % 3 or (mixed and i % 2)] for i in range(a.num_layers)}
    return Plan.of(lvlm, kv_heads=kv_heads, mlp_channels=channels)


PLANS = dict(
    layers=lambda m: Plan.of(m, layers=[0, 2, 3]),
    first=lambda m: Plan.of(m, layers=[1, 2, 3]),
    last=lambda m: Plan.of(m, layers=[0, 1, 2]),
    width=widths,
)


# --- exactness -------------------------------------------------------------------------------------------------------


def test_the_sums_are_those_of_an_independent_solver():
    "Weighted ridge regression of the error on the inputs, with and without a bias, by scikit-learn."
    rng = np.random.default_rng(0)
    a, e, w = rng.normal(size=(500, 12)) * np.arange(1, 13), rng.normal(size=(500, 5)), rng.uniform(0.1, 3, 500)
    e += a @ rng.normal(size=(12, 5)) + 4
    sums = LeastSquares(12, 5)
    for rows in np.split(np.arange(500), 5):
        sums.add(*(torch.tensor(x[rows]) for x in (a, e, w)))
    for bias in (False, True):
        center = (w @ a / w.sum()) * bias
        alpha = 0.3 * np.mean(w @ (a - center) ** 2)
        known = Ridge(alpha=alpha, fit_intercept=bias, solver='cholesky').fit(a, e, sample_weight=w)
        change, change_of_bias = sums.solve(0.3, bias)
        assert np.allclose(change, known.coef_, atol=1e-4)
        assert change_of_bias is None if not bias else np.allclose(change_of_bias, known.intercept_, atol=1e-3)


def test_without_a_ridge_it_is_the_least_norm_solution():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 9))  # rank 6 of 9
    e = rng.normal(size=(200, 4))
    sums = LeastSquares(9, 4)
    sums.add(*map(torch.tensor, (a, e, np.ones(200))))
    assert np.allclose(sums.solve(0.0)[0].T, np.linalg.lstsq(a, e, rcond=1e-6)[0], atol=1e-4)


@pytest.mark.parametrize('name', zoo.BUILD)
def test_where_nothing_is_removed_nothing_changes(models, name):
    teacher = models[name]
    student = apply_plan(teacher, Plan.of(teacher))
    rows = []
    repaired = repair(student, teacher, calibration(teacher), rows=rows)
    for (n, p), q in zip(student.model.named_parameters(), repaired.model.parameters()):
        assert torch.equal(p, q), n
    assert len(rows) == 2 * teacher.architecture.num_layers and all(r['ridge'] is None for r in rows)


@pytest.mark.parametrize('target', ['stream', 'whole'])
def test_a_dead_channel_loses_nothing(models, target):
    teacher = LVLM(copy.deepcopy(models['gqa'].model), name='gqa')
    for layer in teacher.layers:
        with torch.no_grad():
            layer.mlp.up_proj.weight[::3] = 0
    stay = {i: [c for c in range(96) if c % 3] for i in range(4)}
    student = apply_plan(teacher, Plan.of(teacher, mlp_channels=stay))
    batch = calibration(teacher)
    assert distance(repair(student, teacher, batch, target=target), teacher, batch) < 1e-5


def test_a_channel_that_repeats_another_is_given_back(models):
    "A removed channel that is twice a kept one is in the span of what stays, so hardly any ridge restores it all."
    teacher = LVLM(copy.deepcopy(models['tied'].model), name='tied')
    with torch.no_grad():
        for layer in teacher.layers:
            layer.mlp.gate_proj.weight[0] = layer.mlp.gate_proj.weight[1]
            layer.mlp.up_proj.weight[0] = 2 * layer.mlp.up_proj.weight[1]
            layer.mlp.down_proj.weight[:, 0] *= 3
    stay = {i: range(1, 96) for i in range(4)}
    student, batch = apply_plan(teacher, Plan.of(teacher, mlp_channels=stay)), calibration(teacher)
    assert distance(student, teacher, batch) > 0.05
    assert distance(repair(student, teacher, batch, ridge=1e-7, maps=('down',)), teacher, batch) < 1e-3


def test_one_layer_is_the_ridge_solution_of_its_activations(models):
    "The map before the gap, against scikit-learn on activations that hooks collected."
    teacher = models['tied']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = calibration(teacher, 25)
    repaired = repair(student, teacher, batch, where='gaps', maps=('down',), ridge=0.5)
    with torch.no_grad():
        want = teacher.model(**batch, output_hidden_states=True).hidden_states[3]
        have = student.model(**batch, output_hidden_states=True).hidden_states[2]
        seen = []
        handle = student.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        student.model(**batch)
        handle.remove()
    mask = batch['attention_mask'].bool()
    a, e, w = seen[0][mask].numpy(), (want - have)[mask].numpy(), 1 / want[mask].square().mean(-1).numpy()
    alpha = 0.5 * np.mean(w @ a**2)
    known = Ridge(alpha=alpha, fit_intercept=False, solver='cholesky').fit(a, e, sample_weight=w)
    before, after = student.layers[1].mlp.down_proj.weight, repaired.layers[1].mlp.down_proj.weight
    assert np.allclose((after - before).detach(), known.coef_, atol=2e-4)
    assert torch.equal(student.layers[0].mlp.down_proj.weight, repaired.layers[0].mlp.down_proj.weight)


# --- every shape of layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', PLANS)
@pytest.mark.parametrize('name', zoo.BUILD)
def test_states_come_nearer_on_other_samples(models, name, kind):
    teacher = models[name]
    student = apply_plan(teacher, PLANS[kind](teacher))
    other = calibration(teacher, 8, seed=11)
    repaired = repair(student, teacher, calibration(teacher, 40), batch_size=10)
    assert distance(repaired, teacher, other) < 0.97 * distance(student, teacher, other)
    changed = {n for (n, p), q in zip(student.model.named_parameters(), repaired.model.parameters()) if (p != q).any()}
    assert changed and all(n.split('.')[-2] in ('o_proj', 'dense', 'down_proj', 'fc2') for n in changed)


def test_mixed_widths(models, tmp_path):
    teacher = models['gqa']
    student = apply_plan(teacher, widths(teacher, mixed=True))
    batch, other = calibration(teacher, 40), calibration(teacher, 8, seed=11)
    repaired = repair(student, teacher, batch, target='whole')
    assert distance(repaired, teacher, other) < 0.97 * distance(student, teacher, other)
    loaded = load_lvlm(save_lvlm(repaired, tmp_path / 'mixed'))
    assert torch.equal(states(loaded, other), states(repaired, other))


@pytest.mark.parametrize('name', ['tied', 'mha', 'phi'])
def test_the_folder_is_an_ordinary_checkpoint(models, tmp_path, name):
    teacher = models[name]
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    repaired, batch = repair(student, teacher, calibration(teacher)), calibration(teacher, 5)
    folder = save_lvlm(repaired, tmp_path / name)
    auto = AutoModelForCausalLM if name == 'tied' else AutoModelForImageTextToText
    stock = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, repaired.model(**batch).logits)


def test_biases_take_part(models):
    "A bias-only repair changes biases alone, and gains less than a whole one."
    teacher = models['phi']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = calibration(teacher, 40)
    alone, whole = (repair(student, teacher, batch, ridge=r) for r in (float('inf'), None))
    changed = {n for (n, p), q in zip(student.model.named_parameters(), alone.model.parameters()) if (p != q).any()}
    assert changed and all(n.endswith(('dense.bias', 'fc2.bias')) for n in changed)
    assert distance(whole, teacher, batch) < distance(alone, teacher, batch) < distance(student, teacher, batch)


def test_sixteen_bit_weights_are_repaired_in_float32(models):
    teacher = LVLM(copy.deepcopy(models['tied'].model).bfloat16(), name='bf16')
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = calibration(teacher, 40)
    repaired = repair(student, teacher, batch)
    assert repaired.model.dtype == torch.bfloat16
    assert distance(repaired, teacher, batch) < 0.97 * distance(student, teacher, batch)


def test_batches_and_padding_do_not_matter(models):
    teacher = models['tied']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = calibration(teacher, 20)
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    thirds = [{k: v[i : i + 7] for k, v in batch.items()} for i in range(0, 20, 7)]
    want = repair(student, teacher, batch).layers[1].mlp.down_proj.weight
    for other in (padded, thirds):
        assert torch.allclose(repair(student, teacher, other).layers[1].mlp.down_proj.weight, want, atol=2e-4)


def test_the_student_changes_only_when_asked(models):
    teacher = models['tied']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    before = student.layers[1].mlp.down_proj.weight.clone()
    repair(student, teacher, calibration(teacher))
    assert torch.equal(student.layers[1].mlp.down_proj.weight, before)
    assert repair(student, teacher, calibration(teacher), inplace=True) is student
    assert not torch.equal(student.layers[1].mlp.down_proj.weight, before)


# --- the ridge -------------------------------------------------------------------------------------------------------


def sums_and_held(fit, other):
    sums, held = LeastSquares(8, 3), HeldOut()
    sums.add(*fit, torch.ones(len(fit[0])))
    held.add(*other, torch.ones(len(other[0])), torch.zeros(len(other[0])))
    return sums, held


def test_a_map_that_would_lose_is_left_alone():
    "Held-out errors that point the other way forbid every ridge; noise asks for a strong one."
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 8, generator=g), torch.randn(30, 8, generator=g)
    W = torch.randn(8, 3, generator=g)
    assert choose_ridge(*sums_and_held((a, a @ W), (b, -b @ W)))[0] is None
    weak = choose_ridge(*sums_and_held((a, a @ W), (b, b @ W)))[0]
    noisy = a @ W + 6 * torch.randn(30, 3, generator=g)
    strong = choose_ridge(*sums_and_held((a, noisy), (b, b @ W)))[0]
    assert weak == 0.1 and (strong is None or strong > weak)


def test_a_ridge_is_chosen_in_single_precision_as_in_double():
    "What remains on held-out tokens agrees to four digits even with channels of very different size."
    g = torch.Generator().manual_seed(5)
    a = torch.randn(900, 40, generator=g) * torch.logspace(-2, 1, 40)
    e = a @ torch.randn(40, 7, generator=g) + torch.randn(900, 7, generator=g)
    sums, held = LeastSquares(40, 7), HeldOut()
    sums.add(a[:700], e[:700], torch.ones(700))
    held.add(a[700:], e[700:], torch.ones(200), torch.zeros(200))
    ridge, shares = choose_ridge(sums, held)
    exact = {r: held.remaining(*sums.solve(r))[0] for r in shares}
    assert ridge in shares and all(abs(shares[r] - exact[r]) < 1e-4 for r in shares)


@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_a_name_is_no_model(models, role):
    given = dict(student=models['tied'], teacher=models['tied']) | {role: 'tiny-llava'}
    with pytest.raises(ValueError, match=f'a {role} is loaded first'):
        repair(given['student'], given['teacher'], calibration(models['tied']))


def test_weights_by_kind(models):
    "With all weight on image tokens, the states of image tokens come nearest."
    teacher = models['mha']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = calibration(teacher, 40)
    image = batch['input_ids'].eq(3)

    def error(lvlm):
        with torch.no_grad():
            h, want = (m.model(**batch, output_hidden_states=True).hidden_states[-1] for m in (lvlm, teacher))
        return float((h - want)[image].norm())

    plain, images = (repair(student, teacher, batch, kind_weights=w) for w in (None, dict(question=0, special=0)))
    assert error(images) < error(plain) < error(student)


# --- bad input -------------------------------------------------------------------------------------------------------


def text_only(batch):
    ids = batch['input_ids'].masked_fill(batch['input_ids'] == 3, 5)
    return dict(input_ids=ids, attention_mask=batch['attention_mask'])


def smaller():
    torch.manual_seed(0)
    return LVLM(LlamaForCausalLM(LlamaConfig(**zoo.LM | dict(hidden_size=32, num_attention_heads=4))).eval())


BAD = dict(
    few_tokens=(lambda s, t, b: repair(s, t, b, limit=1, ridge=0), 'without a ridge'),
    other_teacher=(lambda s, t, b: repair(s, smaller(), b), 'pruned from'),
    unpruned_student=(lambda s, t, b: repair(LVLM(s.model), t, b), 'pruned from'),
    ridge=(lambda s, t, b: repair(s, t, b, ridge=-1), 'from 0 on'),
    maps=(lambda s, t, b: repair(s, t, b, maps=('gate',)), "'gate'"),
    target=(lambda s, t, b: repair(s, t, b, target='mine'), "'mine'"),
    whole_of_layers=(lambda s, t, b: repair(s, t, b, target='whole'), "target='stream'"),
    weights=(lambda s, t, b: repair(s, t, b, kind_weights=dict(picture=1)), "'picture'"),
    no_samples=(lambda s, t, b: repair(s, t, []), 'calibration samples'),
    bias=(lambda s, t, b: repair(s, t, b, ridge=float('inf')), 'no bias'),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_sentence(models, name):
    call, says = BAD[name]
    teacher = models['tied']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    before = student.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(ValueError) as e:
        call(student, teacher, calibration(teacher))
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 240
    assert torch.equal(student.layers[1].mlp.down_proj.weight, before)


def test_a_model_that_sees_wants_pictures(models):
    teacher = models['mha']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    batch = text_only(calibration(teacher))
    with pytest.raises(ValueError, match='no calibration sample has a picture'):
        repair(student, teacher, batch)
    assert repair(student, teacher, batch, use_images=False) is not student


def test_a_layer_that_is_no_sum_is_refused():
    "Gemma 2 puts a norm behind `down_proj`: no least squares there, and the error says so before any change."
    from lvlm_study.models.random_models import random_model

    teacher = LVLM(random_model('gemma2'), name='gemma2')
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 2]))
    with pytest.raises(ValueError, match='least squares cannot repair it'):
        repair(student, teacher, dict(input_ids=torch.randint(8, 90, (8, 20))))


def test_a_repaired_model_can_be_trained(models):
    teacher = models['tied']
    student = apply_plan(teacher, Plan.of(teacher, layers=[0, 1, 3]))
    repaired, ids = repair(student, teacher, calibration(teacher)), torch.arange(4, 20)[None]
    repaired.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.requires_grad for p in repaired.model.parameters())


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tied', 'gqa', 'phi', 'phi3'])
@pytest.mark.parametrize('kind', ['layers', 'width'])
def test_a_folder_is_repaired_as_a_model_is(models, tmp_path, name, kind):
    "One layer in memory at a time gives the weights that two whole models give."
    teacher = models[name]
    original, batch = save_lvlm(teacher, tmp_path / 'original'), calibration(teacher, 20)
    plan = PLANS[kind](teacher)
    folder = prune_checkpoint(
        original, tmp_path / 'pruned', plan, repair=lambda *folders: repair_folder(*folders, batch, limit=20)
    )
    known = repair(apply_plan(teacher, plan), teacher, batch)
    loaded, other = load_lvlm(folder), calibration(teacher, 4, seed=5)
    assert distance(loaded, known, other) < 1e-5 < distance(apply_plan(teacher, plan), known, other)
    assert not list(folder.glob('*begun*')) and not list(tmp_path.glob('*.partial'))


def test_an_interrupted_repair_begins_anew(models, tmp_path):
    teacher = models['tied']
    original, batch, plan = save_lvlm(teacher, tmp_path / 'o'), calibration(teacher, 20), PLANS['layers'](teacher)

    def stop(src, folder):
        repair_folder(src, folder, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(original, tmp_path / 'p', plan, repair=stop)
    assert not (tmp_path / 'p').exists()
    folder = prune_checkpoint(original, tmp_path / 'p', plan, repair=lambda *fs: repair_folder(*fs, batch))
    known = repair(apply_plan(teacher, plan), teacher, batch)
    assert distance(load_lvlm(folder), known, batch) < 1e-5


def test_bad_input_leaves_the_folder_as_it_was(models, tmp_path):
    teacher = models['tied']
    student = apply_plan(teacher, PLANS['layers'](teacher))
    original, pruned = save_lvlm(teacher, tmp_path / 'o'), save_lvlm(student, tmp_path / 'p')
    before = (pruned / 'model.safetensors').read_bytes()
    with pytest.raises(ValueError, match='without a ridge'):
        repair_folder(original, pruned, calibration(teacher, 2, 12), ridge=0)
    assert (pruned / 'model.safetensors').read_bytes() == before


def test_the_command_repairs(tmp_path):
    from lvlm_study.study.cli import lvlm_prune

    lvlm = load_lvlm('tiny-llava')
    (tmp_path / 'plan.json').write_text(Plan.of(lvlm, layers=[i for i in range(12) if i not in (4, 5)]).to_json())
    options = dict(plan=tmp_path / 'plan.json')
    lvlm_prune('tiny-llava', tmp_path / 'plain', **options)
    result = lvlm_prune('tiny-llava', tmp_path / 'repaired', repair=True, samples=8, **options)
    plain, repaired = (load_lvlm(tmp_path / name).model for name in ('plain', 'repaired'))
    assert result['repaired_on'] == 8 and 'repaired_on' not in lvlm_prune('tiny-llava', 'x', dry_run=True, **options)
    changed = [n for (n, p), q in zip(plain.named_parameters(), repaired.parameters()) if not torch.equal(p, q)]
    assert changed and all(n.endswith(('o_proj.weight', 'down_proj.weight')) for n in changed)
