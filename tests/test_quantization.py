"Quantizers: bytes counted on tensors, errors where nothing happens, and real packages where they are installed."

import copy
from dataclasses import replace
import numpy as np
import pytest
import torch
from test_costs import CONFIGS
from test_engines import small
from lvlm_study.core.store import Run, read_rows
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.efficiency.engines import export
from lvlm_study.efficiency.llama_cpp import EngineMissing
from lvlm_study.efficiency.onnx_files import engine_version
from lvlm_study.efficiency.quantization import QUANTIZERS, check_smaller, make_dense, next_token_nats
from lvlm_study.efficiency.quantization import perplexity_ratio, pruned_for, quantization_results
from lvlm_study.efficiency.quantization import quantization_runs, quantize, suite_quantization_runs
from lvlm_study.efficiency.quantization import text_pieces, train_on_text, weight_bytes
from lvlm_study.evaluation.evaluate import answer_batch
from lvlm_study.importance.importance import score
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.repair import repair
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.recovery.recovery import recover

PACKAGE_KINDS = {kind: package for kind, (package, _, _) in QUANTIZERS.items()}


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-llava', torch.bfloat16)


@pytest.mark.parametrize('kind', QUANTIZERS)
def test_a_model_gets_smaller_and_stays_near(lvlm, kind):
    package = PACKAGE_KINDS[kind]
    if package and not engine_version(package):
        with pytest.raises(EngineMissing, match=package):
            quantize(lvlm, kind)
        pytest.skip(f'{package} is not installed')
    before = {k: v.clone() for k, v in lvlm.model.state_dict().items()}
    ids = torch.arange(5, 37)[None]
    small_one = quantize(lvlm, kind)
    with torch.inference_mode():
        a, b = (m.model(input_ids=ids).logits.float() for m in (lvlm, small_one))
    assert 0 < (a - b).abs().mean() < 0.2 * a.abs().mean()
    maps = sum(p.numel() for n, p in lvlm.layers.named_parameters() if 'norm' not in n)
    saved = (weight_bytes(lvlm) - weight_bytes(small_one)) / maps
    # int4 takes a byte a weight on a CPU
    assert 0.8 < saved <= 1.001 if '8' in kind or kind == 'int4' else 1.3 < saved < 1.5
    assert all(torch.equal(v, before[k]) for k, v in lvlm.model.state_dict().items())


@pytest.mark.parametrize('kind', ['int8', 'Q8_0'])
def test_a_tied_head_stays_tied(kind):
    if PACKAGE_KINDS[kind] and not engine_version(PACKAGE_KINDS[kind]):
        pytest.skip(f'{PACKAGE_KINDS[kind]} is not installed')
    tied = small('tied')
    done = quantize(tied, kind)
    assert done.model.get_output_embeddings().weight is done.model.get_input_embeddings().weight
    assert weight_bytes(done) < weight_bytes(tied) == 4 * sum(p.numel() for p in tied.model.parameters())


def test_a_quantizer_that_did_nothing_is_an_error(lvlm, monkeypatch):
    from lvlm_study.efficiency import quantization

    monkeypatch.setitem(quantization.QUANTIZERS, 'lazy', ('', lambda lvlm, option: None, ''))
    with pytest.raises(ValueError, match='lazy made .* it did nothing'):
        quantize(lvlm, 'lazy')
    with pytest.raises(ValueError, match='copied what was shared'):
        check_smaller(10, 12, 'int8')
    with pytest.raises(ValueError, match='a quantizer is one of'):
        quantize(lvlm, 'int3')


@pytest.mark.parametrize('kind', ['int4', 'Q8_0', 'Q4_0'])
def test_groups_refuse_odd_widths(kind):
    if PACKAGE_KINDS[kind] and not engine_version(PACKAGE_KINDS[kind]):
        pytest.skip(f'{PACKAGE_KINDS[kind]} is not installed')
    one = small('llama')
    odd = apply_plan(one, Plan.of(one, mlp_channels={0: range(45)}))
    with pytest.raises(ValueError, match=f'{kind} stores rows in groups of 32, and .* has rows of 45'):
        quantize(odd, kind)


def test_a_quantized_copy_is_refused_until_it_is_plain(tmp_path):
    one = small('llama')
    copy = quantize(one, 'Q8_0')
    for call in (
        lambda: apply_plan(copy, Plan.of(one, [0])),
        lambda: save_lvlm(copy, tmp_path / 'm'),
        lambda: quantize(copy, 'Q4_0'),
    ):
        with pytest.raises(ValueError, match='a copy with Q8_0 weights is there to run'):
            call()
    assert not list(tmp_path.iterdir()) and apply_plan(one, Plan.of(one, [0])).architecture.num_layers == 1
    plain = make_dense(copy)
    assert weight_bytes(plain) == 4 * sum(p.numel() for p in one.model.parameters())
    assert apply_plan(plain, Plan.of(one, [0])).architecture.num_layers == 1


@pytest.mark.parametrize('given, says', [('x', "give load_lvlm\\('x'\\)"), (None, 'not a NoneType')])
def test_only_a_model_is_made_dense(given, says):
    with pytest.raises(ValueError, match=says) as e:
        make_dense(given)
    assert '\n' not in str(e.value)


def test_lines_of_draws_are_told_apart():
    found = quantization_results()
    assert not found.duplicated(['model', 'method', 'target_ratio', 'recipe', 'seed', 'kind']).any()
    assert found.duplicated(['model', 'method', 'target_ratio', 'recipe', 'kind']).any()


def test_nf4_refuses_odd_widths():
    if not engine_version('bitsandbytes'):
        pytest.skip('bitsandbytes is not installed')
    with pytest.raises(ValueError, match='from 96 to 64'):
        quantize(small('llama'), 'nf4')


def test_nats_are_cross_entropy():
    one = small('llama')
    ids = torch.arange(5, 65).view(6, 10)
    with torch.inference_mode():
        want = [float(one.model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    assert np.allclose(next_token_nats(one, ids), want, atol=1e-5)
    assert CONFIGS['llama'].vocab_size == one.part('head').out_features


def test_intervals_are_paired():
    a, b = (dict(curves=dict(near=[x + d for x in (1.0, 5.0, 9.0)])) for d in (0.5, 0.0))
    assert np.allclose(perplexity_ratio(a, b), np.exp(0.5))


def test_stored_rows_belong_to_the_comparison():
    known = {run.key for run in quantization_runs('SmolLM2-135M')}
    assert len(known) == 6 + 6 * 17
    names, kinds = ('tiny-llava', 'tiny-bunny', 'tiny-internvl', 'tiny-gqa', 'smol-llava'), ('int8', 'Q4_0')
    answers = {run.key for name in names for kind in kinds for run in suite_quantization_runs(name, kind)}
    assert set(read_rows('quantization')) <= known | answers and not known & answers
    whole = quantization_results().query("method == 'none'").set_index('kind')
    assert whole.megabytes['int8'] < whole.megabytes['bfloat16'] and whole.near['int8'] < 1.02 * whole.near['bfloat16']


@pytest.mark.parametrize('kind', ['int8', 'int4', 'nf4', 'Q8_0', 'Q4_0'])
def test_dense_weights_are_what_kernels_multiply_by(lvlm, kind):
    if PACKAGE_KINDS[kind] and not engine_version(PACKAGE_KINDS[kind]):
        pytest.skip(f'{PACKAGE_KINDS[kind]} is not installed')
    full, ids = load_lvlm('tiny-llava', torch.float32), torch.arange(5, 37)[None]
    with torch.inference_mode():
        by_kernel = quantize(full, kind).model(input_ids=ids).logits
        dense = make_dense(quantize(full, kind)).model(input_ids=ids).logits
        original = full.model(input_ids=ids).logits
    assert (dense - by_kernel).abs().mean() < 0.1 * (by_kernel - original).abs().mean()
    assert make_dense(quantize(lvlm, kind)).model.dtype == torch.float32


def test_draws_of_text_never_meet_the_tests(lvlm):
    pieces = {
        (kind, seed): {tuple(row) for row in text_pieces(lvlm.tokenizer, kind, 40, seed=seed).tolist()}
        for kind, seed in [('near', 0), ('calibration', 0), ('calibration', 1), ('calibration', 1000)]
    }
    assert all(not pieces['near', 0] & rows for key, rows in pieces.items() if key[0] == 'calibration')
    assert pieces['calibration', 0] != pieces['calibration', 1]


def test_a_short_course_lowers_the_loss_and_keeps_the_shape():
    student, losses = load_lvlm('tiny-gqa', torch.float32), []
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    trained = train_on_text(student, steps=6, losses=losses)
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert {k: v.shape for k, v in trained.model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in student.model.state_dict().items())
    with pytest.raises(ValueError, match='a row is of a model that is none, repaired'):
        pruned_for(student, Run('quantization', method='layer', recipe='sft', ratio=0.3), None)


def row_of(method, kind, megabytes, nats, seed=0, ratio=0.3):
    run = dict(model='x', method=method, recipe='none', purpose=kind, seed=seed)
    run['ratio'] = ratio if method != 'none' else 0.0
    curve = [nats + 0.01 * i for i in range(8)]
    metrics = dict(megabytes=megabytes, near_nats=float(np.mean(curve)), far_nats=float(np.mean(curve)))
    return dict(run=run, metrics=metrics, curves=dict(near=curve, far=curve))


def test_a_rival_is_no_larger_and_a_verdict_needs_three_draws(monkeypatch):
    from lvlm_study.efficiency import budget

    whole = [row_of('none', 'int8', 100, 3.0), row_of('none', 'nf4', 60, 3.4)]
    pruned = [row_of('width', 'int8', 80, 3.2, seed) for seed in range(3)] + [row_of('layer', 'int8', 80, 3.2)]
    pruned += [row_of('layer', 'Q4_0', 50, 5.0)]
    monkeypatch.setattr(budget, 'read_rows', lambda name: dict(enumerate(whole + pruned)))
    cells = budget.quality_cells('x')
    found = budget.against_rivals(cells).set_index(['method', 'kind'])
    assert found.rival['width', 'int8'] == 'nf4' and found.verdict['width', 'int8'] == 'holds'
    assert found.verdict['layer', 'int8'] == 'one seed' and found.verdict['layer', 'Q4_0'] == 'alone'
    assert np.isclose(found.ratio['width', 'int8'], np.exp(-0.2))
    sentence = budget.practitioner_sentence(cells)
    assert 'beat every whole model that is no larger from 80 MB on' in sentence and 'Below 60 MB' in sentence


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_graphs_are_written_in_32_bits_only(tmp_path, engine):
    with pytest.raises(ValueError, match='are written in F32'):
        export('tiny-llava', engine, 'Q8_0', out=tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_no_cache_is_quantized():
    "A quantized cache refuses some numbers of heads: answers are read with the dense one, whatever a model asks for."
    lvlm = load_lvlm('tiny-llava')
    lvlm.model.generation_config.cache_implementation = 'quantized'
    rows = [dict(images=[], messages=[dict(role='user', content='What is this?')])]
    assert answer_batch(lvlm, rows, use_images=False) == answer_batch(load_lvlm('tiny-llava'), rows, use_images=False)


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0'])
def test_a_copy_is_not_trained(lvlm, kind):
    "Trained, its numbers would leave the grid that its name and its bytes speak of."
    copied = quantize(lvlm, kind)
    with pytest.raises(ValueError, match=f'a copy with {kind} weights is there to run'):
        recover(copied, instructions('recovery', 2), 'sft', progress=False)
    with pytest.raises(ValueError, match=f'a copy with {kind} weights is there to run'):
        train_on_text(copied, steps=1)


def test_packed_weights_are_not_read_as_numbers(lvlm):
    packed = replace(lvlm, model=copy.copy(lvlm.model))
    packed.model.quantized_by = 'int8'
    rows = instructions('recovery', 2)
    for work in (lambda: score(packed, rows, 'bi', progress=False), lambda: repair(lvlm, packed, rows, progress=False)):
        with pytest.raises(ValueError, match='a copy with int8 weights is packed: make_dense'):
            work()


def test_numbers_that_are_none_are_named(lvlm):
    broken = replace(lvlm, model=copy.deepcopy(lvlm.model))
    with torch.no_grad():
        broken.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match='mlp.up_proj.weight holds values that are not finite: rounded weights'):
        quantize(broken, 'Q8_0')
