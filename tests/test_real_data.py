"Chat templates, tokenizers, pictures and data as they are published."

import copy
import io
import json
import shutil
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.data.instruction_data import (
    CONVERSATION_FEATURES,
    Collator,
    answer_spans,
    content_form,
    encode_conversation,
    encode_sample,
    expand_images,
    load_llava_json,
    padding_id,
    prompt_and_answer,
    read_llava_json,
)
from lvlm_study.evaluation.evaluate import answer_batch
from lvlm_study.importance.importance import score
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm, rgb_image, save_lvlm
from lvlm_study.recovery.losses import DistillationModel, TrainingSamples, recovery_settings
from lvlm_study.recovery.recovery import recover

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = (  # Reads both forms, and writes marks around a picture in one of them
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><image><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MISTRAL = (  # Refuses turns that do not alternate
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}[INST]"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}{% else %}<image>"
    "{% endif %}{% endfor %}[/INST]{% else %}{% for block in message['content'] %}{{ block['text'] }}{% endfor %}"
    '{{ eos_token }}{% endif %}{% endfor %}'
)
TEMPLATES = dict(llava=LLAVA, onevision=ONEVISION, smolvlm=SMOLVLM, qwen=QWEN, mistral=MISTRAL)

RED = Image.new('RGB', (80, 80), (214, 39, 40))
QUESTION = '<image>\nWhat color is it?'


def model(template=None):
    lvlm = load_lvlm('tiny-llava')
    if template:
        lvlm.processor.chat_template = lvlm.tokenizer.chat_template = template
    return lvlm


def sample(question=QUESTION, answer='red', images=(RED,), id='a'):
    return dict(id=id, images=list(images), messages=prompt_and_answer(question, answer))


def data(*rows):
    return datasets.Dataset.from_list(list(rows), features=CONVERSATION_FEATURES)


def as_parts(question, answer=None):
    "What one gives to a processor of transformers."
    pieces = question.split('<image>')
    parts = []
    for i, piece in enumerate(pieces):
        parts += [dict(type='image')] * (i > 0)
        piece = piece.removeprefix('\n') if i else piece
        piece = piece.removesuffix('\n') if i < len(pieces) - 1 else piece
        parts += [dict(type='text', text=piece)] if piece else []
    messages = [dict(role='user', content=parts)]
    return messages + ([dict(role='assistant', content=[dict(type='text', text=answer)])] if answer else [])


def processor_ids(lvlm, messages, images, prompt):
    text = lvlm.processor.apply_chat_template(messages, add_generation_prompt=prompt)
    out = lvlm.processor(images=images or None, text=text, add_special_tokens=not text.startswith('<s>'))
    return list(out['input_ids'][0])


ASKED = dict(
    one=(QUESTION, 1),
    none=('What is a color?', 0),
    mark_last=('What color is it?\n<image>', 1),
    two=('<image>\n<image>\nWhat is there in both?', 2),
    between=('Is <image> like <image>?', 2),
)


@pytest.mark.parametrize('asked', ASKED)
@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_are_those_of_the_processor(name, asked):
    lvlm, (question, n) = model(TEMPLATES[name]), ASKED[asked]
    assert content_form(lvlm) == 'parts'
    for answer in (None, 'red'):
        messages = expand_images(lvlm, prompt_and_answer(question, answer), [25] * n)
        ids, labels = encode_conversation(lvlm, messages, prompt=answer is None)
        assert ids == processor_ids(lvlm, as_parts(question, answer), [RED] * n, prompt=answer is None)
        assert ids.count(lvlm.config.image_token_id) == 25 * n
    assert lvlm.tokenizer.decode([t for t in labels if t != -100]).strip().startswith('red')


@pytest.mark.parametrize('name', ['tiny-llava', 'tiny-gqa', 'tiny-bunny', 'tiny-internvl'])
def test_templates_of_the_study_models_read_texts(name):
    assert content_form(load_lvlm(name)) == 'text'


@pytest.mark.parametrize('name', TEMPLATES)
def test_every_answer_of_a_conversation_is_labeled(name):
    lvlm = model(TEMPLATES[name])
    messages = prompt_and_answer(QUESTION, 'red') + prompt_and_answer('And is it blue?', 'no')
    _, labels = encode_sample(lvlm, dict(id='a', messages=messages), [25])
    assert ['red' in t or 'no' in t for t in [lvlm.tokenizer.decode([i for i in labels if i != -100])]] == [True]
    text, spans = answer_spans(lvlm, expand_images(lvlm, messages, [25]))
    assert [text[a:b].strip()[:3].strip('<|') for a, b in spans] == ['red', 'no'] or name == 'smolvlm'


def test_a_template_that_writes_no_text_is_refused():
    with pytest.raises(ValueError, match='neither a text nor a list'):
        content_form(model("{% for m in messages %}{{ m['role'] }}: {% endfor %}"))


@pytest.mark.parametrize(
    'template, says',
    dict(
        answer=(
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "assistant says: 'red'",
        ),
        question=(
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | truncate(25, True, '', 0) }} {% endfor %}",
            'user says: ',
        ),
    ).values(),
)
def test_what_a_template_leaves_out_is_named_before_training(template, says):
    rows = data(sample('A question that is longer than the template allows: <image>'))
    for call in (lambda m: recover(m, rows, progress=False), lambda m: score(m, rows, criteria=('taylor',))):
        with pytest.raises(ValueError, match=says) as e:
            call(model(template))
        assert "sample 'a'" in str(e.value) and '\n' not in str(e.value)


def test_the_words_of_a_template_are_one_sentence():
    with pytest.raises(ValueError, match="sample 'a': the chat template refuses this conversation: roles must alt"):
        Collator(model(MISTRAL))([sample() | dict(messages=prompt_and_answer(QUESTION, 'red')[::-1])])


def test_recovery_and_scores_with_a_template_of_parts(tmp_path):
    lvlm, rows = model(LLAVA), data(*[sample(id=str(i), answer=w) for i, w in enumerate(('red', 'blue', 'green'))])
    assert recover(lvlm, rows, batch_size=2, progress=False).curves.sft.notna().all()
    assert score(lvlm, rows, criteria=('bi', 'taylor'))
    assert len(answer_batch(lvlm, [rows[i] for i in range(3)])) == 3


# --- a template beside the processor --------------------------------------------------------------------------------


@pytest.mark.parametrize('template', [None, ONEVISION])
def test_the_template_beside_the_processor_is_used(tmp_path, template):
    folder = shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', tmp_path / 'm')
    file = folder / 'chat_template.jinja'
    text = template or file.read_text()
    file.unlink()
    (folder / 'chat_template.json').write_text(json.dumps(dict(chat_template=text)))
    if template:  # and another one in the tokenizer, as in llava-onevision
        config = json.loads((folder / 'tokenizer_config.json').read_text())
        config['chat_template'] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    lvlm = load_lvlm(folder)
    ours = Collator(lvlm)([sample()])['input_ids']
    assert torch.equal(ours, Collator(model(template))([sample()])['input_ids'])
    again = load_lvlm(save_lvlm(lvlm, tmp_path / 'again'))
    assert torch.equal(ours, Collator(again)([sample()])['input_ids'])


def test_no_template_at_all():
    lvlm = model()
    lvlm.processor.chat_template = lvlm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match='tiny-llava has no chat template'):
        Collator(lvlm)([sample()])


# --- no padding token ------------------------------------------------------------------------------------------


def plain_lm(lvlm):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8)
    tokenizer = copy.deepcopy(lvlm.tokenizer)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    return LVLM(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, name='plain')


def without_padding(kind):
    lvlm = model()
    if kind == 'plain':
        return plain_lm(lvlm)
    if kind == 'beyond the embeddings':
        lvlm.tokenizer.add_special_tokens(dict(pad_token='[PAD]'))
    else:
        lvlm.tokenizer.pad_token = None
    if kind == 'no end either':
        lvlm.tokenizer.eos_token = None
    return lvlm


@pytest.mark.parametrize('kind', ['plain', 'lvlm', 'no end either', 'beyond the embeddings'])
def test_no_padding_token(kind):
    lvlm = without_padding(kind)
    if kind == 'no end either':
        lvlm.processor.chat_template = lvlm.processor.chat_template.replace('{{ eos_token }}', '</s>')
    assert 0 <= padding_id(lvlm) < lvlm.part('embed').weight.shape[0]
    rows = [sample('How many colors?' + ' please' * i, 'red', (), str(i)) for i in range(4)]
    batch = Collator(lvlm)(rows)
    with torch.no_grad():
        alone = lvlm.model(**Collator(lvlm)(rows[:1])).logits[0]
        beside = lvlm.model(**batch).logits[0, : len(alone)]
    torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-4)
    assert score(lvlm, data(*rows), criteria=('bi', 'taylor'))
    assert len(recover(lvlm, data(*rows), trainable='lora', batch_size=4, progress=False).indices) == 4
    assert answer_batch(lvlm, rows) == [a for row in rows for a in answer_batch(lvlm, [row])]


# --- lengths, and texts without pictures ----------------------------------------------------------------------------

LONG = sample('word ' * 100 + '<image>\nWhat?', id='long')


@pytest.mark.parametrize('feature_gb', [2.0, 0.0])
@pytest.mark.parametrize('place', [0, 1, 3])
def test_max_length_through_any_picture(feature_gb, place):
    rows = [sample(id=str(i)) for i in range(4)]
    rows[place] = LONG
    with pytest.raises(ValueError, match="sample 'long': max_length=120 cuts through its picture"):
        TrainingSamples(model(), data(*rows), max_length=120, feature_gb=feature_gb).usable(range(4))


@pytest.mark.parametrize('feature_gb', [2.0, 0.0])
def test_max_length_that_leaves_no_answer(feature_gb):
    rows = [sample(id='0'), sample(QUESTION + ' word' * 100, id='long')]
    with pytest.raises(ValueError, match="sample 'long': max_length=60 leaves none of its answer"):
        recover(model(), data(*rows), max_length=60, feature_gb=feature_gb, progress=False)


def test_collator_does_not_cut_through_a_picture():
    with pytest.raises(ValueError, match="sample 'long': max_length=120 cuts through its picture"):
        Collator(model(), max_length=120)([sample(), LONG])


@pytest.mark.parametrize('recipe', ['sft', 'sft+hidden+kl'])
def test_a_batch_of_texts_alone_teaches_the_projector_nothing(recipe):
    lvlm = model()
    rows = [sample(id=str(i)) for i in range(4)] + [
        sample('Say it.' + ' long' * 60, images=(), id=f't{i}') for i in range(4)
    ]
    kw = dict(trainable='projector', batch_size=4, progress=False, teacher=lvlm)
    r = recover(lvlm, data(*rows), recipe, **kw)
    assert len(r.indices) == 8 and len(r.curves) == 2
    step = DistillationModel(copy.deepcopy(lvlm), recovery_settings(recipe, trainable='projector'), lvlm)
    step.model.requires_grad_(False)
    projector = step.student.part('projector').requires_grad_(True)
    samples = TrainingSamples(lvlm, data(*rows))
    samples.encode(range(8))
    sum(step(**samples.collate([samples[i] for i in range(4, 8)])).values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())
    with pytest.raises(ValueError, match='none of the 4 samples has one'):
        recover(lvlm, data(*rows[4:]), recipe, **kw)


# --- pictures of more than 8 bits -----------------------------------------------------------------------------------


def through_file(values, kind, mode=None):
    f = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(f, kind)
    return Image.open(f)


RAMP = np.arange(0, 65536, 257).astype('uint16')[None].repeat(4, 0)


@pytest.mark.parametrize(
    'image',
    dict(
        png16=lambda: through_file(RAMP, 'PNG'),
        tiff16=lambda: through_file(RAMP, 'TIFF'),
        mode_i=lambda: through_file(RAMP.astype('int32'), 'TIFF'),
        big_endian=lambda: Image.frombytes('I;16B', (256, 4), RAMP.astype('>u2').tobytes()),
        unit=lambda: through_file((RAMP / 65535).astype('float32'), 'TIFF'),
        eight=lambda: through_file((RAMP / 257).astype('float32'), 'TIFF'),
    ).values(),
)
def test_deep_pictures_are_scaled(image):
    assert np.asarray(rgb_image(image()))[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'RGB'])
def test_other_pictures_are_as_they_were(mode):
    image = RED.convert(mode)
    assert rgb_image(image).tobytes() == image.convert('RGB').tobytes()


@pytest.mark.parametrize('values', [[-3.0, 5.0], [0.0, 4000.0], [0.0, float('nan')], [0.0, float('inf')]])
def test_pictures_of_unknown_range_are_named(values):
    deep = Image.fromarray(np.array([values], dtype='float32'))
    with pytest.raises(ValueError, match="sample 'deep': a picture of mode F has values from"):
        Collator(model())([sample(), sample(images=(deep,), id='deep')])
    rows = data(sample(), sample(images=(deep,), id='deep'))
    for feature_gb in (2.0, 0.0):
        with pytest.raises(ValueError, match="sample 'deep': a picture of mode F"):
            TrainingSamples(model(), rows, feature_gb=feature_gb).usable(range(2))
        assert TrainingSamples(model(), rows, feature_gb=feature_gb, skip_broken=True).usable(range(2)) == [0]


# --- published data ------------------------------------------------------------------------------------------


def turns(*values, first='human'):
    roles = ['human', 'gpt'] if first == 'human' else ['gpt', 'human']
    return [{'from': roles[i % 2], 'value': v} for i, v in enumerate(values)]


GOOD = dict(id='good', image='red.png', conversations=turns(QUESTION, 'red'))
UNUSABLE = dict(
    gpt_begins=(dict(conversations=turns('Hello!', QUESTION, 'red', first='gpt')), 'begins with a turn from gpt'),
    literal_mark=(
        dict(image=None, conversations=turns('How is an <image> tag written?', 'so')),
        '0 images and 1 <image>',
    ),
    missing=(dict(image='gone.jpg'), 'an image that is not there: gone.jpg'),
    system=(
        dict(conversations=[{'from': 'system', 'value': 'Be brief.'}, *turns(QUESTION, 'red')]),
        "a turn from 'system'",
    ),
    video=(
        dict(image=None, video='clip.mp4', conversations=turns('<video>\nWhat?', 'so')),
        r'has a video \(clip.mp4\)',
    ),
    video_mark=(dict(image=None, conversations=turns('<video>\nWhat?', 'so')), 'has a video'),
    null=(dict(conversations=turns(QUESTION, None)), 'has a turn without text: the "value" of turn 2 is None'),
    unanswered=(dict(conversations=turns(QUESTION)), 'has no answer to learn from'),
    blank=(dict(conversations=turns(QUESTION, ' ')), 'has no answer to learn from'),
    number=(dict(image=7), 'names its images by'),
    folder=(dict(image='.'), 'an image that is not there'),
    empty=(dict(conversations=[]), 'has no conversations'),
)


def written(folder, *samples, bom=False):
    RED.save(folder / 'red.png')
    (folder / 'train.json').write_bytes(b'\xef\xbb\xbf' * bom + json.dumps(samples).encode())
    return folder / 'train.json'


@pytest.mark.parametrize('name', UNUSABLE)
def test_published_samples_stop_or_are_skipped(name, tmp_path):
    change, says = UNUSABLE[name]
    file = written(tmp_path, GOOD, GOOD | change | dict(id='bad'), GOOD | dict(id='last'))
    with pytest.raises(ValueError, match=f"sample 'bad' .*{says}"):
        load_llava_json(file, tmp_path)
    with pytest.warns(UserWarning, match=f"left out 1 of 3 samples: 1 for .*sample 'bad' .*{says}"):
        rows = load_llava_json(file, tmp_path, skip=True)
    assert rows['id'] == ['good', 'last']
    rows, skipped = read_llava_json(file, tmp_path)
    assert [len(v) for v in skipped.values()] == [1]


def test_skipped_samples_are_counted_by_reason(tmp_path):
    bad = [GOOD | UNUSABLE[k][0] | dict(id=f'{k}{i}') for k in ('missing', 'video') for i in range(3)]
    with pytest.warns(UserWarning, match='left out 6 of 7 samples: 3 for a missing image .*missing0.*, 3 for a video'):
        assert len(load_llava_json(written(tmp_path, GOOD, *bad), tmp_path, skip=True)) == 1
    with pytest.raises(ValueError, match='no usable sample'):
        load_llava_json(written(tmp_path, *bad), tmp_path, skip=True)


def test_a_byte_order_mark_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(load_llava_json(written(tmp_path, GOOD, bom=True), tmp_path, skip=True)) == 1


# --- tokens, positions and pictures that cannot be read -------------------------------------------------------------


def spoken(lvlm, extra):
    "A question that holds a token, or so many words."
    return [sample(f'How many {extra} are there?', images=(), id='odd')]


@pytest.mark.parametrize('kind', ['plain', 'lvlm'])
def test_a_token_without_an_embedding_is_named(kind, tmp_path):
    lvlm = plain_lm(model()) if kind == 'plain' else model()
    lvlm.tokenizer.add_tokens(['[NEW]'])
    rows = data(*spoken(lvlm, '[NEW]'))
    says = 'token [0-9]+ has no embedding in .*: resize_token_embeddings adds it'
    for call in (
        lambda: score(lvlm, rows, criteria=('bi',)),
        lambda: score(lvlm, rows, criteria=('taylor',)),
        lambda: answer_batch(lvlm, [rows[0]]),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    if kind == 'plain':
        from lvlm_study.pruning.doctor import doctor

        report = doctor(save_lvlm(lvlm, tmp_path / 'm')).set_index('check')
        assert not report.ok['every token has an embedding'] and report.drop('every token has an embedding').ok.all()


@pytest.mark.parametrize('words', [40, 400])
def test_a_text_longer_than_the_learned_positions(words):
    from transformers import OPTConfig, OPTForCausalLM

    lvlm = model()
    sizes = dict(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64)
    config = OPTConfig(vocab_size=len(lvlm.tokenizer), max_position_embeddings=32, **sizes)
    opt = LVLM(OPTForCausalLM(config).eval(), tokenizer=lvlm.tokenizer, name='opt')
    rows = data(*spoken(opt, 'word ' * words))
    for call in (lambda: score(opt, rows, criteria=('bi',)), lambda: answer_batch(opt, [rows[0]])):
        with pytest.raises(ValueError, match=r'a text of \d+ tokens is longer than the 32 positions of opt'):
            call()
    assert score(opt, data(sample('How?', images=())), criteria=('bi',))


@pytest.mark.parametrize('kind', ['cut', 'huge', 'text'])
def test_pictures_that_do_not_decode_are_named(kind, monkeypatch):
    file = io.BytesIO()
    RED.save(file, 'PNG')
    content = dict(cut=file.getvalue()[:80], huge=file.getvalue(), text=b'no picture')[kind]
    if kind == 'huge':
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    good = dict(sample(), images=[dict(bytes=file.getvalue(), path=None)])
    rows = datasets.Dataset.from_list(
        [dict(sample(), id='broken', images=[dict(bytes=content, path=None)])], features=CONVERSATION_FEATURES
    )
    assert good
    lvlm = model()
    for call in (
        lambda: score(lvlm, rows, criteria=('bi',)),
        lambda: recover(lvlm, rows, progress=False),
    ):
        with pytest.raises(ValueError, match="sample 'broken': its picture does not decode|no picture of the training"):
            call()


@pytest.mark.parametrize('template', [None, *TEMPLATES])
def test_a_written_conversation_is_the_same_after_saving(template, tmp_path):
    lvlm = model(TEMPLATES.get(template))
    again = load_lvlm(save_lvlm(lvlm, tmp_path / 'm'))
    rows = [sample(), sample('<image>\nAnd <image>?', images=(RED, RED)), sample('Nothing?', images=())]
    for prompt in (False, True):
        a, b = (Collator(m, prompt=prompt)(rows) for m in (lvlm, again))
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_damaged_settings_file_is_named(tmp_path):
    recover(model(), data(sample(), sample(id='b')), out=tmp_path / 'r', progress=False)
    (tmp_path / 'r' / 'settings.json').write_text('{"settings": ')
    with pytest.raises(ValueError, match='r/settings.json is no JSON'):
        recover(model(), data(sample(), sample(id='b')), out=tmp_path / 'r', progress=False)


@pytest.mark.parametrize('when', ['adapter', 'model'])
def test_a_full_disk_is_one_sentence_and_the_call_goes_on_later(tmp_path, monkeypatch, when):
    import lvlm_study.recovery.recovery as module

    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(module, 'save_lvlm', full) if when == 'model' else m.setattr(module.shutil, 'copytree', full)
        with pytest.raises(OSError, match='No space left'):
            recover(model(), data(sample()), trainable='projector+lora', out=tmp_path / 'r', progress=False)
    assert not (tmp_path / 'r' / 'model').exists()
    recover(model(), data(sample()), trainable='projector+lora', out=tmp_path / 'r', progress=False)
    assert load_lvlm(tmp_path / 'r' / 'model').architecture.num_layers == 12


# --- contents as parts, stored in a data set ------------------------------------------------------------------------


def stored_parts(*rows):
    "Rows with contents as parts, as a data set stores them: every part has every key, with None for what it lacks."
    listed = [dict(row, messages=as_parts(*[m['content'] for m in row['messages']])) for row in rows]
    features = dict(CONVERSATION_FEATURES)
    part = dict(type=datasets.Value('string'), text=datasets.Value('string'), url=datasets.Value('string'))
    features['messages'] = datasets.List(dict(role=datasets.Value('string'), content=datasets.List(part)))
    return datasets.Dataset.from_list(listed, features=datasets.Features(features))


@pytest.mark.parametrize('template', [None, 'llava', 'qwen'])
@pytest.mark.parametrize('asked', ASKED)
def test_contents_stored_as_parts_are_read(template, asked):
    lvlm, (question, n) = model(TEMPLATES.get(template)), ASKED[asked]
    row = sample(question, images=[RED] * n)
    ds = stored_parts(row)
    assert any(None in part.values() for m in ds[0]['messages'] for part in m['content'])
    ours, want = (Collator(lvlm)([r]) for r in (ds[0], data(row)[0]))
    assert all(torch.equal(v, ours[k]) for k, v in want.items())
    assert ours['input_ids'].eq(lvlm.config.image_token_id).sum() == 25 * n


def test_scores_and_recovery_on_contents_stored_as_parts():
    lvlm, rows = model(LLAVA), [sample(id=str(i), answer=w) for i, w in enumerate(('red', 'blue'))]
    a, b = (score(lvlm, ds, criteria=('bi', 'taylor')).layers for ds in (stored_parts(*rows), data(*rows)))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    kw = dict(batch_size=2, trainable='projector', progress=False)
    a, b = (recover(lvlm, ds, **kw).curves.sft.tolist() for ds in (stored_parts(*rows), data(*rows)))
    assert a == b
