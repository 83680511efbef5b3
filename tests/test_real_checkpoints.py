"""Checkpoints as people have them, handled as transformers does or refused in one sentence.

Stale indexes, heads of their own, quantized weights, adapters, files that do not fit their config; and no command
writes over what it reads."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GgufConfig
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.quantization_config import QuantizationMethod

from lvlm_study.data.instruction_data import CONVERSATION_FEATURES
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.evaluation.evaluate import evaluate, records_origin
from lvlm_study.importance.importance import Scores, score
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import MissingProcessor, fingerprint, generate_greedy, load_lvlm, save_lvlm
from lvlm_study.models.random_models import random_model
from lvlm_study.models.safetensors_files import kept_aside, refuse_overlap, weight_files
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.layer_pruning import layer_plan
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.pruning.width_pruning import width_plan
from lvlm_study.recovery.losses import TrainingSamples, recovery_settings
from lvlm_study.recovery.recovery import load_recovery, merge_adapters, prepare_student, recover
from lvlm_study.recovery.teacher_cache import cache_teacher
from lvlm_study.study import cli as commands

SIZES = dict(
    vocab_size=733,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)


def lm(folder, seed=0, **changes):
    "A plain language model with random weights and the tokenizer of a study model, saved."
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDY_MODELS_FOLDER / 'tiny-llava').save_pretrained(folder)
    return model


def embeddings(model):
    return model.get_input_embeddings().weight


def edit_config(folder, **entries):
    path = Path(folder) / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def snapshot(folder):
    "Every file below a folder with its bytes."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


@pytest.fixture
def work(tmp_path, monkeypatch):
    "A working folder with a model, a teacher, data and pictures, scores, a plan and records."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()
    rows = []
    for r in instructions('recovery', 4):
        r['images'][0].save(tmp_path / 'pictures' / f'{r["id"]}.png')
        turns = [{'from': 'human' if m['role'] == 'user' else 'gpt', 'value': m['content']} for m in r['messages'][:2]]
        rows.append(dict(id=r['id'], image=f'{r["id"]}.png', conversations=turns))
    (tmp_path / 'train.json').write_text(json.dumps(rows))
    for name in ('m', 't'):
        shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', tmp_path / 'deep' / name)
    lvlm = load_lvlm('tiny-llava')
    layers = torch.rand(1, 12)
    Scores(dict(layers=dict(bi=layers)), 'tiny-llava', parameter_sizes(lvlm), None, 4).save(tmp_path / 'scores')
    (tmp_path / 'plan.json').write_text(Plan.of(lvlm, layers=range(9)).to_json())
    (tmp_path / 'base.parquet').write_bytes(b'records')
    return tmp_path


DATA = ('--data', 'train.json', '--images', 'pictures')
RECOVER = ('lvlm_recover', 'deep/m')
TEACHER = (*DATA, '--teacher', 'deep/t', '--recipe', 'sft+kl')
OVERLAPS = [
    ('lvlm_score', 'deep/m', 'train', *DATA),  # train.json
    ('lvlm_score', 'deep/m', 'pictures/s', *DATA),
    ('lvlm_score', 'deep/m', 'deep/m/s', *DATA),
    ('lvlm_prune', 'deep/m', 'deep/m', '--scores', 'scores'),
    ('lvlm_prune', 'deep/m', 'deep', '--scores', 'scores'),
    ('lvlm_prune', 'deep/m', 'deep/m/pruned', '--scores', 'scores'),
    ('lvlm_prune', 'deep/m', 'deep/../deep/m', '--scores', 'scores'),
    ('lvlm_prune', 'deep/m', 'scores.json', '--scores', 'scores'),
    ('lvlm_prune', 'deep/m', 'plan.json', '--plan', 'plan.json'),
    ('lvlm_prune', 'deep/m', '.', '--plan', 'plan.json'),
    (*RECOVER, 'deep/m', *DATA),
    (*RECOVER, 'deep', *DATA),
    (*RECOVER, 'deep/t', *TEACHER),
    (*RECOVER, 'deep/t/out', *TEACHER),
    (*RECOVER, 'pictures', *DATA),
    (*RECOVER, 'train.json', *DATA),
    ('lvlm_evaluate', 'deep/m', '--records', 'base.parquet', '--base', 'base.parquet'),
    ('lvlm_evaluate', 'deep/m', '--records', 'deep/m/config.json'),
    ('lvlm_evaluate', 'deep/m', '--records', 'deep'),
]


@pytest.mark.parametrize('force', [(), ('--force',), ('--dry_run',)], ids=lambda f: ''.join(f) or 'plain')
@pytest.mark.parametrize('words', OVERLAPS, ids=' '.join)
def test_no_command_writes_over_what_it_reads(words, force, run, work):
    before = snapshot(work)
    status, out, err = run(*words, *force)
    assert status == 2 and out == '' and err.count('\n') == 1, err
    assert 'which is only read: choose another place' in err
    assert snapshot(work) == before


def test_links_to_an_input_are_followed(run, work):
    (work / 'link').symlink_to(work / 'deep' / 'm')
    (work / 'up').symlink_to(work / 'deep')
    before = snapshot(work)
    for place in ('link', 'up', 'link/x', 'up/m/x'):
        status, _, err = run('lvlm_prune', 'deep/m', place, '--scores', 'scores', '--force')
        assert status == 2 and 'which is only read' in err
    assert snapshot(work) == before


def test_functions_do_not_write_over_the_source_of_a_model(work):
    lvlm = load_lvlm('deep/m')
    plan = Plan.of(lvlm, layers=range(9))
    pruned = apply_plan(lvlm, plan)
    rows = instructions('recovery', 2)
    shutil.copytree(work / 'deep' / 'm', work / 'x.partial')
    before = snapshot(work)
    for place in (work / 'deep' / 'm', work / 'deep', work / 'deep' / 'm' / 'x'):
        for call in (
            lambda: prune_checkpoint(work / 'deep' / 'm', place, plan, force=True),
            lambda: save_lvlm(lvlm, place, force=True),
            lambda: save_lvlm(pruned, place, force=True),
            lambda: recover(pruned, rows, out=place, progress=False),
            lambda: recover(load_lvlm('tiny-llava'), rows, 'sft+kl', teacher=lvlm, out=place, progress=False),
        ):
            with pytest.raises(ValueError, match='which is only read'):
                call()
    # the folder that a result is written to before it gets its name
    with pytest.raises(ValueError, match='which is only read'):
        prune_checkpoint(work / 'x.partial', work / 'x', plan)
    with pytest.raises(ValueError, match='which is only read'):
        save_lvlm(load_lvlm('x.partial'), work / 'x')
    assert snapshot(work) == before


def test_a_place_beside_an_input_is_free(work):
    assert refuse_overlap('deep/m2', ['deep/m', '', 'not-there']) is None
    assert refuse_overlap('deep/m.json', ['deep/m']) is None


def test_what_is_replaced_stays_until_the_new_one_is_whole(run, work, monkeypatch):
    assert run('lvlm_prune', 'deep/m', 'p', '--scores', 'scores')[0] == 0
    before = snapshot(work / 'p')

    def fail(*args, **options):
        assert snapshot(work / 'p') == before, 'gone while the new one was made'
        raise OSError('the disk is gone')

    monkeypatch.setattr(commands, 'prune_checkpoint', fail)
    assert run('lvlm_prune', 'deep/m', 'p', '--scores', 'scores', '--force')[0] == 2
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert snapshot(work / 'p') == before
    # recovery and scores write into their place, so the old one lies beside it meanwhile
    assert run(*RECOVER, 'r', *DATA, '--fraction', 1)[0] == 0
    before = snapshot(work / 'r')
    monkeypatch.setattr(commands, 'recover', lambda *args, **options: _fail(work / 'r.replaced', before))
    assert run(*RECOVER, 'r', *DATA, '--fraction', 1, '--force')[0] == 2
    assert snapshot(work / 'r') == before and not (work / 'r.replaced').exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert run(*RECOVER, 'r', *DATA, '--fraction', 1, '--seed', 1, '--force')[0] == 0
    assert snapshot(work / 'r') != before and not (work / 'r.replaced').exists()


def _fail(aside, before):
    assert snapshot(aside) == before
    raise OSError('the disk is gone')


def test_something_new_is_not_lost_when_the_work_fails_later(tmp_path):
    place = tmp_path / 'r'
    place.write_text('old')
    (tmp_path / 'r.replaced').write_text('of an earlier kill')
    with pytest.raises(KeyboardInterrupt):
        with kept_aside(place):
            place.write_text('begun')
            raise KeyboardInterrupt
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        'r': 'begun',
        'r.replaced': 'of an earlier kill',
        'r.replaced2': 'old',
    }


# --- what transformers loads is what is cut ---------------------------------------------------------------------


@pytest.mark.parametrize('old_shards', [True, False])
def test_a_stale_index_is_passed_over(tmp_path, old_shards):
    src = tmp_path / 'm'
    old = lm(src, max_position_embeddings=64)
    old.save_pretrained(src, max_shard_size='100KB')
    (src / 'model.safetensors').unlink(missing_ok=True)
    shards = {p.name: p.read_bytes() for p in src.glob('model-*')}
    index = (src / 'model.safetensors.index.json').read_bytes()
    new = lm(src, seed=9, max_position_embeddings=64)
    (src / 'model.safetensors.index.json').write_bytes(index)
    for name, data in shards.items() if old_shards else ():
        (src / name).write_bytes(data)
    assert weight_files(src) == [src / 'model.safetensors']
    assert torch.equal(embeddings(AutoModelForCausalLM.from_pretrained(src)), embeddings(new))
    lvlm = load_lvlm(src)
    dst = prune_checkpoint(src, tmp_path / 'p', Plan.of(lvlm, layers=range(4)))
    assert torch.equal(embeddings(load_lvlm(dst).model), embeddings(new)) and doctor(dst).ok.all()
    assert not torch.equal(embeddings(new), embeddings(old))


def layers_of(n):
    return dict(num_hidden_layers=n)


MISFITS = [
    (30, layers_of(20), 'unexpected: model.layers.{20-29}'),
    (20, layers_of(30), 'missing: model.layers.{20-29}'),
    (6, dict(intermediate_size=128), 'down_proj.weight is 64x96, the config says 64x128'),
    (6, dict(vocab_size=800), 'embed_tokens.weight is 733x64, the config says 800x64'),
    (6, dict(attention_bias=True), 'missing: model.layers.{0-5}.self_attn'),
]


@pytest.mark.parametrize('num_layers,entries,problem', MISFITS)
def test_files_are_compared_with_the_config(tmp_path, num_layers, entries, problem):
    src = tmp_path / 'm'
    lm(src, num_hidden_layers=num_layers)
    whole = load_lvlm(src)
    edit_config(src, **entries)
    described = LVLM(LlamaForCausalLM(LlamaConfig(**SIZES | layers_of(num_layers) | entries)))
    for plan in (Plan.of(whole, layers=range(4)), Plan.of(described, layers=range(4))):
        with pytest.raises(ValueError, match='m: the weights do not fit the config') as e:
            prune_checkpoint(src, tmp_path / 'p', plan)
        assert problem in str(e.value) and '\n' not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m']


def dry_runs(folder):
    "Every command that can say what it would do, on a folder."
    yield 'lvlm_score', folder, 's', *DATA, '--dry_run'
    yield 'lvlm_prune', folder, 'p', '--plan', 'plan.json', '--dry_run'
    yield 'lvlm_recover', folder, 'r', *DATA, '--dry_run'
    yield 'lvlm_recover', 'deep/m', 'r', *DATA, '--teacher', folder, '--recipe', 'sft+kl', '--dry_run'
    yield 'lvlm_evaluate', folder, '--limit', 1, '--dry_run'


@pytest.mark.parametrize('num_layers,entries,problem', MISFITS)
def test_dry_runs_compare_files_with_the_config(run, work, num_layers, entries, problem):
    lm(work / 'q', num_hidden_layers=num_layers)
    edit_config(work / 'q', **entries)
    before = snapshot(work)
    for words in dry_runs('q'):
        status, out, err = run(*words)
        assert status == 2 and out == '' and problem in err and err.count('\n') == 1, (words, err)
    assert snapshot(work) == before


INCONSISTENT = [
    dict(layer_types=['full_attention'] * 5),
    dict(num_attention_heads=7),
    dict(num_key_value_heads=3),
    dict(hidden_size=60),
    dict(num_hidden_layers='six'),
    dict(num_attention_heads=0),
    dict(per_layer_config={'2': dict(skip=['mlp'])}),
    dict(model_type='no-such-type'),
    dict(model_type='bert'),
]


@pytest.mark.parametrize('entries', INCONSISTENT, ids=lambda e: str(*e.items()))
def test_inconsistent_configs_are_one_sentence(run, work, entries):
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(work / 'q')
    AutoTokenizer.from_pretrained(STUDY_MODELS_FOLDER / 'tiny-llava').save_pretrained(work / 'q')
    edit_config(work / 'q', **entries)
    before = snapshot(work)
    for words in (*dry_runs('q'), *commands_on('q')):
        status, out, err = run(*words)
        assert status == 2 and out == '' and err.count('\n') == 1, (words, err)
        assert any(word in err for word in (': q', 'q/config.json', 'Qwen2', 'Bert')), (words, err)
    assert run('lvlm_doctor', 'q')[0] == 1
    assert snapshot(work) == before


@pytest.mark.parametrize('kind', ['helium', 'stablelm', 'opt', 'qwen2_vl', 'qwen2_5_vl', 'phi', 'gemma2', 'llama'])
def test_widths_on_disk_are_refused_as_in_memory(tmp_path, kind):
    random_model(kind).save_pretrained(tmp_path / 'm')
    lvlm = load_lvlm(tmp_path / 'm')
    a = lvlm.architecture
    some = {i: range(1, a.kv_heads) for i in range(a.num_layers)}
    channels = {i: range(0, a.mlp_channels, 2) for i in range(a.num_layers)}
    for groups in (dict(kv_heads=some), dict(mlp_channels=channels), dict(kv_heads=some, mlp_channels=channels)):
        try:
            plan = Plan.of(lvlm, **groups)
        except ValueError:
            continue
        try:
            want = apply_plan(lvlm, plan)
        except ValueError as e:
            with pytest.raises(ValueError) as on_disk:
                prune_checkpoint(tmp_path / 'm', tmp_path / 'p', plan)
            assert str(on_disk.value) == str(e)
            assert sorted(p.name for p in tmp_path.iterdir()) == ['m']
            continue
        got = load_lvlm(prune_checkpoint(tmp_path / 'm', tmp_path / 'p', plan)).model.state_dict()
        assert all(torch.equal(v, got[k]) for k, v in want.model.state_dict().items())
        shutil.rmtree(tmp_path / 'p')


@pytest.mark.parametrize(
    'make',
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    ],
)
@pytest.mark.parametrize('own', [True, False])
def test_tied_by_name_only(tmp_path, make, own):
    "A head of its own is kept, and the config says so; a head that equals the embeddings stays tied."
    make().save_pretrained(tmp_path / 'm')
    weights = load_file(tmp_path / 'm' / 'model.safetensors')
    weights['lm_head.weight'] = weights['model.embed_tokens.weight'] + own
    save_file(weights, tmp_path / 'm' / 'model.safetensors', metadata=dict(format='pt'))
    lvlm = load_lvlm(tmp_path / 'm')
    plan = Plan.of(lvlm, layers=range(4), mlp_channels={i: range(64) for i in range(4)})
    on_disk = load_lvlm(prune_checkpoint(tmp_path / 'm', tmp_path / 'p', plan))
    saved = load_lvlm(save_lvlm(apply_plan(lvlm, plan), tmp_path / 's'))
    ids = torch.arange(20)[None]
    for pruned in (on_disk, saved):
        assert pruned.config.tie_word_embeddings is not own
        assert torch.equal(pruned.model.lm_head.weight, weights['lm_head.weight'])
        assert parameter_sizes(pruned)['total'] == plan.remaining['parameters']
    assert torch.equal(on_disk.model(ids).logits, saved.model(ids).logits)
    assert json.loads((tmp_path / 'p' / 'config.json').read_text())['tie_word_embeddings'] is not own
    assert doctor(tmp_path / 'p').ok.all() and doctor(tmp_path / 's').ok.all()


# --- what cannot be pruned is refused at the door ---------------------------------------------------------------

QUANTIZED = dict(
    bitsandbytes=dict(quant_method='bitsandbytes', load_in_4bit=True),
    unnamed_bitsandbytes=dict(load_in_8bit=True),
    awq=dict(quant_method='awq', bits=4),
    gptq=dict(quant_method='gptq', bits=4),
    fp8=dict(quant_method='fp8', weight_block_size=[128, 128]),
    gguf=dict(quant_method='gguf'),
    new=dict(quant_method='something-new'),
)


def quantized_folder(folder, method):
    lm(folder)
    weights = load_file(folder / 'model.safetensors')
    name = 'model.layers.0.mlp.down_proj.weight'
    if method == 'fp8':
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    else:
        weights[name] = weights[name].to(torch.uint8)
    save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))
    edit_config(folder, quantization_config=QUANTIZED[method])


def commands_on(folder):
    yield 'lvlm_score', folder, 's', *DATA
    yield 'lvlm_score', folder, 's', *DATA, '--dry_run'
    yield 'lvlm_prune', folder, 'p', '--plan', 'plan.json'
    yield 'lvlm_recover', folder, 'r', *DATA
    yield 'lvlm_recover', folder, 'r', *DATA, '--dry_run'
    yield 'lvlm_recover', 'deep/m', 'r', *DATA, '--teacher', folder, '--recipe', 'sft+kl'
    yield 'lvlm_evaluate', folder, '--limit', 1


def all_refuse(run, work, folder, *texts):
    "Every command refuses a folder in one sentence; True where nothing was written."
    before = snapshot(work)
    for words in commands_on(folder):
        status, out, err = run(*words)
        assert status == 2 and out == '' and err.count('\n') == 1, (words, err)
        assert all(text in err for text in texts), (words, err)
    status, out, _ = run('lvlm_doctor', folder)
    assert status == 1 and all(text in out for text in texts)
    return snapshot(work) == before


WAYS = dict(
    bitsandbytes='call its dequantize()',
    unnamed_bitsandbytes='call its dequantize()',
    awq='awq has no way back',
    gptq='gptq has no way back',
    fp8='FineGrainedFP8Config(dequantize=True)',
    gguf='GgufConfig(dequantize=True)',
    new='something-new has no way back',
)


@pytest.mark.parametrize('method', QUANTIZED)
def test_quantized_sources_are_refused_by_every_command(run, work, method):
    quantized_folder(work / 'q', method)
    plan = Plan.of(lm_like(), layers=range(4), mlp_channels={i: range(64) for i in range(4)})
    (work / 'plan.json').write_text(plan.to_json())
    assert all_refuse(run, work, 'q', 'q is quantized', WAYS[method])


@pytest.mark.parametrize('name', ['quantize_config.json', 'quant_config.json'])
def test_quantized_by_a_file_beside(run, work, name):
    lm(work / 'q')
    (work / 'q' / name).write_text('{"bits": 4}')
    assert all_refuse(run, work, 'q', 'q is quantized', name, 'prune first, quantize afterwards')


def test_a_part_that_is_quantized_and_an_original_layout(run, work):
    shutil.copytree(work / 'deep' / 'm', work / 'q')
    weights = load_file(work / 'q' / 'model.safetensors')
    save_file(weights | {'x': torch.zeros(1, dtype=torch.int8)}, work / 'q' / 'model.safetensors')
    text = json.loads((work / 'q' / 'config.json').read_text())['text_config']
    edit_config(work / 'q', text_config=text | dict(quantization_config=QUANTIZED['awq']))
    assert all_refuse(run, work, 'q', 'q is quantized (awq)')
    edit_config(work / 'q', architectures=['LlavaLlamaForCausalLM'], model_type='llava_llama')
    assert all_refuse(run, work, 'q', 'q is quantized (awq)')


def entry_of(folder):
    return json.loads((folder / 'config.json').read_text()).get('quantization_config')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dense_weights_that_count_as_gguf_carry_no_entry(tmp_path, dtype):
    model = lm(tmp_path / 'm')
    edit_config(tmp_path / 'm', quantization_config=QUANTIZED['gguf'])
    lvlm = load_lvlm(tmp_path / 'm', dtype)
    plan = Plan.of(lvlm, layers=range(4))
    on_disk = prune_checkpoint(tmp_path / 'm', tmp_path / 'p', plan)
    rows = [dict(r, images=[], messages=text_only(r)) for r in instructions('recovery', 2)]
    recover(apply_plan(lvlm, plan), texts(rows), trainable='lora', out=tmp_path / 'r', progress=False, batch_size=2)
    for folder in (on_disk, tmp_path / 'r' / 'model', save_lvlm(lvlm, tmp_path / 's')):
        assert entry_of(folder) is None and doctor(folder).ok.all()
        AutoModelForCausalLM.from_pretrained(folder)
    # and as transformers leaves a model that it has loaded from a GGUF file
    model.config.quantization_config = GgufConfig()
    model.hf_quantizer, model.quantization_method, model.is_quantized = object(), QuantizationMethod.GGUF, True
    lvlm = LVLM(model, name='mine')
    for wrapped in (lvlm, apply_plan(lvlm, plan)):
        wrapped.model.to(torch.bfloat16).float()
        assert entry_of(save_lvlm(wrapped, tmp_path / 'w', force=True)) is None


def test_other_entries_beside_dense_weights_are_refused(run, work):
    lm(work / 'q')
    edit_config(work / 'q', quantization_config=QUANTIZED['awq'])
    assert all_refuse(run, work, 'q', 'q has dense weights', 'remove quantization_config')


def text_only(row):
    return [dict(m, content=m['content'].replace('<image>\n', '')) for m in row['messages'][:2]]


def texts(rows):
    return datasets.Dataset.from_list(rows, features=CONVERSATION_FEATURES)


def lm_like(**changes):
    return LVLM(LlamaForCausalLM(LlamaConfig(**SIZES | changes)), name='dense twin')


def fp8_folder(folder, block=32, **entry):
    "The maps of the layers in fp8 with a scale for each block, as DeepSeek and Qwen publish them."
    lm(folder)
    stored = {}
    for name, w in load_file(folder / 'model.safetensors').items():
        if not name.endswith('proj.weight'):
            stored[name] = w
            continue
        blocks = w.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (rows, block, columns, block)
        scale = blocks.abs().amax((1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        stored[f'{name}_scale_inv'] = scale
    save_file(stored, folder / 'model.safetensors', metadata=dict(format='pt'))
    entry = dict(quant_method='fp8', activation_scheme='dynamic', weight_block_size=[block, block]) | entry
    edit_config(folder, quantization_config=entry)


@pytest.mark.parametrize('stay', [(0, 2, 5), (1, 2, 3, 4)])
def test_whole_layers_leave_fp8_weights_with_their_scales(run, work, stay):
    fp8_folder(work / 'q')
    (work / 'plan.json').write_text(Plan.of(lm_like(), layers=stay).to_json())
    status, out, err = run('lvlm_prune', 'q', 'p', '--plan', 'plan.json', '--dry_run')
    assert status == 0, err
    assert run('lvlm_prune', 'q', 'p', '--plan', 'plan.json')[0] == 0
    before, after = (load_file(work / name / 'model.safetensors') for name in ('q', 'p'))
    want = {}
    for name, tensor in before.items():
        number = re.search(r'layers\.(\d+)\.', name)
        if not number:
            want[name] = tensor
        elif int(number[1]) in stay:
            want[name.replace(number[0], f'layers.{stay.index(int(number[1]))}.')] = tensor
    assert want.keys() == after.keys()
    assert all(torch.equal(t.view(torch.uint8), after[n].view(torch.uint8)) for n, t in want.items())
    assert entry_of(work / 'p') == entry_of(work / 'q')
    whole, cut = (AutoModelForCausalLM.from_pretrained(work / n, dtype=torch.float32) for n in ('q', 'p'))
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[i] for i in stay])
    ids = torch.arange(20)[None]
    assert torch.equal(whole(ids, use_cache=False).logits, cut(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    'entry,says',
    [
        (dict(), 'whole layers can be removed from it'),
        (dict(modules_to_not_convert=['model.layers.0.mlp']), 'is quantized (fp8)'),
        (dict(activation_scheme='static'), 'is quantized (fp8)'),
    ],
)
def test_other_cuts_of_fp8_weights_are_refused(run, work, entry, says):
    fp8_folder(work / 'q', **entry)
    widths = {} if entry else dict(mlp_channels={i: range(64) for i in range(4)})
    (work / 'plan.json').write_text(Plan.of(lm_like(), layers=range(4), **widths).to_json())
    before = snapshot(work)
    for more in ((), ('--dry_run',)):
        status, _, err = run('lvlm_prune', 'q', 'p', '--plan', 'plan.json', *more)
        assert status == 2 and says in err and 'FineGrainedFP8Config(dequantize=True)' in err and err.count('\n') == 1
    assert snapshot(work) == before


def test_adapters_are_named_as_such(run, work):
    from peft import LoraConfig, get_peft_model

    base = lm(work / 'base')
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=['q_proj']))
    peft.peft_config['default'].base_model_name_or_path = 'someone/base'
    peft.save_pretrained(work / 'alone', save_embedding_layers=False)
    shutil.copytree(work / 'base', work / 'beside')
    shutil.copytree(work / 'alone', work / 'llava_lora')
    for name in ('adapter_config.json', 'adapter_model.safetensors'):
        shutil.copy(work / 'alone' / name, work / 'beside')
    config = dict(architectures=['LlavaLlamaForCausalLM'], model_type='llava_llama', mm_projector_type='mlp2x_gelu')
    (work / 'llava_lora' / 'config.json').write_text(json.dumps(config))
    for name in ('alone', 'beside', 'llava_lora'):
        assert all_refuse(run, work, name, 'an adapter of someone/base: merge it first')
    (work / 'alone' / 'adapter_config.json').unlink()
    assert all_refuse(run, work, 'alone', 'alone is an adapter of another model: merge it first')
    merged = peft.merge_and_unload()
    merged.save_pretrained(work / 'merged')
    assert load_lvlm(work / 'merged').architecture.num_layers == 6


# --- scores that are no numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize('criterion', ['bi', 'angular', 'loss', 'wanda', 'activation', 'taylor'])
def test_scores_that_overflow_are_refused(run, work, criterion):
    "In float16 the hidden states of this model are infinite, and in float32 they are not."
    lm(work / 'big')
    weights = load_file(work / 'big' / 'model.safetensors')
    for name in weights:
        if name.endswith('down_proj.weight'):
            weights[name] *= 4e4
    text = json.loads((work / 'train.json').read_text())
    for row in text:
        del row['image']
        row['conversations'][0]['value'] = 'Say a color.'
    (work / 'text.json').write_text(json.dumps(text))
    save_file({k: v.half() for k, v in weights.items()}, work / 'big' / 'model.safetensors', metadata=dict(format='pt'))
    edit_config(work / 'big', dtype='float16')
    words = 'lvlm_score', 'big', 'nan', '--data', 'text.json', '--criteria', criterion, '--device', 'cpu'
    status, _, err = run(*words)
    assert status == 2 and 'load the model in bfloat16 or float32' in err and err.count('\n') == 1, err
    assert not (work / 'nan.json').exists()
    assert run(*words[:2], 'fine', *words[3:], '--dtype', 'float32')[0] == 0


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_stored_scores_that_are_no_numbers_are_not_pruned_by(run, work, value):
    lvlm = load_lvlm('tiny-llava')
    layers = torch.rand(1, 12)
    layers[0, 3] = value
    Scores(dict(layers=dict(bi=layers)), 'tiny-llava', parameter_sizes(lvlm), None, 4).save(work / 'bad')
    for more in ((), ('--dry_run',)):
        status, _, err = run('lvlm_prune', 'deep/m', 'p', '--scores', 'bad', *more)
        assert status == 2 and 'bi of layers is not finite' in err and err.count('\n') == 1
    assert not (work / 'p').exists()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_scores_in_memory_that_are_no_numbers_make_no_plan(value):
    lvlm = lm_like()
    rows = dict(layers=torch.rand(1, 6), kv_heads=torch.rand(1, 6, 8), mlp_channels=torch.rand(1, 6, 96))
    for kind, plan in (('layers', layer_plan), ('kv_heads', width_plan), ('mlp_channels', width_plan)):
        samples = {k: dict(bi=v.clone(), taylor=v.clone()) for k, v in rows.items()}
        for criterion in samples[kind]:
            samples[kind][criterion][0, 2] = value
        scores = Scores(samples, 'x', parameter_sizes(lvlm), None, 1)
        for how in (('bi',), ('span',), ('taylor',)) if plan is layer_plan else (('taylor',), ('bi',)):
            with pytest.raises(ValueError, match='not finite'):
                plan(scores, 0.3, *how)
    assert layer_plan(scores, 0.3).removed


# --- the type of the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize('said', ['float16', 'float32', None])
@pytest.mark.parametrize('few', ['model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight'])
def test_weights_are_loaded_as_most_are_stored(tmp_path, said, few):
    lm(tmp_path / 'm')
    weights = load_file(tmp_path / 'm' / 'model.safetensors')
    weights = {k: v.bfloat16() for k, v in weights.items()}
    save_file(weights, tmp_path / 'm' / 'model.safetensors', metadata=dict(format='pt'))
    edit_config(tmp_path / 'm', dtype=said, torch_dtype=said)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert load_lvlm(tmp_path / 'm').model.dtype == torch.bfloat16
    weights[few] = weights[few].float()
    save_file(weights, tmp_path / 'm' / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.warns(UserWarning, match='% of its numbers are stored in bfloat16, others in float32; all are loaded'):
        lvlm = load_lvlm(tmp_path / 'm')
    assert {p.dtype for p in lvlm.model.parameters()} == {torch.bfloat16}
    assert torch.equal(lvlm.model.state_dict()[few], weights[few].bfloat16())
    with pytest.raises(ValueError, match='dtype is one of'):
        load_lvlm(tmp_path / 'm', 'float16')


# --- layers that were removed by hand ---------------------------------------------------------------------------

SLICES = dict(first=[1, 2, 3, 4, 5], last=[0, 1, 2, 3, 4], middle=[0, 1, 4, 5], two=[3, 5])
SLICES['reordered'] = [1, 0, 2, 3, 4, 5]


def gemma2():
    kinds = ['sliding_attention', 'full_attention', 'full_attention'] * 2
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, layer_types=kinds, sliding_window=4)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def left_padded(n=16):
    ids = torch.arange(4, 4 + n).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize('lowered', [False, True])
@pytest.mark.parametrize('stay', SLICES)
@pytest.mark.parametrize('make', [llama, gemma2])
def test_layers_removed_by_hand_are_mended(tmp_path, make, stay, lowered):
    stay, model = SLICES[stay], make()
    plan = None if stay == SLICES['reordered'] else Plan.of(LVLM(copy.deepcopy(model)), layers=stay)
    want = apply_plan(LVLM(copy.deepcopy(model)), plan) if plan else None
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in stay])
    if lowered:
        model.config.num_hidden_layers = len(stay)
    silent = stay == SLICES['last'] and lowered and make is llama  # nothing is to be seen, and nothing is wrong
    said = 'sliced: layers were removed by hand'
    with warnings.catch_warnings() if silent else pytest.warns(UserWarning, match=said):
        lvlm = LVLM(model, name='sliced')
    assert [layer.self_attn.layer_idx for layer in lvlm.layers] == list(range(len(stay)))
    assert lvlm.config.num_hidden_layers == len(stay)
    batch = left_padded()
    words = generate_greedy(lvlm, batch)
    assert torch.equal(words, generate_greedy(lvlm, batch, cache=False))
    if plan:
        assert torch.equal(words, generate_greedy(want, batch))
        assert fingerprint(lvlm) == fingerprint(want)
    again = load_lvlm(save_lvlm(lvlm, tmp_path / 's'))
    assert torch.equal(words, generate_greedy(again, batch)) and doctor(tmp_path / 's').ok.all()


@pytest.mark.parametrize('renumbered', [False, True])
@pytest.mark.parametrize('listed', ['as it was', 'cut from its end'])
def test_kinds_of_layers_are_those_that_the_layers_hold(listed, renumbered):
    stay, model = [0, 2, 3, 5], gemma2()
    want = apply_plan(LVLM(copy.deepcopy(model)), Plan.of(LVLM(copy.deepcopy(model)), layers=stay))
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in stay])
    model.config.num_hidden_layers = len(stay)
    if listed == 'cut from its end':
        model.config.layer_types = model.config.layer_types[: len(stay)]
    if renumbered:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
    with pytest.warns(UserWarning, match='layers were removed by hand'):
        lvlm = LVLM(model)
    assert lvlm.config.layer_types == want.config.layer_types
    batch = left_padded()
    assert torch.equal(lvlm.model(**batch).logits, want.model(**batch).logits)


def test_stale_groups_are_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES | dict(num_key_value_heads=2))).eval()
    attention = model.model.layers[1].self_attn
    half = attention.q_proj.out_features // 2
    for name, axis in dict(q_proj=0, o_proj=1).items():
        linear = getattr(attention, name)
        linear.weight.data = linear.weight.data.narrow(axis, 0, half).clone()
    attention.q_proj.out_features = attention.o_proj.in_features = half
    with pytest.raises(ValueError, match='of layer 1 has .* query heads and .* KV heads, and repeats each of these'):
        LVLM(model)
    attention.num_key_value_groups = half // attention.k_proj.out_features
    batch = left_padded()
    assert LVLM(model).model(**batch).logits.isfinite().all()


def test_what_cannot_be_mended_is_refused():
    model = llama()
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (0, 1, 1, 2)])
    with pytest.raises(ValueError, match='mine: one layer stands in the list of layers twice'):
        LVLM(model, name='mine')
    model = gemma2()
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (1, 3, 5)])
    for i, layer in enumerate(model.model.layers):  # renumbered, the config left as it was, and no layer knows its kind
        layer.self_attn.layer_idx = i
        del layer.self_attn.layer_type
    with pytest.raises(ValueError, match='the config lists 6 layer_types for 3 layers'):
        LVLM(model)
    model = llama()
    model.model.layers[2].self_attn, model.model.layers[3].mlp.layer_idx = model.model.layers[3].self_attn, 1
    with pytest.raises(ValueError, match='holds modules of layers'):
        LVLM(model)


def test_a_copy_grown_by_copied_layers_is_renumbered():
    model = llama()
    layers = [copy.deepcopy(model.model.layers[i]) for i in (0, 1, 2, 2, 3, 4, 5)]
    model.model.layers = torch.nn.ModuleList(layers)
    with pytest.warns(UserWarning, match='numbered 0, 1, 2, 2, 3, 4, 5: they are 0 to 6 now'):
        lvlm = LVLM(model)
    assert lvlm.config.num_hidden_layers == 7
    assert torch.equal(generate_greedy(lvlm, left_padded()), generate_greedy(lvlm, left_padded(), cache=False))


# --- adapters in 16 bit -----------------------------------------------------------------------------------------


def trained(lvlm, **changes):
    "A student with random adapters, before and after they are merged."
    s = recovery_settings('sft', lora_rank=4, **changes)
    copied, peft = prepare_student(lvlm, s)
    torch.manual_seed(1)
    for name, p in peft.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=1e-3)
    return copied, peft


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('trainable', ['lora', 'projector+lora'])
def test_adapters_are_merged_in_float32(dtype, trainable):
    lvlm = load_lvlm('tiny-llava', dtype)
    copied, peft = trained(lvlm, trainable=trainable, bf16=True)
    for name, p in peft.named_parameters():
        assert not p.requires_grad or p.dtype == torch.float32, name
    assert {p.dtype for p in copied.part('projector').parameters() if p.requires_grad} <= {torch.float32}
    exact, rounded_twice = {}, {}
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, 'lora_A'):
            delta, w = module.get_delta_weight('default'), module.base_layer.weight
            exact[f'{name}.weight'] = (w.double() + delta.double()).detach()
            rounded_twice[f'{name}.weight'] = (w + delta.to(dtype)).detach().double()
    before = {n: p.clone() for n, p in lvlm.model.named_parameters()}
    merged = dict(merge_adapters(copied, peft, lvlm).model.named_parameters())
    assert len(exact) == 7 * 12 and all(p.dtype == dtype for p in merged.values())
    for name, want in exact.items():
        assert torch.equal(merged[name], want.float().to(dtype)), name
    error, worse = (
        sum((values[n].double() - want).square().sum() for n, want in exact.items())
        for values in (merged, rounded_twice)
    )
    assert error < worse
    untouched = set(before) - set(exact) - {n for n in before if 'projector' in n}
    assert all(torch.equal(before[n], merged[n]) for n in untouched)


@pytest.mark.parametrize('bf16', [False, True])
def test_the_adapter_beside_the_merged_model_gives_the_same(tmp_path, bf16):
    from peft import PeftModel

    student = load_lvlm(save_lvlm(load_lvlm('tiny-llava'), tmp_path / 's'))
    kw = dict(trainable='projector+lora', bf16=bf16, lora_rank=4, batch_size=2, lr=1e-3, progress=False)
    recover(student, instructions('recovery', 4), out=tmp_path / 'r', **kw)
    entry = json.loads((tmp_path / 'r' / 'adapter' / 'adapter_config.json').read_text())
    assert Path(entry['base_model_name_or_path']) == tmp_path / 's'
    again = PeftModel.from_pretrained(load_lvlm(tmp_path / 's').model, tmp_path / 'r' / 'adapter').merge_and_unload()
    merged = load_recovery(tmp_path / 'r').lvlm.model.state_dict()
    original = student.model.state_dict()
    assert any(not torch.equal(original[n], w) for n, w in merged.items())
    for name, w in again.state_dict().items():
        torch.testing.assert_close(w, merged[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_on_a_tied_model_merges_to_the_same_logits():
    torch.manual_seed(0)
    lvlm = LVLM(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval())
    copied, peft = trained(lvlm, trainable='lora', lora_alpha=64)
    ids = torch.arange(4, 24)[None]
    peft.eval()
    want = peft(ids).logits
    assert not torch.allclose(want, lvlm.model(ids).logits, atol=1e-4)
    merged = merge_adapters(copied, peft, lvlm)
    torch.testing.assert_close(merged.model(ids).logits, want, atol=1e-4, rtol=1e-3)
    assert merged.model.lm_head.weight is merged.model.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings and merged.architecture.tied


# --- what is small ----------------------------------------------------------------------------------------------


def test_scores_on_tensors_need_no_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path / 'm')
    lvlm = load_lvlm(tmp_path / 'm')
    assert isinstance(lvlm.tokenizer, MissingProcessor)
    ids = torch.randint(4, 700, (3, 12))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    criteria = ('bi', 'angular', 'taylor', 'activation', 'wanda', 'loss', 'l1')
    scores = score(lvlm, batch, criteria, tokens=True, path=tmp_path / 's')
    bare = score(LVLM(lvlm.model), batch, criteria, tokens=True)
    for kind, by_criterion in scores.samples.items():
        for criterion, rows in by_criterion.items():
            torch.testing.assert_close(rows, bare.samples[kind][criterion], equal_nan=True)


@pytest.mark.parametrize('name', ['tiny-llava', 'tiny-internvl', 'tiny-bunny', 'tiny-gqa'])
def test_the_repr_of_a_model_is_short(name):
    text = repr(load_lvlm(name))
    assert len(text.splitlines()) <= 6 and len(text) < 900 and 'Linear(' not in text


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['tiny-llava', 'tiny-internvl', 'tiny-bunny', 'tiny-gqa'])
def test_doctor_passes_good_models_in_16_bit(tmp_path, name, dtype):
    report = doctor(save_lvlm(load_lvlm(name, dtype), tmp_path / 'm'))
    assert report.ok.all(), report[~report.ok]
    assert 'a left-padded batch gives what its prompts give alone' in set(report.check)


def test_doctor_finds_what_hangs_on_padding(tmp_path, monkeypatch):
    import lvlm_study.pruning.doctor as module

    save_lvlm(lm_like(), tmp_path / 'm')
    padded = module._left_padded

    def no_mask(batch):
        batch = padded(batch)
        return batch | dict(attention_mask=torch.ones_like(batch['attention_mask']))

    monkeypatch.setattr(module, '_left_padded', no_mask)
    report = doctor(tmp_path / 'm')
    assert report[~report.ok].check.tolist() == ['a left-padded batch gives what its prompts give alone']


def test_doctor_stops_where_there_is_no_folder():
    report = doctor('/nope')
    assert len(report) == 1 and not report.ok[0] and report.detail[0] == 'nope is no folder'


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_records_say_how_they_were_asked(run, work, dtype):
    suite, words = 'small', ('lvlm_evaluate', 'deep/m', '--limit', 1, '--device', 'cpu')
    assert run(*words, '--records', 'a.parquet', '--dtype', dtype, '--batch_size', 4)[0] == 0
    origin = records_origin('a.parquet')
    assert (origin['dtype'], origin['batch_size']) == (dtype, 4)
    status, _, err = run(*words, '--records', 'a.parquet', '--dtype', dtype, '--batch_size', 5)
    assert status == 2 and 'answers in 16 bit by another batch size' in err
    lvlm = load_lvlm('tiny-llava')
    evaluate(lvlm, suite, limit=1, batch_size=4, records='b.parquet', progress=False)
    evaluate(lvlm, suite, limit=2, batch_size=8, records='b.parquet', progress=False)  # float32: goes on
    status, out, _ = run(*words, '--base', 'a.parquet', '--dtype', 'float32')
    assert status == 0 and f'the base was asked in {dtype} by 4, this model in float32 by 64' in out
    status, out, _ = run(*words, '--base', 'a.parquet', '--dtype', dtype, '--batch_size', 4)
    assert status == 0 and 'the base was asked' not in out


def test_functions_do_not_write_into_what_they_read(tmp_path):
    folder = save_lvlm(load_lvlm('tiny-llava'), tmp_path / 'deep' / 'm')
    lvlm, rows = load_lvlm(folder), instructions('recovery', 2)
    before = snapshot(tmp_path)
    for place in (folder / 'x', folder / 'config', folder / 'x' / 'y'):
        with pytest.raises(ValueError, match='which is only read'):
            score(lvlm, rows, path=place)
    for place in (folder / 'x.parquet', folder / 'config.json', folder, tmp_path / 'deep'):
        with pytest.raises(ValueError, match='which is only read'):
            evaluate(lvlm, 'small', limit=1, records=place, progress=False)
    samples = TrainingSamples(lvlm, rows)
    for place in (folder / 'x', folder, tmp_path / 'deep'):
        with pytest.raises(ValueError, match='which is only read'):
            cache_teacher(lvlm, samples, place, progress=False)
    (tmp_path / 'train.json').write_text('[1]')
    with pytest.raises(FileExistsError, match='train.json is there and holds no scores'):
        score(lvlm, rows, 'l1', path=tmp_path / 'train')
    (tmp_path / 'train.json').unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('whole', [False, True])
def test_adapters_are_named_by_hub_id_too(tmp_path, monkeypatch, whole):
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / 'hub'
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, 'HF_HUB_CACHE', str(cache))
    repo = cache / 'models--someone--lora'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text('0' * 40)
    folder = repo / 'snapshots' / ('0' * 40)
    folder.mkdir(parents=True)
    (folder / 'adapter_config.json').write_text('{"base_model_name_or_path": "someone/base"}')
    if whole:
        lm(folder)
    with pytest.raises(ValueError, match='someone/lora (is|holds) an adapter of someone/base: merge it first'):
        load_lvlm('someone/lora')


def test_the_fingerprint_covers_the_template_of_the_processor():
    lvlm = load_lvlm('tiny-llava')
    before = fingerprint(lvlm)
    lvlm.processor.chat_template = lvlm.processor.chat_template + ' '
    changed = fingerprint(lvlm)
    lvlm.tokenizer.chat_template = None
    assert len({before, changed, fingerprint(lvlm)}) == 3


def test_layers_without_a_part_are_refused(tmp_path):
    config = MistralConfig(**SIZES, head_dim=8, sliding_window=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / 'm')
    edit_config(tmp_path / 'm', per_layer_config={'1': dict(skip=['attention'])})
    for call in (load_lvlm, lambda m: prune_checkpoint(m, tmp_path / 'p', Plan.of(lm_like(), layers=range(4)))):
        with pytest.raises(ValueError, match='m: some of its layers have no attention'):
            call(tmp_path / 'm')


def test_functions_replace_no_folder_that_nothing_here_has_written(tmp_path):
    "With force as without it: a folder of somebody's own, and a file, stay as they are."
    from lvlm_study import layer_plan, load_lvlm, prune_checkpoint, save_lvlm, score
    from lvlm_study.data.toy_benchmarks import instructions

    lvlm = load_lvlm('tiny-llava')
    precious, file = tmp_path / 'precious', tmp_path / 'train.json'
    precious.mkdir()
    (precious / 'thesis.txt').write_text('x')
    file.write_text('[]')
    source = save_lvlm(lvlm, tmp_path / 'm')
    plan = layer_plan(score(lvlm, instructions('recovery', 4), criteria=('bi',), progress=False), 0.3)
    for place in (precious, file):
        with pytest.raises(FileExistsError, match='no command here has written|is a file'):
            save_lvlm(lvlm, place, force=True)
        with pytest.raises(FileExistsError, match='no command here has written|is a file'):
            prune_checkpoint(source, place, plan, force=True)
    assert (precious / 'thesis.txt').read_text() == 'x' and file.read_text() == '[]'


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    "Whole or not at all: on a full disk, or where the processor cannot be written."
    lvlm = load_lvlm('tiny-gqa')

    def fails(*args, **more):
        raise RuntimeError('no room')

    for layout in ('newest', 'older'):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match='no room'):
            patched.setattr(type(lvlm.processor), 'save_pretrained', fails)
            save_lvlm(lvlm, tmp_path / 'm', layout=layout)
        assert list(tmp_path.iterdir()) == []
    save_lvlm(lvlm, tmp_path / 'm')
    kept = sorted(p.name for p in (tmp_path / 'm').iterdir())
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(type(lvlm.processor), 'save_pretrained', fails)
        save_lvlm(load_lvlm('tiny-gqa'), tmp_path / 'm', force=True)
    assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == kept and len(list(tmp_path.iterdir())) == 1


def test_places_that_hold_no_folder(tmp_path, monkeypatch):
    lvlm = load_lvlm('tiny-gqa')
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file is a file, so x cannot lie below it'):
        save_lvlm(lvlm, tmp_path / 'file' / 'x')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match='exists already'):
        save_lvlm(lvlm, '.')
    with pytest.raises(PermissionError, match='no files can be written below /proc'):
        save_lvlm(lvlm, '/proc/x')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
