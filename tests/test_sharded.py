"""Two processes train as one does, divided or not, and go on where another number of processes stopped."""

import copy
import json
import subprocess
import sys
import pytest
import torch
from transformers import LlamaConfig, LlavaForConditionalGeneration
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.models.safetensors_files import read_header, weight_files
from lvlm_study.recovery import sharded
from lvlm_study.recovery.losses import TrainingSamples
from lvlm_study.recovery.recovery import recover
from lvlm_study.recovery.sharded import recover_sharded

SETTINGS = dict(max_steps=4, batch_size=4, lora_rank=4, save_every=2)
WORKER = """
import sys, torch
import torch.distributed as dist
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.models.loading import load_lvlm
from lvlm_study.recovery import sharded
folder, rank = sys.argv[1], int(sys.argv[2])
settings = eval(sys.argv[3])
dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
lvlm = load_lvlm('tiny-llava')
train = sharded.TrainingSamples(lvlm, instructions('recovery', 12))
for strategy in ('fsdp', 'ddp'):
    teacher = load_lvlm('tiny-llava')
    r = sharded.recover_sharded(lvlm, train, 'sft+hidden', teacher, f'{folder}/{strategy}', strategy, **settings)
    if rank == 0: r.curves.to_json(f'{folder}/{strategy}.json', orient='records')
plain = sharded._save_checkpoint
def stop(*args):
    plain(*args)
    dist.barrier()
    raise KeyboardInterrupt
sharded._save_checkpoint = stop
try:
    sharded.recover_sharded(lvlm, train, 'sft+hidden', load_lvlm('tiny-llava'), f'{folder}/killed', 'fsdp', **settings)
except KeyboardInterrupt:
    print('stopped')
sharded._save_checkpoint = plain
teacher = load_lvlm('tiny-llava')
resumed = sharded.recover_sharded(lvlm, train, 'sft+hidden', teacher, f'{folder}/alone', 'fsdp', **settings)
if rank == 0: resumed.curves.to_json(f'{folder}/alone.json', orient='records')
tied = load_lvlm(f'{folder}/tied-original')
train = sharded.TrainingSamples(tied, instructions('recovery', 12))
for strategy in ('fsdp', 'ddp'):
    r = sharded.recover_sharded(
        tied, train, 'sft+hidden', load_lvlm(f'{folder}/tied-original'), f'{folder}/tied-{strategy}', strategy,
        trainable='projector+lm', **settings
    )
    if rank == 0: r.curves.to_json(f'{folder}/tied-{strategy}.json', orient='records')
dist.destroy_process_group()
"""


def stop_after_two(monkeypatch):
    "The first checkpoint is the last thing that a training does."
    plain = sharded._save_checkpoint

    def stop(*args):
        plain(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded, '_save_checkpoint', stop)


def tied_llava():
    "tiny-llava with a language model in SmolLM2's shape: few KV heads, and a head that is the embeddings."
    lvlm = load_lvlm('tiny-llava')
    config = copy.deepcopy(lvlm.config)
    sizes = dict(hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6)
    given = {k: getattr(config.text_config, k) for k in ('vocab_size', 'max_position_embeddings')}
    ids = {k: getattr(config.text_config, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    config.text_config = LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **sizes, **given, **ids)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    return LVLM(model, lvlm.processor, lvlm.tokenizer, name='tied')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two processes: trained divided, trained with whole copies, and stopped after two of four steps.

    They also go on with what one process began, and train a model whose head is its embeddings."""
    folder = tmp_path_factory.mktemp('sharded')
    lvlm = load_lvlm('tiny-llava')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_two(patch)
        recover_sharded(lvlm, instructions('recovery', 12), 'sft+hidden', lvlm, folder / 'alone', 'ddp', **SETTINGS)
    save_lvlm(tied_llava(), folder / 'tied-original')
    command = [sys.executable, '-c', WORKER, str(folder)]
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen([*command, str(rank), repr(SETTINGS)], stdout=pipe, stderr=pipe, text=True)
        for rank in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=1200)
        assert run.returncode == 0 and 'stopped' in out, err[-1500:]
    return folder


@pytest.fixture(scope='module')
def alone():
    "The same training by `recover`, in one process."
    lvlm = load_lvlm('tiny-llava')
    train = TrainingSamples(lvlm, instructions('recovery', 12))
    return train, recover(lvlm, train, 'sft+hidden', load_lvlm('tiny-llava'), progress=False, **SETTINGS)


def weights_apart(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize('strategy', ['fsdp', 'ddp'])
def test_two_processes_as_one(trained, alone, strategy):
    curves = json.loads((trained / f'{strategy}.json').read_text())
    for term in ('sft', 'hidden', 'grad_norm', 'lr'):
        ours, theirs = [c[term] for c in curves], list(alone[1].curves[term])
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5), term
    saved = load_lvlm(trained / strategy / 'model')
    assert weights_apart(saved.model, alone[1].lvlm.model) < 2e-3
    assert weights_apart(saved.model, load_lvlm('tiny-llava').model) > 1e-3
    assert (trained / strategy / 'adapter' / 'adapter_model.safetensors').exists()


def test_goes_on_with_another_number_of_processes(trained, alone):
    assert not (trained / 'killed' / 'model').exists()
    teacher = load_lvlm('tiny-llava')
    result = recover_sharded(teacher, alone[0], 'sft+hidden', teacher, trained / 'killed', 'ddp', **SETTINGS)
    assert result.steps == 4
    assert list(result.curves.sft) == pytest.approx(list(alone[1].curves.sft), rel=2e-3)
    assert weights_apart(result.lvlm.model, alone[1].lvlm.model) < 2e-3


def test_two_processes_go_on_with_what_one_began(trained, alone):
    curves = json.loads((trained / 'alone.json').read_text())
    assert [c['step'] for c in curves] == [1, 2, 3, 4]
    assert [c['sft'] for c in curves] == pytest.approx(list(alone[1].curves.sft), rel=2e-3)
    assert weights_apart(load_lvlm(trained / 'alone' / 'model').model, alone[1].lvlm.model) < 2e-3


def test_a_head_that_is_the_embeddings_stays_tied(trained):
    "All of the language model is trained; losses and weights are those of one process, and the head is stored once."
    lvlm = load_lvlm(trained / 'tied-original')
    train = TrainingSamples(lvlm, instructions('recovery', 12))
    given = dict(trainable='projector+lm', progress=False)
    whole = recover(lvlm, train, 'sft+hidden', load_lvlm(trained / 'tied-original'), **given, **SETTINGS)
    for strategy in ('fsdp', 'ddp'):
        curves = json.loads((trained / f'tied-{strategy}.json').read_text())
        for term in ('sft', 'hidden', 'grad_norm'):
            assert [c[term] for c in curves] == pytest.approx(list(whole.curves[term]), rel=2e-3, abs=1e-5), term
        saved = load_lvlm(trained / f'tied-{strategy}' / 'model')
        head, embed = saved.part('head').weight, saved.part('embed').weight
        assert head is embed and not torch.equal(embed, lvlm.part('embed').weight)
        stored = {k for path in weight_files(trained / f'tied-{strategy}' / 'model') for k in read_header(path)}
        assert sum('lm_head' in k or 'embed_tokens' in k for k in stored) == 1
        assert weights_apart(saved.model, whole.lvlm.model) < 2e-3


def test_asking_for_shares_and_getting_none_is_an_error(alone):
    lvlm = load_lvlm('tiny-llava')
    with pytest.raises(ValueError, match='there is one: launch with torchrun'):
        recover_sharded(lvlm, alone[0], 'sft', strategy='fsdp')
    with pytest.raises(ValueError, match='strategy is one of'):
        recover_sharded(lvlm, alone[0], 'sft', strategy='zero')
    with pytest.raises(ValueError, match='accumulation is not offered'):
        recover_sharded(lvlm, alone[0], 'sft', strategy='ddp', accumulation=2)
    with pytest.raises(ValueError, match='bf16 is not offered'):
        recover_sharded(lvlm, alone[0], 'sft', strategy='ddp', bf16=True)
    with pytest.raises(ValueError, match='encoder of the model that the samples were encoded for is another one'):
        recover_sharded(tied_llava(), alone[0], 'sft', strategy='ddp')
    assert torch.is_grad_enabled()


def test_faster_products_train_the_same(alone):
    "Three steps with other products: losses as before, to the rounding of each."
    lvlm = load_lvlm('tiny-llava')
    for precision, most in (('float32', 1e-4), ('bfloat16', 2e-2)):
        result = recover(
            lvlm, alone[0], 'sft+hidden', load_lvlm('tiny-llava'), progress=False, precision=precision, **SETTINGS
        )
        assert list(result.curves.sft) == pytest.approx(list(alone[1].curves.sft), rel=most), precision
        assert not any('forward' in m.__dict__ for m in lvlm.model.modules())
    with pytest.raises(ValueError, match='precision is one of'):
        recover(lvlm, alone[0], precision='half')
