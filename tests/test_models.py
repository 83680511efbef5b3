"Loading, saving, counting and showing: mixed widths, model cards, missing processors, bad input in one sentence."

import json, shutil
from pathlib import Path
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from lvlm_study.models.random_models import random_model
from lvlm_study.models.architecture import (
    LVLM,
    PARAMETER_PARTS,
    count_config,
    count_parameters,
    paper_config,
    plot_parameters,
)
from lvlm_study.models.loading import (
    MissingProcessor,
    answer_loss,
    eval_mode,
    fingerprint,
    image_inputs,
    load_lvlm,
    model_card,
    model_inputs,
    save_lvlm,
)
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER, study_models
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan


@torch.no_grad()
def logits(lvlm):
    return lvlm.model(**zoo.inputs(lvlm)).logits


# --- pruned checkpoints ---------------------------------------------------------------------------------------------


def test_mixed_widths_load(tmp_path):
    lvlm = zoo.build('gqa')
    student = apply_plan(
        lvlm, Plan.of(lvlm, layers=[0, 1, 3], kv_heads={1: [0, 2, 3, 5]}, mlp_channels={0: range(40), 3: range(10, 90)})
    )
    again = load_lvlm(save_lvlm(student, tmp_path / 'mixed'))
    assert (
        again.architecture.heterogeneous and torch.equal(logits(again), logits(student)) and again.plan == student.plan
    )
    with pytest.raises(Exception, match='per-layer'):
        AutoModelForImageTextToText.from_pretrained(tmp_path / 'mixed')


def test_the_card_prints_the_notes_of_a_plan(tmp_path):
    lvlm = zoo.build('mha')
    student = apply_plan(lvlm, Plan.of(lvlm, kv_heads={b: range(5) for b in range(4)}))
    note = student.plan['notes'][0]
    folder = save_lvlm(student, tmp_path / 'pruned')
    assert 'saved with a mistral config' in note and f'\n\n{note}\n\n' in (folder / 'README.md').read_text()
    assert note not in model_card(lvlm) and torch.equal(logits(load_lvlm(folder)), logits(student))


def test_what_is_absent_says_so_and_is_kept(tmp_path):
    random_model('qwen2_5_vl').save_pretrained(tmp_path / 'a')
    small = dict(image_processor_type='Qwen2VLImageProcessor')
    (tmp_path / 'a' / 'preprocessor_config.json').write_text(json.dumps(small))
    lvlm = load_lvlm(tmp_path / 'a')
    for use in (lambda: image_inputs(lvlm, [zoo]), lambda: lvlm.tokenizer('x'), lambda: lvlm.tokenizer.pad_token_id):
        with pytest.raises(ValueError, match='a: its (processor|tokenizer) cannot be made here: ') as e:
            use()
        assert '\n' not in str(e.value)
    assert json.loads((save_lvlm(lvlm, tmp_path / 'b') / 'preprocessor_config.json').read_text()) == small
    assert type(load_lvlm(tmp_path / 'b').model) == type(lvlm.model)


# --- what a model shows of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [*zoo.BUILD, *study_models()])
def test_a_model_shows_itself_in_a_few_lines(name):
    lvlm = zoo.build(name) if name in zoo.BUILD else load_lvlm(name)
    n = f'{sum(p.numel() for p in lvlm.model.parameters()):,} parameters'
    for x, most in ((lvlm, 5), (lvlm.architecture, 4)):
        for text in (repr(x), x._repr_markdown_()):
            assert len(text.splitlines()) <= most and len(text) < 800 and 'Linear' not in text and 'Module' not in text
            assert f'{lvlm.architecture.num_layers} of hidden size {lvlm.architecture.hidden_size}' in text
    assert name in repr(lvlm) and n in repr(lvlm) and n in lvlm._repr_markdown_()


def test_a_pruned_model_says_what_was_removed():
    lvlm = zoo.build('mha')
    student = apply_plan(lvlm, Plan.of(lvlm, layers=[0, 2, 3], mlp_channels={0: range(40)}))
    share = 1 - count_parameters(student)['LM'] / count_parameters(lvlm)['LM']
    line = f'{share:.1%} of the language model removed'
    assert f'pruned: {line}' in repr(student) and line in model_card(student) and 'pruned' not in repr(lvlm)
    assert 'in the first; layers differ' in repr(student) and 'differ' not in repr(lvlm)


# --- telling models apart -------------------------------------------------------------------------------------------


def test_a_fingerprint_is_that_of_the_weights(tmp_path):
    a, b = (load_lvlm('tiny-llava') for _ in range(2))
    first = fingerprint(a)
    assert fingerprint(b) == first and fingerprint(load_lvlm(save_lvlm(a, tmp_path / 'other-name'))) == first
    for change in (
        lambda: b.part('head').weight.data[-1, -1].add_(1e-3),
        lambda: setattr(b.tokenizer, 'chat_template', 'another'),
        lambda: b.model.to(torch.float16),
    ):
        before = fingerprint(b)
        change()
        assert fingerprint(b) != before


def test_a_fingerprint_needs_no_tokenizer(tmp_path):
    random_model('llama').save_pretrained(tmp_path / 'bare')
    bare = load_lvlm(tmp_path / 'bare')
    assert isinstance(bare.tokenizer, MissingProcessor) and fingerprint(bare) == fingerprint(LVLM(bare.model))


# --- asking ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_answers_is_that_of_all_logits():
    lvlm = zoo.build('gqa')
    batch = zoo.inputs(lvlm)
    labels = torch.full_like(batch['input_ids'], -100)
    labels[0, -3:] = batch['input_ids'][0, -3:]
    labels[1, -7:-2] = batch['input_ids'][1, -7:-2]
    with torch.no_grad():
        losses, all_logits = answer_loss(lvlm, batch | dict(labels=labels)), logits(lvlm).float()
    for i, loss in enumerate(losses):
        at = (labels[i] != -100).nonzero()[:, 0]
        want = torch.nn.functional.cross_entropy(all_logits[i, at - 1], labels[i, at])
        assert abs(want - loss) < 1e-5
    labels[1] = -100
    for bad, text in ((batch, 'has no labels'), (batch | dict(labels=labels), 'no answer tokens in sample 1')):
        with pytest.raises(ValueError, match=text):
            answer_loss(lvlm, bad)


def test_modules_get_their_modes_back():
    model = zoo.build('mha').model
    model.train()
    model.lm_head.eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        1 / 0
    assert [m.training for m in model.modules()] == before


def test_inputs_take_the_type_of_the_weights():
    lvlm = zoo.build('phi')
    lvlm.model.to(torch.bfloat16)
    batch = zoo.inputs(lvlm)
    got = model_inputs(lvlm, batch | dict(labels=batch['input_ids']))
    assert got.keys() == batch.keys() and got['pixel_values'].dtype == torch.bfloat16
    assert got['input_ids'].dtype == torch.int64 and torch.equal(got['input_ids'], batch['input_ids'])


# --- counts ---------------------------------------------------------------------------------------------------------


def exact(lvlm):
    n = count_parameters(lvlm)
    parts = {k: n[k] for k in (*PARAMETER_PARTS.values(), 'other') if k in n}
    own = sum(p.numel() for p in lvlm.model.parameters())
    lm = {id(p): p.numel() for k in ('embed', 'layers', 'norm', 'head') for p in lvlm.part(k).parameters()}
    return n['total'] == own == sum(parts.values()) and n['LM'] == sum(lm.values())


@pytest.mark.parametrize('name', study_models())
def test_counts_of_study_models(name):
    assert exact(load_lvlm(name))


@pytest.mark.parametrize('name', zoo.BUILD)
def test_counts_of_every_shape(name):
    assert exact(zoo.build(name))


@pytest.mark.parametrize('t', ['blip-2', 'deepseek_vl', 'paligemma', 'cosmos3_edge', 'llama'])
def test_counts_of_other_models(t):
    assert exact(LVLM(random_model(t)))


def test_what_belongs_to_no_part_is_counted_apart():
    lvlm = zoo.build('mha')
    lvlm.model.model.register_parameter('extra', torch.nn.Parameter(torch.zeros(7)))
    assert count_parameters(lvlm)['other'] == 7 and exact(lvlm) and 'other' not in count_parameters(zoo.build('mha'))
    assert plot_parameters({'x': count_parameters(lvlm)}).patches


PAPER = {'LLaVA-v1.5-7B': 96, 'Mini-InternVL-Chat-4B-V1-5': 93, 'Bunny-v1.0-3B': 88}  # Table 1 and the project page


@pytest.fixture(scope='module')
def real():
    return {k: count_config(paper_config(k)) for k in PAPER}


def test_the_shares_of_the_paper(real):
    tenths = {k: [round(n[p] / 1e9, 1) for p in ('LM', 'vision encoder', 'projector')] for k, n in real.items()}
    assert {k: int(100 * p[0] / sum(p) + 0.5) for k, p in tenths.items()} == PAPER
    assert tenths == {
        'LLaVA-v1.5-7B': [6.7, 0.3, 0.0],
        'Mini-InternVL-Chat-4B-V1-5': [3.8, 0.3, 0.0],
        'Bunny-v1.0-3B': [2.8, 0.4, 0.0],
    }  # as its Table 1 prints them
    assert all(
        0 <= PAPER[k] - 100 * n['LM'] / n['total'] < 1 for k, n in real.items()
    )  # exactly, each is a little less


def test_counts_agree_with_the_published_files(real):
    n = real['LLaVA-v1.5-7B']  # float16, and 32 tables of 64 rotary frequencies in float32
    assert 2 * (n['LM'] + n['projector']) + 32 * 64 * 4 == 13_518_798_848  # total_size of its index
    n = real['Bunny-v1.0-3B']  # two shards of float16, each with a header
    assert 0 < 4_990_950_824 + 1_373_673_760 - 2 * n['total'] < 200_000


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'LLaVA-13B' is not a model of the paper"):
        paper_config('LLaVA-13B')


# --- bad input: one sentence each -------------------------------------------------------------------------------------


def reconfigure(f, text=None, **kw):
    c = json.loads((f / 'config.json').read_text()) | kw
    c['text_config'] |= text or {}
    (f / 'config.json').write_text(json.dumps(c))


def without(f, *names, **more):
    w = load_file(f / 'model.safetensors')
    save_file(
        {k: v for k, v in w.items() if k not in names} | more, f / 'model.safetensors', metadata=dict(format='pt')
    )


def truncate(p):
    p.write_bytes(p.read_bytes()[:-500])


KEY = 'language_model.model.layers.3.mlp.up_proj.weight'
BAD = {
    'no config': (
        lambda f: (f / 'config.json').unlink(),
        FileNotFoundError,
        'm is no checkpoint folder: it has no config.json',
    ),
    'damaged config': (lambda f: truncate(f / 'config.json'), ValueError, 'm/config.json is no JSON'),
    'a list for a config': (lambda f: (f / 'config.json').write_text('[]'), ValueError, 'm/config.json holds a list'),
    'unknown type': (
        lambda f: reconfigure(f, model_type='lava'),
        ValueError,
        "m: model_type 'lava' is not one that transformers knows",
    ),
    'no type': (
        lambda f: (f / 'config.json').write_text('{}'),
        ValueError,
        'm: model_type None is not one that transformers knows',
    ),
    'code beside': (
        lambda f: reconfigure(f, model_type='lava', auto_map=dict(AutoConfig='x.X')),
        ValueError,
        'the Python files that come with it are not run',
    ),
    'truncated': (
        lambda f: truncate(f / 'model.safetensors'),
        ValueError,
        'm/model.safetensors is truncated or damaged: ',
    ),
    'empty file': (
        lambda f: (f / 'model.safetensors').write_bytes(b''),
        ValueError,
        'm/model.safetensors is truncated or damaged: 0 bytes',
    ),
    'no weights': (
        lambda f: (f / 'model.safetensors').unlink(),
        FileNotFoundError,
        'm has no model.safetensors: weights are read from safetensors only',
    ),
    'only a pickle': (
        lambda f: [(f / 'model.safetensors').unlink(), torch.save({}, f / 'pytorch_model.bin')],
        FileNotFoundError,
        'weights are read from safetensors only',
    ),
    'a key missing': (
        lambda f: without(f, KEY),
        ValueError,
        'm: the weights do not fit the config: missing: model.language_model.layers.3.mlp.up_proj.weight',
    ),
    'a key too many': (
        lambda f: without(f, **{'language_model.model.layers.3.mlp.router.weight': torch.ones(2)}),
        ValueError,
        'unexpected: model.language_model.layers.3.mlp.router.weight',
    ),
    'wider than its weights': (
        lambda f: reconfigure(f, dict(intermediate_size=512)),
        ValueError,
        'misshapen: model.language_model.layers.{0-11}.mlp.down_proj.weight is 128x384, the config says 128x512',
    ),
    'deeper than its weights': (
        lambda f: reconfigure(f, dict(num_hidden_layers=13)),
        ValueError,
        'missing: model.language_model.layers.12.',
    ),
    'flatter than its weights': (
        lambda f: reconfigure(f, dict(num_hidden_layers=11)),
        ValueError,
        'unexpected: model.language_model.layers.11.',
    ),
    'contradiction': (
        lambda f: reconfigure(f, dict(num_attention_heads=7)),
        ValueError,
        'm/config.json is not consistent',
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(tmp_path, what):
    spoil, error, says = BAD[what]
    shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', tmp_path / 'm')
    spoil(tmp_path / 'm')
    with pytest.raises(error) as e:
        load_lvlm(tmp_path / 'm')
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 2000, str(e.value)


def test_a_lost_shard_is_named(tmp_path):
    lvlm = load_lvlm('tiny-llava')
    lvlm.model.save_pretrained(tmp_path / 'm', max_shard_size='4MB')
    shards = sorted(Path(tmp_path / 'm').glob('*.safetensors'))
    assert len(shards) > 1 and load_lvlm(tmp_path / 'm').architecture == lvlm.architecture
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f'm has no {shards[-1].name}'):
        load_lvlm(tmp_path / 'm')


@pytest.mark.parametrize('name, says', [('tiny-lava', 'neither a study model'), ('someone/nothing', 'someone/nothing')])
def test_a_name_that_is_nowhere(name, says):
    with pytest.raises(FileNotFoundError, match=says) as e:
        load_lvlm(name)
    assert '\n' not in str(e.value)


def test_a_model_with_a_plan_in_old_words_is_refused():
    lvlm = load_lvlm('tiny-llava')
    with pytest.raises(ValueError, match='the plan of cut has no shares: it was written in old words'):
        LVLM(lvlm.model, lvlm.processor, name='cut', plan=dict(blocks=[0], realised=dict(lm=0.3)))
