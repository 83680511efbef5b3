"""Checkpoints in the shape that people download: the same tokens as their own processors make, the same loss and the
same answers as the stock model, and each step of the way done, or refused in one sentence."""

import json
import shutil
import pytest
import torch
import published as P
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available
from lvlm_study.core.store import read_rows
from lvlm_study.data.instruction_data import Collator, answer_spans, confirm_ids, prompt_and_answer
from lvlm_study.evaluation.evaluate import answer_batch
from lvlm_study.importance.calibration import CalibrationSet, split_batch
from lvlm_study.importance.importance import score
from lvlm_study.models.loading import FEATURE_TYPES, MissingProcessor, load_lvlm, processed_images, save_lvlm
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.model_types import checkpoint_table
from lvlm_study.recovery.losses import TrainingSamples
from lvlm_study.recovery.recovery import recover
from lvlm_study.recovery.teacher_cache import cache_teacher

NEEDS_TORCHVISION = {'llava_onevision', 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'smolvlm', 'mistral3', 'pixtral'}
NO_TEMPLATE = {'vicuna', 'phi2'}
GOOD = ('equal', 'yes', '')


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "Each checkpoint is written once, when it is asked for."
    root, done = tmp_path_factory.mktemp('published'), {}

    def get(name):
        if name not in done:
            done[name] = P.publish(name, root / name)
        return done[name]

    return get


def loaded(folders, name, compared=False):
    "A model, and skipped where its processor, or the one it is compared with, needs torchvision."
    lvlm = load_lvlm(folders(name))
    if isinstance(lvlm.processor, MissingProcessor):
        assert name in NEEDS_TORCHVISION and 'Torchvision' in lvlm.processor.message
        pytest.skip(lvlm.processor.message)
    if compared and name == 'internvl' and not is_torchvision_available():
        pytest.skip('the processor of transformers for internvl needs torchvision')
    return lvlm


@pytest.fixture(scope='module')
def stored():
    return checkpoint_table()


# --- the stored table -------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_in_the_table(stored):
    assert set(stored.index) == set(P.ALL) and len(P.ALL) >= 21
    assert not [r['run'] for r in read_rows('checkpoints').values() if 'text' not in r]


def test_ids_are_equal_for_all_types_that_read_pictures(stored):
    columns = [f'{kind} {n}' for kind in ('training', 'generation') for n in (1, 2)]
    assert (stored.loc[list(P.VISION), columns] == 'equal').all(axis=None) and len(P.VISION) == 14
    without = stored.loc[list(P.VISION), ['training 0', 'generation 0']].drop('paligemma')
    assert (without == 'equal').all(axis=None)
    assert stored['training 0']['paligemma'].endswith('PaliGemmaProcessor reads no question without a picture')


def test_what_the_table_refuses_has_a_sentence(stored):
    bad = stored.drop(columns=['type', 'processor']).stack()
    bad = bad[~bad.isin(GOOD)]
    assert bad.str.startswith('refused: ').all()
    assert {name for name, _ in bad.index} == NO_TEMPLATE | {'paligemma', 'qwen2_vl', 'qwen2_5_vl'}
    assert set(bad[bad.str.contains('cannot be cut')].index.get_level_values(0)) == {'qwen2_vl', 'qwen2_5_vl'}


FEW = ('llava_next', 'paligemma', 'internvl', 'vicuna')


@pytest.mark.parametrize('name', [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in P.ALL])
def test_the_table_is_what_comes_out(stored, folders, tmp_path, name):
    loaded(folders, name, compared=True)
    row = P.trial(name, tmp_path)
    assert row == {k: v for k, v in stored.loc[name].to_dict().items() if v != '' or k in row}


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('question', [P.LAST, P.BETWEEN])
@pytest.mark.parametrize('name', [n for n in P.VISION if n != 'internvl'])
def test_pictures_in_other_places(folders, name, question):
    lvlm = loaded(folders, name)
    assert P.compare_inputs(lvlm, question, prompt=False) == P.compare_inputs(lvlm, question, prompt=True) == 'equal'


def test_internvl_reads_pictures_where_they_stand(folders):
    "Its template takes texts as they are, and writes a line end behind each picture of a list."
    lvlm = loaded(folders, 'internvl')
    batch = Collator(lvlm)([P.sample(P.BETWEEN, 'no')])
    text = lvlm.tokenizer.decode(batch['input_ids'][0])
    assert text.count('</img> like <img>') == 1 and text.count('</img>?') == 1


@pytest.mark.parametrize('prompt', [False, True])
@pytest.mark.parametrize('name', P.ALL)
def test_padding_changes_no_row(folders, name, prompt):
    if name in NO_TEMPLATE:
        pytest.skip('no template')
    lvlm = loaded(folders, name)
    rows = P.rows_for(lvlm)
    collate = Collator(lvlm, prompt=prompt)
    batch = collate(rows)
    per_token = [k for k, v in batch.items() if v.shape[:2] == batch['input_ids'].shape]
    for i, row in enumerate(rows):
        alone, real = collate([row]), batch['attention_mask'][i].bool()
        assert real.all() or bool(real[0]) != prompt  # on the left for prompts, on the right for training
        assert all(torch.equal(batch[k][i][real], alone[k][0]) for k in per_token)


@pytest.mark.parametrize('name', ['gemma3', 'qwen2', 'llama2', 'qwen3', 'internvl'])
def test_every_answer_of_a_conversation_has_labels(folders, name):
    lvlm = loaded(folders, name)
    messages = [
        m for q, a in (('Is it?', 'no'), ('A color?', 'red'), ('And?', 'two of them')) for m in prompt_and_answer(q, a)
    ]
    labels = Collator(lvlm)([dict(id='a', images=[], messages=messages)])['labels'][0]
    said = lvlm.tokenizer.decode(labels[labels != -100])
    assert [said.index(a) for a in ('no', 'red', 'two of them')] == sorted(
        said.index(a) for a in ('no', 'red', 'two of')
    )
    end = {'gemma3': '<end_of_turn>', 'llama2': '</s>'}.get(name, '<|im_end|>')
    assert said.count(end) == 3 and not any(q in said for q in ('Is it', 'color', 'And', 'user'))


def test_an_earlier_answer_that_is_written_otherwise(folders):
    "Qwen-3 writes an empty thought before the last answer alone."
    lvlm = loaded(folders, 'qwen3')
    messages = prompt_and_answer('Is it?', 'no') + prompt_and_answer('A color?', 'red')
    text, spans = answer_spans(lvlm, messages)
    assert [text[a:b] for a, b in spans] == ['no<|im_end|>\n', '<think>\n\n</think>\n\nred<|im_end|>\n']


def test_a_template_that_drops_earlier_answers_is_refused(folders):
    lvlm = load_lvlm(folders('qwen2'))
    lvlm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    )
    messages = prompt_and_answer('Is it?', 'no') + prompt_and_answer('A color?', 'red')
    with pytest.raises(ValueError, match='rewrites earlier turns'):
        answer_spans(lvlm, messages)


# --- the processor has the last word ----------------------------------------------------------------------------------


def test_a_processor_that_makes_other_tokens_is_refused(folders, monkeypatch):
    lvlm = loaded(folders, 'gemma3')
    kind, row = type(lvlm.processor), P.sample(P.ASKED[1], 'red')
    original = kind.__call__
    monkeypatch.setattr(kind, '__call__', lambda self, **kw: original(self, **kw) | dict(input_ids=[[2, 3, 4]]))
    for call in (lambda: Collator(lvlm)([row]), lambda: TrainingSamples(lvlm, P.as_dataset([row]))):
        with pytest.raises(ValueError, match="sample 'a': Gemma3Processor makes other tokens of it"):
            call()


def test_an_input_that_is_not_made_here_is_named(folders, monkeypatch):
    lvlm = loaded(folders, 'gemma3')
    monkeypatch.setattr(type(lvlm.processor), 'return_mm_token_type_ids', False)
    original = type(lvlm.processor).__call__
    monkeypatch.setattr(
        type(lvlm.processor), '__call__', lambda self, **kw: original(self, **kw) | dict(token_type_ids=[[0]])
    )
    with pytest.raises(ValueError, match='Gemma3Processor gives the model token_type_ids, which is not made here'):
        confirm_ids(lvlm, P.sample(P.ASKED[1], 'red'))


def test_what_a_processor_refuses_is_one_sentence(folders):
    lvlm = loaded(folders, 'paligemma')
    twice = P.sample(P.ASKED[1], 'red')
    twice['messages'] += prompt_and_answer('And?', 'blue')
    with pytest.raises(ValueError, match="sample 'a': PaliGemmaProcessor reads one question and one answer") as e:
        Collator(lvlm)([twice])
    assert '\n' not in str(e.value)


# --- recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', P.VISION)
def test_loss_of_recovery_with_pictures_in_other_places_and_without_kept_features(folders, name):
    lvlm = loaded(folders, name, compared=True)
    rows = [P.sample(P.ASKED[2], 'red', 3), P.sample(P.ASKED[1], 'a blue dog', 5, 'b')]
    rows += [P.sample(P.LAST, 'no', 7, 'c')] * (name != 'internvl')
    stock = type(lvlm.model).from_pretrained(folders(name)).eval()
    want = P.stock_loss(stock, lvlm, rows)
    assert P.recovery_loss(lvlm, rows) == pytest.approx(want, rel=1e-4)
    assert P.recovery_loss(lvlm, rows, feature_gb=0.0) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize('name', ['llava_15', 'llava_next', 'gemma3', 'idefics3', 'internvl'])
def test_a_teacher_cache_of_models_that_pack_features(folders, tmp_path, name):
    lvlm = loaded(folders, name)
    rows = P.as_dataset(P.rows_for(lvlm))
    samples = TrainingSamples(lvlm, rows)
    assert samples.keeps_features == (lvlm.config.model_type in FEATURE_TYPES)
    cache = cache_teacher(lvlm, samples, tmp_path / 'c', top=4, progress=False)
    settings = dict(trainable='projector', batch_size=4, max_steps=1, progress=False, by_length=False)
    live, cached = (recover(lvlm, samples, 'kl', t, **settings).curves.kl[0] for t in (lvlm, cache))
    assert live == pytest.approx(0, abs=1e-5) and cached == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize('name', ['gemma3', 'llava_next', 'idefics3'])
def test_scores_do_not_depend_on_the_batch(folders, name):
    lvlm = loaded(folders, name)
    rows = P.as_dataset(P.rows_for(lvlm))
    one, many = (score(lvlm, rows, criteria=('bi', 'taylor'), batch_size=n) for n in (1, 4))
    for key, values in one.samples.items():
        torch.testing.assert_close(many.samples[key], values, rtol=1e-3, atol=1e-5)


def test_batches_of_packed_pictures_are_not_shared_out_by_guessing(folders):
    lvlm = loaded(folders, 'llava_next')
    rows = P.rows_for(lvlm)
    assert [len(b['input_ids']) for b in split_batch(lvlm, CalibrationSet(lvlm, P.as_dataset(rows), 4)[0])] == [1] * 4
    with pytest.raises(ValueError, match='pixel_values, image_sizes cannot be shared out among samples'):
        split_batch(lvlm, dict(Collator(lvlm)(rows)))


@pytest.mark.parametrize('name', ['gemma3', 'llava_next', 'qwen2'])
def test_a_recovery_that_would_learn_from_nothing_never_starts(folders, tmp_path, name):
    lvlm = loaded(folders, name)
    rows = [P.sample(P.ASKED[0], 'red'), P.sample(P.ASKED[0], 'blue', id='b')]
    n = Collator(lvlm, prompt=True)(rows)['input_ids'].shape[1]
    out = tmp_path / 'out'
    with pytest.raises(ValueError, match=f"sample '[ab]': max_length={n - 1} leaves none of its answer"):
        recover(lvlm, P.as_dataset(rows), trainable='lora', max_length=n - 1, out=out, progress=False)
    assert not (out / 'model').exists()


# --- forms of files ---------------------------------------------------------------------------------------------------


def weights(lvlm):
    return lvlm.model.state_dict()


def sharded(folder):
    model = load_lvlm(folder).model
    (folder / 'model.safetensors').unlink()
    model.save_pretrained(folder, max_shard_size='60KB')
    assert len(list(folder.glob('*.safetensors'))) > 2


def stale_index(folder):
    "An index and shards of an earlier save lie beside the file that counts."
    file = folder / 'model.safetensors'
    kept = load_file(file)
    sharded(folder)
    for path in folder.glob('model-0*'):
        save_file({k: torch.zeros_like(v) for k, v in load_file(path).items()}, path, dict(format='pt'))
    save_file(kept, file, dict(format='pt'))


def half(folder):
    load_lvlm(folder).model.bfloat16().save_pretrained(folder)


FORMS = [
    (name, change) for name in ('gemma3', 'llava_15', 'llama3', 'llama2') for change in (sharded, stale_index, half)
]
QUICK = [('gemma3', half), ('llava_15', stale_index), ('llama3', sharded)]  # llama3 has tied embeddings


@pytest.mark.parametrize('name, change', [f if f in QUICK else pytest.param(*f, marks=pytest.mark.slow) for f in FORMS])
def test_forms_of_files_are_read_as_transformers_reads_them(folders, tmp_path, name, change):
    folder = shutil.copytree(folders(name), tmp_path / 'm')
    change(folder)
    lvlm = load_lvlm(folder)
    stock = type(lvlm.model).from_pretrained(folder, dtype='auto')
    assert all(torch.equal(v, weights(lvlm)[k]) for k, v in stock.state_dict().items())
    for width in (False, True):
        steps = P.prune_both_ways(lvlm, folder, tmp_path / f'{width}', width)
        assert steps == ('yes', 'yes', 'yes')
    rows = P.as_dataset(P.rows_for(lvlm))
    assert score(lvlm, rows, criteria=('bi', 'taylor')) and len(answer_batch(lvlm, list(rows))) == 4
    assert (
        P.recovers(lvlm.__class__(lvlm.model.float(), lvlm.processor, lvlm.tokenizer, name=name), list(rows)) == 'yes'
    )
    again = load_lvlm(save_lvlm(load_lvlm(folder), tmp_path / 'again'))
    assert torch.equal(Collator(again)(list(rows))['input_ids'], Collator(lvlm)(list(rows))['input_ids'])


def quantized(folder):
    config = json.loads((folder / 'config.json').read_text())
    config['quantization_config'] = dict(quant_method='bitsandbytes', load_in_4bit=True)
    (folder / 'config.json').write_text(json.dumps(config))


def adapter(folder):
    (folder / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
    (folder / 'adapter_config.json').write_text(
        json.dumps(dict(peft_type='LORA', base_model_name_or_path='base/model'))
    )


def truncated(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-5000])


@pytest.mark.parametrize(
    'change, says', [(quantized, 'quanti'), (adapter, 'adapter of base/model'), (truncated, 'model.safetensors')]
)
@pytest.mark.parametrize('name', ['gemma3', 'llava_next', 'llama2'])
def test_what_is_no_whole_model_is_refused_in_a_sentence(folders, tmp_path, name, change, says):
    plan = P.plan_of(load_lvlm(folders(name)), width=False)
    folder = shutil.copytree(folders(name), tmp_path / 'm')
    change(folder)
    for call in (lambda: load_lvlm(folder), lambda: prune_checkpoint(folder, tmp_path / 'out', plan)):
        with pytest.raises((ValueError, FileNotFoundError), match=says) as e:
            call()
        assert '\n' not in str(e.value)
    report = doctor(folder)
    assert not report.ok.all() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', sorted(NO_TEMPLATE))
def test_models_without_a_template_take_one(folders, tmp_path, name):
    folder = shutil.copytree(folders(name), tmp_path / 'm')
    with pytest.raises(ValueError, match='has no chat template: put a chat_template.jinja into its folder'):
        Collator(load_lvlm(folder))([P.sample(P.ASKED[0], 'red')])
    (folder / 'chat_template.jinja').write_text(P.LLAMA2.replace('bos_token + ', ''))
    lvlm = load_lvlm(folder)
    rows = P.rows_for(lvlm)
    stock = type(lvlm.model).from_pretrained(folder).eval()
    assert P.compare_inputs(lvlm, P.ASKED[0], False) == 'equal' and P.same_loss(stock, lvlm, rows) == 'equal'
    assert P.recovers(lvlm, rows) == 'yes' and P.same_answers(stock, lvlm, rows) == 'equal'


def test_pictures_of_a_sample_belong_together(folders):
    "LLaVA-OneVision writes fewer tokens for each of several pictures of one sample than for a picture alone."
    lvlm = loaded(folders, 'llava_onevision')
    images = P.sample(P.ASKED[2])['images']
    together, alone = processed_images(lvlm, [images])[1], processed_images(lvlm, [[im] for im in images])[1]
    assert all(len(a) < len(b) for a, b in zip(together, alone))
