"""Checkpoints as people have them, handled as transformers does or refused in one sentence.

Stale indexes, heads of their own, quantized weights, adapters, files that do not fit their config; and no command
writes over what it reads."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fastcore.script import _run_cli
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.importance.importance import Scores
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.models.random_models import random_model
from lvlm_study.models.safetensors_files import kept_aside, refuse_overlap, weight_files
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.recovery.recovery import recover
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
def run(monkeypatch, capsys):
    "Call a command as its script does: (status, standard output, standard error)"

    def f(command, *words):
        monkeypatch.setattr(sys, 'argv', [command, *map(str, words)])
        capsys.readouterr()
        try:
            status = _run_cli(getattr(commands, command).__wrapped__, True)
        except SystemExit as e:
            status = e.code
        got = capsys.readouterr()
        return status, got.out, got.err

    return f


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


@pytest.mark.parametrize('method', QUANTIZED)
def test_quantized_sources_are_refused_by_every_command(run, work, method):
    quantized_folder(work / 'q', method)
    assert all_refuse(run, work, 'q', 'q is quantized', 'prune first, quantize afterwards')


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


def test_dense_weights_that_count_as_gguf(run, work):
    model = lm(work / 'q')
    edit_config(work / 'q', quantization_config=QUANTIZED['gguf'])
    assert all_refuse(run, work, 'q', 'q has dense weights', 'GgufConfig(dequantize=True)')
    model.config.quantization_config = QUANTIZED['gguf']
    lvlm = LVLM(model, name='mine')
    before = snapshot(work)
    with pytest.raises(ValueError, match=r'mine has dense weights.*GgufConfig\(dequantize=True\)'):
        save_lvlm(lvlm, work / 'saved')
    with pytest.raises(ValueError, match=r'mine has dense weights.*GgufConfig\(dequantize=True\)'):
        apply_plan(lvlm, Plan.of(lvlm, layers=range(4)))
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
