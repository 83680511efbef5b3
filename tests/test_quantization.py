"Quantizers: bytes counted on tensors, errors where nothing happens, and real packages where they are installed."

import numpy as np
import pytest
import torch
from test_costs import CONFIGS
from test_engines import small
from lvlm_study.core.store import read_rows
from lvlm_study.efficiency.llama_cpp import EngineMissing
from lvlm_study.efficiency.onnx_files import engine_version
from lvlm_study.efficiency.quantization import QUANTIZERS, check_smaller, next_token_nats, perplexity_ratio
from lvlm_study.efficiency.quantization import quantization_results, quantization_runs, quantize, weight_bytes
from lvlm_study.models.loading import load_lvlm

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
    assert 0.8 < saved <= 1.001 if '8' in kind else 1.3 < saved < 1.5
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
    assert set(read_rows('quantization')) <= known and len(known) == 41
    whole = quantization_results().query("method == 'none'").set_index('kind')
    assert whole.megabytes['int8'] < whole.megabytes['bfloat16'] and whole.near['int8'] < 1.02 * whole.near['bfloat16']
