"Models of many types, small and random: described, pruned, saved and loaded, or refused by what was found in them."

import pytest
import torch
import lvlm_study.pruning.model_types as probing
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from lvlm_study.models.architecture import find_architecture
from lvlm_study.models.random_models import random_model
from lvlm_study.core.store import read_rows
from lvlm_study.pruning.model_types import (
    TEXT_ONLY_TYPES,
    check_roundtrip,
    last_hidden_states,
    model_type_table,
    model_types,
    probe_architecture,
    probe_metrics,
    reinit_weights,
    zero_pruned,
)
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm
from lvlm_study.pruning.plan import Plan

PRUNED = [
    'llava',
    'llava_next',
    'llava_onevision',
    'vipllava',
    'internvl',
    'qwen3_vl',
    'smolvlm',
    'idefics3',
    'paligemma',
    'gemma3',
    'mistral3',
    'aya_vision',
    'got_ocr2',
    'ovis2',
    'granite4_vision',
    'cohere2_vision',
]
PARTLY = {
    'qwen2_vl': 'channels alone',
    'qwen2_5_vl': 'channels alone',
    'glm4v': 'channels alone',
    'idefics2': 'heads alone',
    'blip-2': 'no',
    'chameleon': 'no',
}
REFUSED = dict(
    aria='is a mixture of experts, mlp.experts',
    qwen3_vl_moe='is a mixture of experts, mlp.experts',
    llama4='is a mixture of experts, feed_forward.experts',
    mllama='is a hybrid: its layers are MllamaSelfAttentionDecoderLayer and MllamaCrossAttentionDecoderLayer',
    lfm2_vl='mixes tokens by a convolution, conv.conv',
    idefics='holds layers (IdeficsDecoderLayer) and gated_cross_attn_layers (IdeficsGatedCrossAttentionLayer)',
    qwen3_5='mixes tokens by a convolution, linear_attn.conv1d',
    t5gemma2='is an encoder-decoder',
    fuyu='no attention is made of self_attn.query_key_value',
)
TEXT_ONLY = ['llama', 'phi3', 'opt', 'mixtral']
FEW = [*PRUNED, *PARTLY, *REFUSED, *TEXT_ONLY]


@pytest.fixture(scope='module')
def stored():
    return model_type_table()


def test_every_type_is_in_the_table(stored):
    assert set(stored.index) == set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | set(TEXT_ONLY_TYPES) and set(
        FEW
    ) <= set(stored.index)
    assert not [r['run'] for r in read_rows('model_types').values() if 'text' not in r]


def test_what_the_table_says(stored):
    assert all(stored.layers[t] == stored.width[t] == 'yes' for t in PRUNED) and len(PRUNED) + len(PARTLY) >= 20
    assert {t: stored.width[t] for t in PARTLY} == PARTLY and all(stored.layers[t] == 'yes' for t in PARTLY)
    assert all(says in stored.why[t] and stored.found[t] == 'no' for t, says in REFUSED.items())
    assert (stored.layers == 'yes').sum() >= 40 and (stored.found == 'yes').sum() >= 40
    assert 'timm' in stored.why['fast_vlm'] and stored.found['fast_vlm'] == 'not tried'
    silent = stored[
        (stored.found.isin(['no', 'not tried'])) | (stored.layers == 'no') | ~stored.width.isin(['yes', ''])
    ]
    assert (silent.why != '').all()  # nothing is refused without a reason


@pytest.mark.parametrize('t', FEW)
def test_the_table_is_what_comes_out(stored, t):
    assert probe_architecture(t) == stored.loc[t].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize('t', [t for t in model_types() if t not in FEW])
def test_the_rest_of_the_table(stored, t):
    assert probe_architecture(t) == stored.loc[t].to_dict()


def test_a_row_counts():
    row = probe_metrics(dict(found='yes', layers='yes', width='channels alone'))
    assert row['metrics'] == dict(tried=1, described=1, layers=1, width=0) and row['text']['width'] == 'channels alone'


# --- the trial can fail -------------------------------------------------------------------------------------------


@pytest.fixture
def phi():
    return LVLM(reinit_weights(random_model('phi')), name='phi')


def test_a_wrong_cut_is_seen(phi, tmp_path, monkeypatch):
    plan = Plan.of(phi, kv_heads={b: [1] for b in range(3)}, mlp_channels={b: range(0, 48, 2) for b in range(3)})
    assert check_roundtrip(phi, plan, tmp_path / 'right') == ''
    other = Plan.of(phi, kv_heads={b: [0] for b in range(3)}, mlp_channels={b: range(0, 48, 2) for b in range(3)})
    cut = probing.apply_plan
    monkeypatch.setattr(probing, 'apply_plan', lambda lvlm, plan: cut(lvlm, other))
    assert 'are off by' in check_roundtrip(phi, plan, tmp_path / 'wrong')


def test_a_trial_without_effect_is_seen(phi, tmp_path):
    for b in phi.layers:
        b.get_submodule(phi.architecture.mlp['down']).weight.data.zero_()
    assert 'changes nothing' in check_roundtrip(
        phi, Plan.of(phi, mlp_channels={b: range(24) for b in range(3)}), tmp_path / 'x'
    )


def test_zeroing_leaves_the_original_alone(phi):
    before = {k: v.clone() for k, v in phi.model.state_dict().items()}
    a = phi.architecture
    quiet = zero_pruned(phi, Plan.of(phi, layers=[0, 2]))
    got, want = last_hidden_states(quiet, a.lm), last_hidden_states(phi.model, a.lm)
    assert all(torch.equal(v, before[k]) for k, v in phi.model.state_dict().items()) and (got - want).abs().max() > 0.1


# --- what load_lvlm says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('t', ['aria', 'mllama', 'lfm2_vl'])
def test_loading_refuses_in_one_sentence(tmp_path, t):
    random_model(t).save_pretrained(tmp_path / 'm')
    with pytest.raises(ValueError, match=r'is (no ordinary layer|a hybrid): ') as e:
        load_lvlm(tmp_path / 'm')
    assert REFUSED[t] in str(e.value) and '\n' not in str(e.value)


def test_a_model_that_is_neither_is_refused(tmp_path):
    CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / 'eye'
    )
    with pytest.raises(ValueError, match='clip_vision_model writes no words'):
        load_lvlm(tmp_path / 'eye')


def test_maps_that_are_no_linear_maps(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=32)).save_pretrained(
        tmp_path / 'gpt'
    )
    with pytest.raises(ValueError, match='GPT2Model|GPT2Block'):
        load_lvlm(tmp_path / 'gpt')


def test_plain_language_models_load(tmp_path):
    model = reinit_weights(random_model('llama'))
    model.save_pretrained(tmp_path / 'words')
    lvlm = load_lvlm(tmp_path / 'words')
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        assert torch.equal(lvlm.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (lvlm.architecture.vision, lvlm.architecture.projector, lvlm.processor) == (
        '',
        '',
        None,
    ) and find_architecture(model) == lvlm.architecture


@pytest.mark.parametrize('t', ['qwen2_5_vl', 'internvl'])
def test_the_whole_model_too(tmp_path, t):
    reinit_weights(random_model(t)).save_pretrained(tmp_path / 'm')
    lvlm = load_lvlm(tmp_path / 'm')
    ids = torch.arange(8, 20)[None]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / 'm').eval()
    with torch.no_grad():
        assert torch.equal(lvlm.model(input_ids=ids).logits, stock(input_ids=ids).logits)
