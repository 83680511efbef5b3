"Files for inference engines: their numbers read by others, and real runs where an engine is installed."

import numpy as np
import pytest
import torch
from test_costs import CONFIGS, SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig
from lvlm_study.core.store import read_rows
from lvlm_study.efficiency.engines import check_engine, engine_plans, engine_rules, engine_runs, export, torch_answers
from lvlm_study.efficiency.gguf_files import decode_tensor, encode_tensor, encode_value, file_widths
from lvlm_study.efficiency.gguf_files import gguf_refusal, write_gguf
from lvlm_study.efficiency.llama_cpp import EngineMissing, LlamaCpp, find_llama_cpp
from lvlm_study.efficiency.onnx_files import CachedLM, OnnxModel, empty_cache, write_onnx
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.models.older_layout import releases_that_read
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan

IDS = torch.arange(5, 29)
WRITTEN = ['llama', 'tied', 'biased', 'long_heads', 'qwen2', 'qwen3', 'phi', 'tied_phi', 'phi3']  # Others are refused


def small(name):
    torch.manual_seed(0)
    config = CONFIGS.get(name)
    if name == 'long_heads':  # Mistral's own window is shorter than its context, and files keep none
        config = type(config)(**config.to_dict() | dict(sliding_window=None))
    if name == 'qwen2':  # Several KV heads, so that some can go
        config = type(config)(**config.to_dict() | dict(num_key_value_heads=2))
    if name == 'tied_phi':
        config = PhiConfig(**SIZES, tie_word_embeddings=True)
    return LVLM(AutoModelForCausalLM.from_config(config).eval(), name=name)


def cut(lvlm, how):
    L, H = lvlm.architecture.num_layers, lvlm.architecture.kv_heads
    kept = {i: range(max(1, H // 2)) for i in range(L)}
    plans = dict(
        whole=Plan.of(lvlm),
        layers=Plan.of(lvlm, [0, 2]),
        odd=Plan.of(lvlm, mlp_channels={i: range(43) for i in range(L)}),
        heads=Plan.of(lvlm, kv_heads=kept),
        mixed=Plan.of(lvlm, kv_heads={1: kept[1]}, mlp_channels={0: range(70), 2: range(33)}),
    )
    return apply_plan(lvlm, plans[how])


def logits_of(lvlm):
    with torch.inference_mode():
        return lvlm.model(input_ids=IDS[None]).logits[0].numpy()


@pytest.fixture(scope='module')
def llama_cpp():
    try:
        return find_llama_cpp()
    except EngineMissing as e:
        pytest.skip(f'llama.cpp: {e}')


@pytest.mark.parametrize('how', ['whole', 'layers', 'odd', 'heads', 'mixed'])
@pytest.mark.parametrize('name', WRITTEN)
def test_llama_cpp_computes_the_same(llama_cpp, name, how, tmp_path):
    try:
        lvlm = cut(small(name), how)
    except ValueError as e:
        assert how in ('heads', 'mixed') and 'cannot hold these widths' in str(e)
        return
    assert gguf_refusal(lvlm.config) == ''
    if how == 'heads':
        assert lvlm.architecture.query_heads < small(name).architecture.query_heads
    write_gguf(lvlm, tmp_path / 'x.gguf', 'F32')
    tolerance = 5e-3 if 'phi' in name and name != 'phi3' else 1e-4
    with LlamaCpp(tmp_path / 'x.gguf') as engine:
        assert np.abs(engine.read(IDS.numpy()) - logits_of(lvlm)).max() < tolerance
        engine.read(IDS[:9].numpy())
        assert np.abs(engine.read(IDS[9:].numpy(), start=9) - logits_of(lvlm)[9:]).max() < tolerance


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in WRITTEN])
def test_other_configs_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match='sliding_window|qk_layernorm'):
        write_gguf(small(name), tmp_path / 'x.gguf')


def test_llama_cpp_reads_pictures_and_writes_the_same_words(llama_cpp):
    lvlm = load_lvlm('tiny-llava')
    found = check_engine(apply_plan(lvlm, engine_plans(parameter_sizes(lvlm))['mixed widths']), kind='F32', words=8)
    assert found['loads'] and found['equal_words'] == 8 and found['difference'] < 1e-3


def test_llama_cpp_says_why_it_refuses(llama_cpp, tmp_path):
    write_gguf(small('llama'), tmp_path / 'x.gguf')
    data = (tmp_path / 'x.gguf').read_bytes()
    (tmp_path / 'x.gguf').write_bytes(data.replace(b'llama.block_count', b'llama.block_xount'))
    with pytest.raises(ValueError, match='refuses x.gguf: .*block_count'):
        LlamaCpp(tmp_path / 'x.gguf')


def test_groups_by_another_writer():
    quants = pytest.importorskip('gguf').quants
    from gguf import GGMLQuantizationType

    x = np.random.default_rng(0).normal(size=(9, 96)).astype(np.float32)
    x[0], x[1, :32] = 0, np.linspace(-3, 1, 32)
    for kind in ('Q8_0', 'Q4_0', 'F16'):
        code = GGMLQuantizationType[kind]
        ours = encode_tensor(x, kind)
        assert ours == quants.quantize(x, code).tobytes()
        theirs = quants.dequantize(np.frombuffer(ours, np.uint8).reshape(9, -1), code) if kind != 'F16' else x
        assert np.allclose(decode_tensor(ours, kind, x.shape), theirs, atol=1e-2 if kind == 'F16' else 0)


def test_a_file_by_another_reader(tmp_path):
    gguf = pytest.importorskip('gguf')
    lvlm = cut(small('tied'), 'odd')
    write_gguf(lvlm, tmp_path / 'x.gguf', 'F32')
    reader = gguf.GGUFReader(tmp_path / 'x.gguf')
    tensors = {t.name: t.data for t in reader.tensors}
    down = lvlm.layers[1].mlp.down_proj.weight.detach().numpy()
    assert tensors['blk.1.ffn_down.weight'].shape == (64, 64)
    assert (tensors['blk.1.ffn_down.weight'][:, :43] == down).all()
    assert not tensors['blk.1.ffn_down.weight'][:, 43:].any() and 'output.weight' not in tensors
    assert reader.get_field('llama.feed_forward_length').contents() == 64


def test_widths_in_the_file():
    assert file_widths(cut(small('llama'), 'mixed')) == [(2, 96), (1, 96), (2, 64)]
    assert file_widths(cut(small('qwen2'), 'odd'), 1) == [(2, 43)] * 3
    assert file_widths(cut(small('qwen2'), 'heads')) == [(2, 96)] * 3
    assert file_widths(cut(small('phi'), 'odd')) == [(4, 64)] * 3


def test_lists_and_values():
    assert encode_value(-1)[:4] == b'\5\0\0\0' and encode_value(True)[:4] == b'\7\0\0\0'
    with pytest.raises(ValueError, match='one type'):
        encode_value([])


@pytest.mark.parametrize('how', ['whole', 'mixed'])
def test_a_cache_that_is_an_argument(how):
    lvlm = cut(small('llama'), how)
    step = CachedLM(lvlm)
    with torch.inference_mode():
        first, *cache = step(IDS[None, :9], empty_cache(lvlm))
        second, *_ = step(IDS[None, 9:], cache)
    assert np.abs(torch.cat([first, second], 1)[0].numpy() - logits_of(lvlm)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_onnx_engines(engine, tmp_path):
    for package in ('onnx', 'onnxscript', engine):
        pytest.importorskip(package)
    lvlm = cut(small('llama'), 'mixed')
    with OnnxModel(write_onnx(lvlm, tmp_path / 'x.onnx'), engine) as model:
        model.read(IDS[:9].numpy())
        assert np.abs(model.read(IDS[9:].numpy(), start=9) - logits_of(lvlm)[9:]).max() < 1e-4
        one = [model.read(IDS[i : i + 1].numpy(), start=i) for i in range(3)]  # Caches of 0, 1 and 2 tokens
        assert np.abs(np.concatenate(one) - logits_of(lvlm)[:3]).max() < 1e-4


def test_layers_of_unequal_widths_compile_as_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | dict(num_hidden_layers=9), num_key_value_heads=2)
    lvlm = LVLM(AutoModelForCausalLM.from_config(config).eval())
    student = apply_plan(lvlm, Plan.of(lvlm, mlp_channels={i: range(96 - i) for i in range(9)}))
    before, counter = logits_of(student), CompileCounter()
    torch._dynamo.reset()
    student.model.compile(backend=counter)
    assert np.abs(logits_of(student) - before).max() < 1e-5 and counter.frame_count == 1


def test_export_and_its_errors(tmp_path):
    save_lvlm(load_lvlm('tiny-llava'), tmp_path / 'm')
    path = export(tmp_path / 'm', kind='Q8_0')
    assert path.parent == tmp_path / 'm' and path.read_bytes()[:4] == b'GGUF'
    with pytest.raises(ValueError, match="not 'vllm'"):
        export(tmp_path / 'm', 'vllm')
    with pytest.raises(ValueError, match='no folder to write into'):
        export('tiny-llava')
    with pytest.raises(EngineMissing, match='not installed'):
        OnnxModel(path, 'tensorrt')


def test_torch_answers_read_the_picture():
    lvlm = load_lvlm('tiny-llava')
    tokens, logits, words = torch_answers(lvlm, 5)
    with torch.inference_mode():
        again = lvlm.part('lm')(inputs_embeds=torch.from_numpy(tokens)[None]).last_hidden_state
        assert np.abs(lvlm.part('head')(again)[0].numpy() - logits).max() < 1e-4
    assert words[0] == logits[-1].argmax() and len(words) == 5
    lvlm.model.generation_config.eos_token_id = int(words[1])  # The end token is not forbidden, and stops nothing
    assert torch_answers(lvlm, 5)[2] == words


def test_stored_runs_hold_every_case():
    runs = engine_runs()
    cases = set(engine_plans(parameter_sizes(load_lvlm('tiny-gqa'))))
    exact = runs[(runs.kind == 'F32') & (runs.engine == 'llama.cpp')]
    assert all(set(group.case) == cases for _, group in exact.groupby('model')) and exact.loads.all()
    assert len(runs) <= len(read_rows('engines'))


def test_rules_name_what_they_rest_on():
    rules = engine_rules(CONFIGS['qwen3']).set_index('engine')
    assert rules.takes['llama.cpp'] == 'yes' and rules.source['llama.cpp'].startswith('run: ')
    assert rules.source['vLLM'].startswith('rule, not run')
    assert rules.takes['NF4 on CPU'] == 'no' and '96 is none' in rules.why['NF4 on CPU']


@pytest.mark.parametrize('name', ['tiny-llava', 'tiny-bunny', 'tiny-internvl'])
def test_older_names(name, tmp_path):
    from safetensors import safe_open

    lvlm = load_lvlm(name)
    for layout in ('newest', 'older'):
        save_lvlm(lvlm, tmp_path / layout, layout=layout)
    with safe_open(tmp_path / 'older' / 'model.safetensors', 'pt') as file:
        names = list(file.keys())
    inner = [n.startswith('vision_tower.vision_model.') for n in names if n.startswith('vision_tower.')]
    assert all(inner) if name != 'tiny-internvl' else not any(inner)
    assert releases_that_read(tmp_path / 'older').startswith('any release')
    assert releases_that_read(tmp_path / 'newest').startswith('5.6') == (name != 'tiny-internvl')
    assert 'Read by transformers: any release' in (tmp_path / 'older' / 'README.md').read_text()
    again = load_lvlm(tmp_path / 'older').model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in lvlm.model.state_dict().items())


def test_doctor_knows_what_an_engine_asks_for(tmp_path):
    lvlm = load_lvlm('tiny-llava')
    save_lvlm(apply_plan(lvlm, Plan.of(lvlm, range(2), mlp_channels={0: range(96), 1: range(96)})), tmp_path / 'm')
    checks = [doctor(tmp_path / 'm', engine).set_index('check').ok for engine in ('llama.cpp', 'bitsandbytes NF4')]
    assert checks[0]['MLP widths are aligned for llama.cpp']
    assert not checks[1]['MLP widths are aligned for bitsandbytes NF4']


def test_export_replaces_nothing_unasked(tmp_path):
    "The model's own files are never written over, and a file of that name only with force."
    folder = save_lvlm(load_lvlm('tiny-llava'), tmp_path / 'm')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ('model.safetensors', 'config.json'):
        with pytest.raises(ValueError, match='end in .gguf'):
            export(folder, kind='F16', out=folder / name, force=True)
    (folder / 'model-F16.gguf').write_text('mine')
    with pytest.raises(FileExistsError, match='exists already'):
        export(folder, kind='F16')
    assert (folder / 'model-F16.gguf').read_text() == 'mine'
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != '.gguf'} == before
    assert export(folder, kind='F16', force=True).stat().st_size > 1000
