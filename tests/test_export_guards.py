"What `export` refuses, what its files say, and how they are written; no engine is needed but where a test says so."

import logging
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PhiConfig
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen3Config
from lvlm_study.efficiency import engines, onnx_files
from lvlm_study.efficiency.engines import ENGINE_RULES, ENGINE_TITLES, ENGINES, check_engine, check_engine_name
from lvlm_study.efficiency.engines import check_words, engine_cells, engine_rules, engine_runs, export, export_files
from lvlm_study.efficiency.engines import is_right, measured_noise, noise_rule, require_engine
from lvlm_study.efficiency.gguf_files import file_widths, gguf_refusal, model_metadata, stated_type, word_metadata
from lvlm_study.efficiency.gguf_files import write_gguf, write_gguf_file
from lvlm_study.efficiency.llama_cpp import EngineMissing
from lvlm_study.efficiency.onnx_files import engine_version, onnx_refusal, write_onnx
from lvlm_study.efficiency.quantization import quantize
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm, refuse_packed_copy, save_lvlm
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.study import cli

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=101)
SIZES |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = SIZES | dict(num_key_value_heads=2)
SLIDES = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
WINDOWS = {
    'mistral': MistralConfig(**GROUPED, sliding_window=8),
    'phi3': Phi3Config(**GROUPED, sliding_window=8),
    'qwen2': Qwen2Config(**GROUPED, **SLIDES),
}
IN_PART = dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5)
OTHERWISE = {
    'llama gelu': (LlamaConfig(**GROUPED, hidden_act='gelu'), 'computes silu .* not gelu'),
    'phi3 relu': (Phi3Config(**GROUPED, hidden_act='relu'), 'computes silu .* not relu'),
    'phi relu': (PhiConfig(**SIZES, hidden_act='relu'), 'computes gelu_new .* not relu'),
    'phi norms': (PhiConfig(**SIZES, qk_layernorm=True), 'qk_layernorm'),
    'stretched': (
        LlamaConfig(**GROUPED, rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4)),
        "positions of type 'linear'",
    ),
    'llama turned in part': (LlamaConfig(**GROUPED, rope_parameters=IN_PART), 'partial_rotary_factor 0.5'),
    'mistral turned in part': (
        MistralConfig(**GROUPED, sliding_window=None, rope_parameters=IN_PART),
        'a mistral turns whole heads, .* .partial_rotary_factor 0.5',
    ),
    'qwen3 biases': (Qwen3Config(**GROUPED, attention_bias=True), 'no biases of queries and keys in a qwen3'),
    'qwen2 long heads': (Qwen2Config(**GROUPED, head_dim=32), 'hidden size of 64, and 4 heads of 32 channels'),
    'qwen2 uneven heads': (Qwen2Config(**GROUPED, head_dim=12), 'hidden size of 64, and 4 heads of 12 channels'),
    'phi long heads': (PhiConfig(**SIZES, head_dim=32), 'of a phi .* 4 heads of 32 channels'),
    'phi3 long heads': (
        Phi3Config(**GROUPED, sliding_window=None, head_dim=32),
        'of a phi3 .* 4 heads of 32 channels cannot be filled up',
    ),
}
SOUND = {
    'no window': MistralConfig(**GROUPED, sliding_window=None),
    'window as long as the context': MistralConfig(**GROUPED, sliding_window=64, max_position_embeddings=64),
    'window that is not used': Qwen2Config(**GROUPED, use_sliding_window=False, sliding_window=8),
    'window of no layer': Qwen2Config(**GROUPED, **SLIDES | dict(max_window_layers=2)),
    'phi': PhiConfig(**SIZES),
    'phi3': Phi3Config(**GROUPED, sliding_window=None),
    'tied phi': PhiConfig(**SIZES, tie_word_embeddings=True),
    'qwen2 with room for heads': Qwen2Config(**GROUPED, head_dim=8),
}


def model_of(config):
    torch.manual_seed(0)
    return LVLM(AutoModelForCausalLM.from_config(config).eval(), name='m')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save_lvlm(load_lvlm('tiny-llava'), tmp_path_factory.mktemp('saved') / 'm')


@pytest.fixture
def any_engine(monkeypatch):
    "An engine that is PyTorch itself, so that a check runs without one."
    monkeypatch.setattr(engines, 'require_engine', lambda engine, writes=True: None)
    monkeypatch.setattr(engines, 'installed_version', lambda engine: 'torch')

    class InTorch(engines.EngineModel):
        off = 0.0

        def __init__(self, lvlm):
            self.lvlm = lvlm

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None

        @torch.inference_mode()
        def read(self, tokens, start=0, every=True):
            lm, head, embed = map(self.lvlm.part, ('lm', 'head', 'embed'))
            x = torch.from_numpy(np.asarray(tokens))
            x = embed(x) if x.ndim == 1 else x
            self.seen = x if start == 0 else torch.cat([self.seen[:start], x])
            logits = head(lm(inputs_embeds=self.seen[None]).last_hidden_state)[0, -len(x) :].numpy()
            return (logits if every else logits[-1:]) * (1 + self.off)

    monkeypatch.setattr(engines, 'open_in_engine', lambda path, engine, lvlm, **more: InTorch(lvlm))
    return InTorch


# --- models that a file would compute otherwise -----------------------------------------------------------------


@pytest.mark.parametrize('name', WINDOWS)
def test_a_window_that_texts_reach_beyond(name, tmp_path):
    "The window is of account in PyTorch, so a file without it would be wrong."
    lvlm, ids = model_of(WINDOWS[name]), torch.arange(5, 45)[None]
    full = model_of(type(WINDOWS[name])(**WINDOWS[name].to_dict() | dict(sliding_window=None, layer_types=None)))
    full.model.load_state_dict(lvlm.model.state_dict())
    with torch.inference_mode():
        one, other = (m.model(input_ids=ids).logits[0] for m in (lvlm, full))
    assert (one[:8] - other[:8]).abs().max() < 1e-5 < (one[20:] - other[20:]).abs().max()
    for write, refusal in ((write_gguf, gguf_refusal), (write_onnx, onnx_refusal)):
        assert 'the last 8 tokens alone (sliding_window)' in refusal(lvlm.config)
        with pytest.raises(ValueError, match='the last 8 tokens alone'):
            write(lvlm, tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []
    takes = engine_rules(lvlm.config).set_index('engine').takes
    assert set(takes[list(ENGINE_TITLES.values())]) == {'no'}


@pytest.mark.parametrize('name', OTHERWISE)
def test_what_llama_cpp_computes_otherwise(name, tmp_path):
    config, words = OTHERWISE[name]
    with pytest.raises(ValueError, match=words):
        write_gguf(model_of(config), tmp_path / 'x.gguf')
    rules = engine_rules(config).set_index('engine')
    assert rules.takes['llama.cpp'] == 'no' and rules.why['llama.cpp'] == gguf_refusal(config)
    assert rules.takes['ONNX Runtime'] == 'yes' and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', SOUND)
def test_what_is_sound_is_written(name, tmp_path):
    assert gguf_refusal(SOUND[name]) == onnx_refusal(SOUND[name]) == ''
    assert write_gguf(model_of(SOUND[name]), tmp_path / 'x.gguf')['widths']


@pytest.mark.parametrize('kind', ['dynamic', 'longrope'])
def test_positions_that_a_graph_would_freeze(kind):
    rope = dict(rope_type=kind, rope_theta=1e4)
    config = SimpleNamespace(rope_parameters=rope, sliding_window=None)
    config.get_text_config = lambda: config
    assert 'change with the length of the text' in onnx_refusal(config)
    config.rope_parameters = dict(rope_type='llama3', rope_theta=1e4)
    assert onnx_refusal(config) == ''
    config.layer_types = ['full_attention', 'conv']
    assert "layers of kind 'conv'" in onnx_refusal(config)


def test_export_refuses_before_weights_are_read(tmp_path, monkeypatch):
    config = WINDOWS['mistral']
    model_of(config).model.save_pretrained(tmp_path / 'm')
    monkeypatch.setattr(engines, 'load_meta', lambda folder: SimpleNamespace(config=config))
    monkeypatch.setattr(engines, 'load_lvlm', lambda *args, **more: pytest.fail('weights were read'))
    for engine in ENGINES:
        with pytest.raises(ValueError, match='the last 8 tokens alone'):
            export(tmp_path / 'm', engine)


def packed(kind, plain=False):
    "A copy as `quantize` makes them; plain: with weights that are rounded numbers."
    lvlm = load_lvlm('tiny-gqa')
    lvlm.model.quantized_by = kind
    lvlm.model.group_weights = ['some'] if plain else []
    return lvlm


def test_a_quantized_copy_is_not_written(tmp_path, any_engine, monkeypatch):
    monkeypatch.setattr(engines, '_write_for', lambda *args: pytest.fail('a file was written'))
    for write in (write_gguf, write_onnx):
        with pytest.raises(ValueError, match='a copy with int8 weights'):
            write(packed('int8'), tmp_path / 'x')
    for engine in ENGINES:
        with pytest.raises(ValueError, match='a copy with int8 weights'):
            check_engine(packed('int8'), engine)
        with pytest.raises(ValueError, match='a copy with int8 weights'):
            check_engine('tiny-gqa', engine, original=packed('int8'))
    assert list(tmp_path.iterdir()) == []


def test_rounded_numbers_go_into_graphs_alone(tmp_path):
    refuse_packed_copy(packed('Q8_0', plain=True))
    refuse_packed_copy(quantize(load_lvlm('tiny-gqa'), 'Q8_0'))
    with pytest.raises(ValueError, match='a copy with Q8_0 weights'):
        write_gguf(quantize(load_lvlm('tiny-gqa'), 'Q8_0'), tmp_path / 'x.gguf', 'Q8_0')


# --- what a file says -------------------------------------------------------------------------------------------


def test_the_name_in_a_file_is_no_folder_name():
    lvlm = model_of(SOUND['phi3'])
    lvlm.name = 'llava-phi-3-cut'
    metadata = model_metadata(lvlm, file_widths(lvlm))
    assert metadata['general.name'] == 'model' and 'phi-3' not in str(metadata)


@pytest.mark.parametrize('begins', [True, False])
def test_a_tokenizer_that_begins_texts_is_written_as_one(begins):
    backend = Tokenizer(models.BPE({'<s>': 0, 'a': 1, 'b': 2, 'ab': 3, 'Ġ': 4}, [('a', 'b')]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(['<s>'])
    if begins:
        backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    lvlm = model_of(SOUND['no window'])
    lvlm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>')
    metadata = word_metadata(lvlm)
    assert metadata['tokenizer.ggml.pre'] == 'gpt-2' and metadata['tokenizer.ggml.add_bos_token'] is begins


def test_study_models_begin_no_text():
    assert word_metadata(load_lvlm('tiny-llava'))['tokenizer.ggml.add_bos_token'] is False


def test_notes_come_with_the_files(saved, tmp_path):
    found = export_files(saved, kind='F32', out=tmp_path / 'a.gguf')
    assert found['files'] == [tmp_path / 'a.gguf'] and found['notes'] == []
    assert found['megabytes'] == (tmp_path / 'a.gguf').stat().st_size / 1e6
    lvlm = load_lvlm('tiny-llava')
    save_lvlm(apply_plan(lvlm, Plan.of(lvlm, mlp_channels={3: range(100)})), tmp_path / 'mixed')
    notes = ' '.join(export_files(tmp_path / 'mixed')['notes'])
    assert 'fill up widths' in notes and 'called deci' in notes


# --- how files are written --------------------------------------------------------------------------------------


def stand_in_writer(monkeypatch, error=None):
    "A writer of graphs that needs no package: two files, or an error after the first."

    def write(model, inputs, path, **more):
        with open(f'{path}.data', 'wb') as file:
            file.write(b'w' * 3000)
        if error:
            raise error
        logging.getLogger('noise').warning('noise')
        with open(path, 'wb') as file:
            file.write(b'g' * 1000)

    monkeypatch.setattr(onnx_files, 'engine_version', lambda package: '1')
    monkeypatch.setattr(torch.onnx, 'export', write)


def test_a_graph_is_two_files(saved, tmp_path, monkeypatch, caplog):
    stand_in_writer(monkeypatch)
    out = tmp_path / 'model.onnx'
    found = export_files(saved, 'onnxruntime', out=out)
    assert [p.name for p in found['files']] == ['model.onnx', 'model.onnx.data'] and found['megabytes'] == 0.004
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.onnx', 'model.onnx.data']
    assert not [r for r in caplog.records if r.name == 'noise']
    out.unlink()
    with pytest.raises(FileExistsError, match='model.onnx.data exists already'):
        export(saved, 'openvino', out=out)
    assert export(saved, 'openvino', out=out, force=True) == out
    assert (out.stat().st_mode & 0o777) == (saved / 'config.json').stat().st_mode & 0o777


def test_a_graph_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    out = tmp_path / 'model.onnx'
    out.write_text('before')
    out.with_name('model.onnx.data').write_text('before')
    stand_in_writer(monkeypatch, RuntimeError('full'))
    with pytest.raises(RuntimeError, match='full'):
        export(saved, 'onnxruntime', out=out, force=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {'model.onnx': 'before', 'model.onnx.data': 'before'}


def test_what_is_missing_is_found_first(saved, tmp_path, monkeypatch):
    monkeypatch.setenv('LLAMA_CPP_LIB', str(tmp_path))
    monkeypatch.setattr(engines, 'load_lvlm', lambda *args, **more: pytest.fail('weights were read'))
    monkeypatch.setattr(engines, 'engine_version', lambda package: '')
    monkeypatch.setattr(onnx_files, 'engine_version', lambda package: '')
    for engine in ENGINES:
        with pytest.raises(EngineMissing):
            require_engine(engine)
        with pytest.raises(EngineMissing):
            check_engine(saved, engine)
    with pytest.raises(EngineMissing, match='onnx and onnxscript'):
        export(saved, 'onnxruntime', out=tmp_path / 'x.onnx')
    monkeypatch.setattr(engines, 'engine_version', lambda package: '1')
    require_engine('openvino', writes=False)
    with pytest.raises(EngineMissing, match='onnx and onnxscript'):
        require_engine('openvino')


# --- checks -----------------------------------------------------------------------------------------------------


def test_a_check_takes_the_file_that_is_there(saved, tmp_path, any_engine, monkeypatch):
    file = export(saved, kind='F32', out=tmp_path / 'a.gguf')
    monkeypatch.setattr(engines, '_write_for', lambda *args: pytest.fail('a second file was written'))
    found = check_engine(saved, kind='F32', words=4, file=file)
    assert found['ok'] and found['megabytes'] == file.stat().st_size / 1e6 and found['equal_words'] == 4
    with pytest.raises(FileNotFoundError, match='there is no file'):
        check_engine(saved, file=tmp_path / 'b.gguf')


def test_an_exact_type_has_to_be_right(saved, tmp_path, any_engine):
    file = export(saved, kind='F32', out=tmp_path / 'a.gguf')
    any_engine.off = 0.1
    found = check_engine(saved, kind='F32', words=4, file=file)
    assert found['loads'] and found['equal_words'] == 4 and not found['ok']
    assert found['difference_share'] == pytest.approx(0.1, rel=1e-3)
    for kind, ok in (('F16', False), ('Q8_0', True)):
        other = export(saved, kind=kind, out=tmp_path / f'{kind}.gguf')
        assert check_engine(saved, kind=kind, words=4, file=other)['ok'] is ok
    any_engine.off = -2.0
    assert check_engine(saved, kind='F32', words=4, file=file)['equal_words'] == 0


def test_right_and_wrong():
    found = dict(kind='F32', difference_share=1e-5, equal_words=8, words=8)
    assert is_right(found)
    assert is_right(found | dict(kind='F16', equal_words=7))
    for wrong in (dict(equal_words=7), dict(difference_share=0.03), dict(difference_share=float('nan'))):
        assert not is_right(found | wrong)
    for wrong in (dict(difference_share=0.03), dict(difference_share=float('nan'))):
        assert not is_right(found | wrong | dict(kind='F16'))
    assert is_right(found | dict(kind='Q4_0', equal_words=0, difference_share=0.5))
    assert not is_right(found | dict(kind='Q4_0', difference_share=float('nan')))


@pytest.mark.parametrize('kind', ['F16', 'Q8_0'])
def test_a_file_of_another_type(kind, saved, tmp_path, any_engine, monkeypatch):
    file = export(saved, kind='F32', out=tmp_path / 'a.gguf')
    assert stated_type(file) == 'F32'
    monkeypatch.setattr(engines, 'load_lvlm', lambda *args, **more: pytest.fail('weights were read'))
    with pytest.raises(ValueError, match=f'a.gguf says that it is of type F32, not {kind}'):
        check_engine(saved, kind=kind, file=file)


def test_types_of_files_by_others(tmp_path):
    file = tmp_path / 'x.gguf'
    first = {'a': ['b', 'c'], 'd': [1, 2], 'e': 0.5, 'f': True, 'g': 'text'}
    for code, stated in ((15, 'number 15'), (2, 'Q4_0')):
        write_gguf_file(file, first | {'general.file_type': code}, {})
        assert stated_type(file) == stated
    data = file.read_bytes()
    write_gguf_file(file, first, {})
    assert stated_type(file) == ''
    for other in (b'no GGUF file', data[:30], data[:60], b'GGUF', b''):
        file.write_bytes(other)
        assert stated_type(file) == ''


def test_an_original_that_is_not_larger(any_engine, monkeypatch):
    monkeypatch.setattr(engines, '_write_for', lambda *args: pytest.fail('a file was written'))
    lvlm = load_lvlm('tiny-gqa')
    for original in (lvlm, 'tiny-gqa', apply_plan(lvlm, Plan.of(lvlm, [0, 1]))):
        with pytest.raises(ValueError, match='the original has to be larger than this model'):
            check_engine(lvlm, original=original)


def test_the_command_refuses_such_an_original_before_it_writes(any_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'require_engine', lambda *args: None)
    file = tmp_path / 'x.gguf'
    for original, why in (('tiny-gqa', 'has to be larger'), ('tiny-bunny', 'its model type is phi, not llama')):
        with pytest.raises(ValueError, match=why):
            cli.lvlm_export('tiny-gqa', out=file, check=True, original=original)
        assert not file.exists()


def test_the_command_knows_the_room_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'require_engine', lambda *args: None)
    short = model_of(LlamaConfig(**GROUPED | dict(vocab_size=800), max_position_embeddings=40))
    tokens = load_lvlm('tiny-llava').tokenizer
    save_lvlm(LVLM(short.model, tokenizer=tokens), tmp_path / 'short')
    with pytest.raises(ValueError, match='the prompt of a check has [0-9]+ tokens, and the model has room for 40'):
        cli.lvlm_export(tmp_path / 'short', check=True, type='F32')
    few = model_of(LlamaConfig(**GROUPED))
    save_lvlm(LVLM(few.model, tokenizer=tokens), tmp_path / 'few')
    with pytest.raises(ValueError, match='has no embedding in few, which has 101'):
        cli.lvlm_export(tmp_path / 'few', check=True, type='F32')
    assert not list(tmp_path.glob('*/*.gguf'))


def test_places_that_take_no_file(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, 'load_lvlm', lambda *args, **more: pytest.fail('weights were loaded'))
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file is a file, so x.gguf cannot lie below it'):
        export(saved, out=tmp_path / 'file' / 'x.gguf')
    with pytest.raises(PermissionError, match='no files can be written below /proc'):
        export(saved, out='/proc/x.gguf')
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr('shutil.disk_usage', lambda folder: usage)
    with pytest.raises(OSError, match='x.gguf needs .* GB, and 1e-06 GB are free on its disk'):
        export(saved, out=tmp_path / 'x.gguf')
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_why_a_file_is_not_right(any_engine, saved):
    file = export(saved, kind='F32', out=saved / 'right.gguf')
    any_engine.off = 0.5
    found = check_engine(saved, kind='F32', file=file, words=4)
    assert not found['ok'] and 'its logits differ from those of PyTorch by 50.00% of the largest' in found['reason']
    any_engine.off = float('nan')
    assert check_engine(saved, kind='F32', file=file, words=4)['reason'] == 'its logits are not finite'


def test_weights_that_are_no_numbers_are_not_exported(saved, tmp_path):
    lvlm = load_lvlm(saved)
    with torch.no_grad():
        lvlm.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    save_lvlm(lvlm, tmp_path / 'broken')
    with pytest.raises(ValueError, match='up_proj.weight holds values that are not finite: answers would be'):
        export(tmp_path / 'broken', kind='F32')
    assert not list((tmp_path / 'broken').glob('*.gguf'))


def test_a_loaded_model_is_saved_first(tmp_path):
    with pytest.raises(ValueError, match='save a loaded one with save_lvlm') as e:
        export(load_lvlm('tiny-gqa'), out=tmp_path / 'x.gguf')
    assert '\n' not in str(e.value) and len(str(e.value)) < 120
    with pytest.raises(ValueError, match=r'say where with `out` \(--out\)'):
        export('tiny-gqa')


def test_a_model_in_16_bits_is_compared_in_32(any_engine):
    lvlm = load_lvlm('tiny-gqa')
    lvlm.model.to(torch.bfloat16)
    assert check_engine(lvlm, kind='F32', words=4)['ok']
    assert lvlm.model.dtype == torch.bfloat16
    copied, again = engines._in_float32(lvlm), load_lvlm('tiny-gqa')
    assert torch.equal(copied.part('lm').rotary_emb.inv_freq, again.part('lm').rotary_emb.inv_freq)


def test_more_words_than_there_is_room_for(any_engine, monkeypatch):
    monkeypatch.setattr(engines, '_write_for', lambda *args: pytest.fail('a file was written'))
    lvlm = load_lvlm('tiny-llava')
    for words in (480, 100_000):
        with pytest.raises(ValueError, match='at most 451 words fit after the prompt of 61 tokens'):
            check_engine(lvlm, words=words)
    assert check_words(lvlm, 451) == 512


def test_an_original_of_another_kind(any_engine):
    with pytest.raises(ValueError, match='the original cannot be one of this model: its model type is phi, not llama'):
        check_engine('tiny-llava', original='tiny-bunny')
    lvlm = load_lvlm('tiny-llava')
    pruned = apply_plan(lvlm, Plan.of(lvlm, range(9)))
    engines.check_original(pruned, lvlm)
    mixed = load_lvlm('tiny-internvl')
    engines.check_original(apply_plan(mixed, Plan.of(mixed, mlp_channels={0: range(64)})), mixed)


def test_a_file_of_another_vocabulary(any_engine, saved, tmp_path, monkeypatch):
    file = export(saved, kind='F32', out=tmp_path / 'a.gguf')
    read = any_engine.read
    monkeypatch.setattr(any_engine, 'read', lambda self, *args, **more: read(self, *args, **more)[:, :50])
    found = check_engine(saved, kind='F32', words=4, file=file)
    assert not found['loads'] and not found['ok'] and 'the file knows 50 words, and the model 733' in found['reason']


@pytest.mark.parametrize('multiple', [257 + 300, 10**9])
def test_a_multiple_beyond_the_widths(multiple, saved, tmp_path):
    with pytest.raises(ValueError, match=f'from 1 to 384 for this model, not {multiple}'):
        export(saved, out=tmp_path / 'x.gguf', multiple=multiple)
    assert list(tmp_path.iterdir()) == []


def test_a_multiple_beyond_the_widths_before_work(saved, tmp_path, any_engine, monkeypatch):
    monkeypatch.setattr(engines, 'load_lvlm', lambda *args, **more: pytest.fail('weights were read'))
    for work in (check_engine, export_files):
        with pytest.raises(ValueError, match='from 1 to 384 for this model, not 557'):
            work(saved, multiple=557)


def test_no_folder_of_that_name(tmp_path):
    for name in ('nowhere', str(tmp_path / 'nowhere')):
        with pytest.raises(FileNotFoundError, match=f'there is no checkpoint folder {name}'):
            export(name)


# --- names and the table ----------------------------------------------------------------------------------------


def test_one_list_of_names():
    assert set(ENGINE_TITLES.values()) <= set(ENGINE_RULES)
    for name, title in ENGINE_TITLES.items():
        assert check_engine_name(name) == check_engine_name(title.upper()) == (name, ENGINES[name][name == 'llama.cpp'])
    with pytest.raises(ValueError, match='an engine is one of llama.cpp, onnxruntime, openvino'):
        check_engine_name('vLLM')


def test_cells_say_what_they_rest_on():
    runs = engine_runs()
    cells = engine_cells(runs)
    assert (cells[['version', 'date', 'equal']] != '').all(axis=None) and cells.difference.notna().all()
    row = runs[(runs.model == 'SmolLM2-135M') & (runs.kind == 'Q8_0') & (runs.case == 'width 15 %')].iloc[0]
    cell = cells.loc['SmolLM2-135M', 'llama.cpp', 'width 15 %']
    assert cell.equal_8bit == f'{row.equal_words:.0f} of 32' == '2 of 32' and cell.difference_8bit == row.difference
    assert cell.equal == '32 of 32' and cell.prefill == row.prefill_ratio and cell.version == 'v0.4.0'
    less = engine_cells(runs[runs.engine != 'openvino']).xs('openvino', level='engine')
    assert (less.loads == 'not run').all() and (less.version == '').all() and less.prefill.isna().all()


def test_the_rule_covers_files_that_are_the_same():
    runs = engine_runs()
    noise = measured_noise(runs)
    assert noise.loc[('openvino', False), 'prefill'] == pytest.approx(0.2976, abs=1e-3)
    for (engine, large), off in noise.iterrows():
        assert off.max() < noise_rule(engine, 'SmolLM2-135M' if large else 'tiny-llava')


# --- with real engines ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_written_graph_is_quiet_and_runs(tmp_path, capfd):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        if not engine_version(package):
            pytest.skip(f'{package} is not installed')
    folder = save_lvlm(load_lvlm('tiny-gqa'), tmp_path / 'm')
    capfd.readouterr()
    found = export_files(folder, 'onnxruntime')
    assert 'torch' not in capfd.readouterr().err.replace('tests', '')
    assert [p.name for p in found['files']] == ['model.onnx', 'model.onnx.data']
    assert found['megabytes'] > 5
    checked = check_engine(folder, 'ONNX Runtime', file=found['files'][0], words=8)
    assert checked['ok'] and checked['megabytes'] == found['megabytes']
