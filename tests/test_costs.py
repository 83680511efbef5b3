"Closed forms of parameters, bytes and operations against tensors and torch's own counter; estimates of jobs."

import math
from dataclasses import replace
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPConfig, CLIPVisionConfig, GPT2Config
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig
from transformers import MistralConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.efficiency.costs import config_costs, config_parameters, estimate_cost, estimate_recovery, image_patches
from lvlm_study.efficiency.costs import kv_cache_bytes, load_meta, matmul_speed, mean_tokens, take_rows
from lvlm_study.pruning.plan import engine_multiple, odd_width_note
from lvlm_study.pruning.width_pruning import default_multiple, legal_widths
from lvlm_study.recovery.losses import recovery_settings

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=101)
CONFIGS = dict(
    llama=LlamaConfig(**SIZES, num_key_value_heads=2),
    tied=LlamaConfig(**SIZES, tie_word_embeddings=True),
    biased=LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    long_heads=MistralConfig(**SIZES, num_key_value_heads=2, head_dim=32),
    qwen2=Qwen2Config(**SIZES, num_key_value_heads=1),
    qwen3=Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=24),
    phi=PhiConfig(**SIZES),
    phi3=Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    normed_phi=PhiConfig(**SIZES, qk_layernorm=True),
    window=MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    wide_window=MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=64),
    some_windows=Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
)
CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CLIP |= dict(image_size=32, patch_size=8)
TILES = CLIP | dict(image_size=[32, 32], patch_size=[8, 8])
TEXT = LlamaConfig(**SIZES)


def llava(vision=None, **options):
    return LlavaConfig(vision_config=vision or CLIPVisionConfig(**CLIP), text_config=TEXT, **options)


def tiled(**options):
    return InternVLConfig(vision_config=InternVLVisionConfig(**TILES | options), text_config=TEXT)


LVLM_CONFIGS = dict(
    llava=llava(),
    no_bias=llava(multimodal_projector_bias=False),
    two_layers=llava(vision_feature_layer=[-1, -2]),
    all_rows=llava(vision_feature_select_strategy='full'),
    siglip=llava(SiglipVisionConfig(**CLIP, vision_use_head=False)),
    full_siglip=llava(SiglipVisionConfig(**CLIP, vision_use_head=False), vision_feature_select_strategy='full'),
    tiled=tiled(),
    biased_tiles=tiled(attention_bias=True),
    normed_tiles=tiled(use_qk_norm=True),
)
NO_FORM = dict(
    head=(llava(SiglipVisionConfig(**CLIP)), 'vision_use_head is to be False'),
    llava_next=(LlavaNextConfig(vision_config=CLIPVisionConfig(**CLIP), text_config=TEXT), 'for a llava_next'),
    no_positions=(tiled(use_absolute_position_embeddings=False), 'use_absolute_position_embeddings=False'),
    norm=(tiled(use_mean_pooling=False), 'use_mean_pooling=False'),
)


def blank_picture(config):
    side = config.vision_config.image_size
    return torch.zeros(1, 3, *(side if isinstance(side, (list, tuple)) else (side, side)))


@pytest.mark.parametrize('config', LVLM_CONFIGS.values(), ids=LVLM_CONFIGS)
def test_parameters_and_operations_with_a_picture(config):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert config_parameters(config)['total'] == sum(p.numel() for p in model.parameters())
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as looking:
        model.model.get_image_features(pixel_values=blank_picture(config))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as reading:
        model(input_ids=torch.arange(5, 28)[None], logits_to_keep=1)
    costs = config_costs(config, 23, itemsize=4).prefill_flop
    assert costs[['vision encoder', 'projector']].sum() == looking.get_total_flops()
    assert costs['total'] == looking.get_total_flops() + reading.get_total_flops()


def test_a_picture_need_not_be_square():
    config = tiled(image_size=[32, 48], patch_size=[8, 4])
    with torch.device('meta'):
        model = AutoModelForImageTextToText.from_config(config)
    assert config_parameters(config)['total'] == sum(p.numel() for p in model.parameters())
    assert image_patches(config) == 4 * 12


@pytest.mark.parametrize('config, says', NO_FORM.values(), ids=NO_FORM)
def test_a_setting_without_a_closed_form_is_named(config, says):
    for call in (config_parameters, lambda config: config_costs(config, 9)):
        with pytest.raises(ValueError, match=says):
            call(config)


WRONG_COUNTS = [dict(tokens=n) for n in (-5, 0, 'a', 0.5, math.inf, math.nan, True, None, np.float64(9.5))]
WRONG_COUNTS += [dict(images=-1), dict(images=0.5), dict(batch=0), dict(batch=2.5)]
WRONG_COUNTS += [dict(itemsize=0), dict(itemsize='2')]


@pytest.mark.parametrize('counts', WRONG_COUNTS, ids=str)
def test_counts_that_count_nothing(counts):
    with pytest.raises(ValueError, match=f'{next(iter(counts))} is a (whole )?number') as e:
        config_costs(CONFIGS['llama'], **(dict(tokens=9) | counts))
    assert '\n' not in str(e.value)


def test_whole_numbers_of_any_type_count():
    a, *others = (config_costs(CONFIGS['llama'], n, batch=n) for n in (9, 9.0, np.int64(9), np.float64(9)))
    assert all(a.equals(b) and (a.dtypes == b.dtypes).all() for b in others)


@pytest.mark.parametrize('tokens', [10**13, 10**30, 1e300])
def test_costs_that_no_table_holds(tokens):
    with pytest.raises(ValueError, match=r'cost 2\*\*63 or more: give fewer tokens or prompts') as e:
        config_costs(CONFIGS['llama'], tokens)
    assert '\n' not in str(e.value)
    assert (config_costs(CONFIGS['llama'], 10**6, batch=1000) >= 0).all(axis=None)


@pytest.mark.parametrize('config', LVLM_CONFIGS.values(), ids=LVLM_CONFIGS)
def test_a_picture_needs_room_in_its_prompt(config):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.inference_mode():
        found = model.model.get_image_features(pixel_values=blank_picture(config)).pooler_output
    n = sum(len(rows) for rows in found) if isinstance(found, (list, tuple)) else found.shape[:-1].numel()
    assert config_costs(config, n, images=1).prefill_flop['projector'] > 0
    assert config_costs(config, n).equals(config_costs(config, n, images=1))
    assert config_costs(config, n - 1).equals(config_costs(config, n - 1, images=0))
    for images, says in ((1, f'a picture has at least {n} tokens'), (2, f'2 pictures have at least {2 * n} tokens')):
        with pytest.raises(ValueError, match=f'{says}, so tokens cannot be {images * n - 1}'):
            config_costs(config, images * n - 1, images=images)


@pytest.mark.parametrize('call', [config_parameters, lambda c: kv_cache_bytes(c, 9), lambda c: config_costs(c, 9)])
def test_what_has_no_such_costs(call):
    cases = [('tiny-llava', "not of 'tiny-llava'"), (None, 'not of None'), (SIZES, 'not of a dict')]
    cases += [(CLIPConfig(), 'a clip holds no language model'), (GPT2Config(), 'no closed form for a gpt2')]
    for config, says in cases:
        with pytest.raises(ValueError, match=says) as e:
            call(config)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('tokens', [-3, '3', 0.5, math.inf, None])
def test_a_cache_of_no_number_of_tokens(tokens):
    with pytest.raises(ValueError, match='tokens is a whole number from 0 on, not ') as e:
        kv_cache_bytes(CONFIGS['llama'], tokens)
    assert '\n' not in str(e.value) and kv_cache_bytes(CONFIGS['llama'], 0) == 0


def test_a_model_without_weights_is_named():
    for source in (None, 3, ['tiny-llava']):
        with pytest.raises(ValueError, match='given by its name, a folder or a hub id, not by'):
            load_meta(source)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_parameters_operations_and_cache(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    n, ids = 13, torch.arange(5, 31).view(2, 13)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as prefill:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = sum(t.numel() * t.element_size() for a in out.past_key_values.layers for t in (a.keys, a.values))
        with FlopCounterMode(display=False) as decode:
            model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    costs = config_costs(config, n, batch=2, itemsize=4)
    assert config_parameters(config)['total'] == sum(p.numel() for p in model.parameters())
    assert costs.loc['total', 'bytes'] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert costs.loc['total', 'prefill_flop'] == prefill.get_total_flops()
    assert costs.loc['total', 'decode_flop'] == decode.get_total_flops()
    assert kv_cache_bytes(config, n, batch=2, itemsize=4) == cache


def test_bytes_read_for_a_word():
    tied, own = (config_costs(CONFIGS[name], 9) for name in ('tied', 'llama'))
    head = 2 * 101 * 64
    assert tied.decode_bytes['head'] == own.decode_bytes['head'] == head
    assert own.decode_bytes['embeddings'] == 0
    assert own.decode_bytes['attention scores'] == kv_cache_bytes(CONFIGS['llama'], 10)


def test_default_multiples():
    widths = (11008, 1536, 1024, 1023, 576, 512, 511, 384, 48)
    assert [default_multiple(n) for n in widths] == [64] * 3 + [32] * 3 + [1] * 3
    for n in (11008, 10240, 8192, 1536, 1500, 576):
        widths = legal_widths(n)
        assert widths[0] == n and len(widths) >= 16 and not any(w % 32 for w in widths[1:])


def test_what_engines_ask_for():
    assert engine_multiple('llama.cpp K-quants') == engine_multiple('LLAMA.CPP k-quants') == 256
    assert engine_multiple('onnxruntime') == engine_multiple('openvino') == 1
    with pytest.raises(ValueError, match="not 'vllm'"):
        engine_multiple('vllm')
    assert odd_width_note([64, 96]) == '' and '70 to 75' in odd_width_note([64, 75, 70])


def test_the_runner_asks_for_the_widths_of_stored_rows(monkeypatch):
    from lvlm_study.core.store import Run
    from lvlm_study.study import runner

    asked = []
    monkeypatch.setattr(runner, 'width_plan', lambda *a, **k: asked.append(k['multiple']))
    for width in (576, 2048):
        scores = type('Scores', (), dict(sizes=dict(mlp_channels=width)))
        monkeypatch.setattr(runner, 'run_scores', lambda run, scores=scores: scores)
        runner.plan_for_run(Run('width_pruning', method='width', ratio=0.3, criterion='taylor'), None)
    assert asked == [1, 64]


@pytest.fixture(scope='module')
def light():
    return load_meta('tiny-llava')


@pytest.fixture(scope='module')
def samples():
    return instructions('recovery', 4)


PASSES = [('passes', value) for value in (-1, math.nan, math.inf, 'a', None, True)] + [('vision_passes', -3)]
ESTIMATE_ERRORS = {
    f'{name} {value}': (lambda m, s, o={name: value}: estimate_cost(m, s, **dict(passes=1) | o), f'{name} is a number')
    for name, value in PASSES
}
ESTIMATE_ERRORS |= {
    'device': (lambda m, s: estimate_cost(m, s, 1, device='gpu'), "a device is such as 'cpu' or 'cuda', not 'gpu'"),
    'meta': (lambda m, s: estimate_cost(m, s, 1, device='meta'), "on the device 'meta': its tensors hold no numbers"),
    'no samples': (lambda m, s: estimate_cost(m, s.select([]), 1), 'the data set holds no samples'),
    'samples': (lambda m, s: estimate_cost(m, 'small', 1), "a datasets.Dataset, .* not 'small'"),
    'model': (lambda m, s: estimate_cost('tiny-llava', s, 1), 'a model is loaded first'),
    'no sample of mean': (lambda m, s: mean_tokens(m, s, 0), 'n is a whole number from 1 on, not 0'),
    'mean of none': (lambda m, s: mean_tokens(m, s.select([])), 'the data set holds no samples'),
    'n': (lambda m, s: matmul_speed(n=0), 'n is a whole number from 1 on, not 0'),
    'seconds': (lambda m, s: matmul_speed(seconds=math.nan), 'seconds is a number from 0 on, not nan'),
    'matrix on meta': (lambda m, s: matmul_speed(device='meta'), 'no product can be timed'),
}
ESTIMATE_ERRORS |= {
    f'rows {n}': (lambda m, s, n=n: take_rows(s, n), f'a whole number of samples, 0 for all, not {n!r}')
    for n in (2.5, '3', math.nan, -1, None, True)
}


@pytest.mark.parametrize('case', ESTIMATE_ERRORS)
def test_estimates_are_refused_in_a_sentence(light, samples, case):
    call, says = ESTIMATE_ERRORS[case]
    with pytest.raises(ValueError, match=says) as e:
        call(light, samples)
    assert '\n' not in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there(light, samples):
    for call in (lambda: estimate_cost(light, samples, 1, device='cuda'), lambda: matmul_speed(device='cuda')):
        with pytest.raises(ValueError, match="there is no CUDA device here for device='cuda'"):
            call()


def test_estimates_that_are_legal(light, samples):
    assert len(take_rows(samples, 0)) == len(take_rows(samples, 9)) == 4 and len(take_rows(samples, np.int64(3))) == 3
    assert estimate_cost(light, samples, 0, 0)['teraflop'] == 0 < matmul_speed(n=8, seconds=0)


TEACHERS = {
    'other family': ('tiny-bunny', 'sft+hidden', 'different vocabularies'),
    'tiles': ('tiny-internvl', 'kl', 'different vocabularies'),
    'none': ('', 'sft+hidden', "learning from hidden needs a teacher: name the original model, not ''"),
    'no name': (None, 'kl', 'learning from kl needs a teacher: .* not None'),
}


@pytest.mark.parametrize('case', TEACHERS)
def test_a_teacher_that_does_not_fit_is_not_priced(samples, case):
    teacher, recipe, says = TEACHERS[case]
    with pytest.raises(ValueError, match=says) as e:
        estimate_recovery('tiny-llava', teacher, samples, recovery_settings(recipe))
    assert '\n' not in str(e.value)


def test_a_recovery_is_priced_with_a_teacher_that_fits(samples):
    settings = recovery_settings('sft+hidden')
    both = estimate_recovery('tiny-llava', 'tiny-llava', samples, settings)
    alone = estimate_recovery('tiny-llava', '', samples, replace(settings, hidden_weight=0))
    assert math.isclose(both['weights_GB'], 2 * alone['weights_GB']) and both['teraflop'] > alone['teraflop']
    for rows, recipe, says in ((samples.select([]), settings, 'no samples'), (samples, 'sft', "not 'sft'")):
        with pytest.raises(ValueError, match=says):
            estimate_recovery('tiny-llava', 'tiny-llava', rows, recipe)


def test_another_vision_encoder_is_seen_without_weights(samples, monkeypatch):
    from lvlm_study.efficiency import costs

    def load(name):
        lvlm = load_meta('tiny-llava')
        if name == 'other':
            vision = lvlm.part('vision')
            name, p = next(iter(vision.named_parameters()))
            owner, _, leaf = name.rpartition('.')
            setattr(vision.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty(*p.shape, 2, device='meta')))
        return lvlm

    monkeypatch.setattr(costs, 'load_meta', load)
    with pytest.raises(ValueError, match='the vision encoder of the teacher is another one'):
        estimate_recovery('tiny-llava', 'other', samples, recovery_settings('kl'))
