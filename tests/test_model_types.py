"Models of many types, small and random: described, pruned, saved and loaded, or refused by what was found in them."
import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from lvlm_study.anatomy import find_anatomy, tiny_model
from lvlm_study.core import read_rows
from lvlm_study.model_types import PLAIN, counted, model_types, shaken, silent, states, survey, tried, type_table
from lvlm_study.models import LVLM, load_lvlm
from lvlm_study.plans import plan_of

PRUNED = ['llava', 'llava_next', 'llava_onevision', 'vipllava', 'internvl', 'qwen3_vl', 'smolvlm', 'idefics3', 'paligemma', 'gemma3', 'mistral3', 'aya_vision', 'got_ocr2', 'ovis2',
    'granite4_vision', 'cohere2_vision']
NARROWER = {'qwen2_vl': 'channels alone', 'qwen2_5_vl': 'channels alone', 'glm4v': 'channels alone', 'idefics2': 'heads alone', 'blip-2': 'no', 'chameleon': 'no'}
REFUSED = dict(aria='is a mixture of experts, mlp.experts', qwen3_vl_moe='is a mixture of experts, mlp.experts', llama4='is a mixture of experts, feed_forward.experts',
    mllama='is a hybrid: its blocks are MllamaSelfAttentionDecoderLayer and MllamaCrossAttentionDecoderLayer', lfm2_vl='mixes tokens by a convolution, conv.conv',
    idefics='holds layers (IdeficsDecoderLayer) and gated_cross_attn_layers (IdeficsGatedCrossAttentionLayer)', qwen3_5='mixes tokens by a convolution, linear_attn.conv1d',
    t5gemma2='is an encoder-decoder', fuyu='no attention is made of self_attn.query_key_value')
WITHOUT_EYES = ['llama', 'phi3', 'opt', 'mixtral']
FEW = [*PRUNED, *NARROWER, *REFUSED, *WITHOUT_EYES]

@pytest.fixture(scope='module')
def stored(): return type_table()

def test_every_type_is_in_the_table(stored):
    assert set(stored.index)==set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)|set(PLAIN) and set(FEW)<=set(stored.index)
    assert not [r['run'] for r in read_rows('model_types').values() if 'text' not in r]

def test_what_the_table_says(stored):
    assert all(stored.layers[t]==stored.width[t]=='yes' for t in PRUNED) and len(PRUNED)+len(NARROWER)>=20
    assert {t: stored.width[t] for t in NARROWER}==NARROWER and all(stored.layers[t]=='yes' for t in NARROWER)
    assert all(says in stored.why[t] and stored.found[t]=='no' for t,says in REFUSED.items())
    assert (stored.layers=='yes').sum()>=40 and (stored.found=='yes').sum()>=40
    assert 'timm' in stored.why['fast_vlm'] and stored.found['fast_vlm']=='not tried'
    silent = stored[(stored.found.isin(['no', 'not tried'])) | (stored.layers=='no') | ~stored.width.isin(['yes', ''])]
    assert (silent.why!='').all()                                                          # nothing is refused without a reason

@pytest.mark.parametrize('t', FEW)
def test_the_table_is_what_comes_out(stored, t):
    assert survey(t)==stored.loc[t].to_dict()

@pytest.mark.slow
@pytest.mark.parametrize('t', [t for t in model_types() if t not in FEW])
def test_the_rest_of_the_table(stored, t): assert survey(t)==stored.loc[t].to_dict()

def test_a_row_counts():
    row = counted(dict(found='yes', layers='yes', width='channels alone'))
    assert row['metrics']==dict(tried=1, described=1, layers=1, width=0) and row['text']['width']=='channels alone'

# --- the trial can fail -------------------------------------------------------------------------------------------

@pytest.fixture
def phi(): return LVLM(shaken(tiny_model('phi')), name='phi')

def test_a_wrong_cut_is_seen(phi, tmp_path, monkeypatch):
    plan = plan_of(phi, heads={b: [1] for b in range(3)}, channels={b: range(0, 48, 2) for b in range(3)})
    assert tried(phi, plan, tmp_path/'right')==''
    import lvlm_study.model_types as mt
    other = plan_of(phi, heads={b: [0] for b in range(3)}, channels={b: range(0, 48, 2) for b in range(3)})
    cut = mt.apply_plan; monkeypatch.setattr(mt, 'apply_plan', lambda lvlm, plan: cut(lvlm, other))
    assert 'are off by' in tried(phi, plan, tmp_path/'wrong')

def test_a_trial_without_effect_is_seen(phi, tmp_path):
    for b in phi.blocks: b.get_submodule(phi.anatomy.mlp['down']).weight.data.zero_()
    assert 'changes nothing' in tried(phi, plan_of(phi, channels={b: range(24) for b in range(3)}), tmp_path/'x')

def test_silent_leaves_the_original_alone(phi):
    before = {k: v.clone() for k,v in phi.model.state_dict().items()}; a = phi.anatomy
    quiet = silent(phi, plan_of(phi, blocks=[0, 2])); got,want = states(quiet, a.lm), states(phi.model, a.lm)
    assert all(torch.equal(v, before[k]) for k,v in phi.model.state_dict().items()) and (got-want).abs().max()>.1

# --- what load_lvlm says --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('t', ['aria', 'mllama', 'lfm2_vl'])
def test_loading_refuses_in_one_sentence(tmp_path, t):
    tiny_model(t).save_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match=r'is (no ordinary block|a hybrid): ') as e: load_lvlm(tmp_path/'m')
    assert REFUSED[t] in str(e.value) and '\n' not in str(e.value)

def test_a_model_that_is_neither_is_refused(tmp_path):
    CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path/'eye')
    with pytest.raises(ValueError, match='clip_vision_model writes no words'): load_lvlm(tmp_path/'eye')

def test_maps_that_are_no_linear_maps(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=32)).save_pretrained(tmp_path/'gpt')
    with pytest.raises(ValueError, match='GPT2Model|GPT2Block'): load_lvlm(tmp_path/'gpt')

def test_plain_language_models_load(tmp_path):
    model = shaken(tiny_model('llama')); model.save_pretrained(tmp_path/'words'); lvlm = load_lvlm(tmp_path/'words'); ids = torch.arange(8, 20)[None]
    with torch.no_grad(): assert torch.equal(lvlm.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (lvlm.anatomy.vision, lvlm.anatomy.projector, lvlm.processor)==('', '', None) and find_anatomy(model)==lvlm.anatomy

@pytest.mark.parametrize('t', ['qwen2_5_vl', 'internvl'])
def test_the_whole_model_too(tmp_path, t):
    shaken(tiny_model(t)).save_pretrained(tmp_path/'m'); lvlm = load_lvlm(tmp_path/'m'); ids = torch.arange(8, 20)[None]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path/'m').eval()
    with torch.no_grad(): assert torch.equal(lvlm.model(input_ids=ids).logits, stock(input_ids=ids).logits)
