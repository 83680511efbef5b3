"smol-llava: its questions, its parts, and what is said where its weights are absent."

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from lvlm_study import load_lvlm
from lvlm_study.data import plain_benchmarks
from lvlm_study.data.plain_benchmarks import (
    COLORED_THINGS,
    PlainQuestion,
    describe_image,
    easy_vqa_plain,
    easy_vqa_questions,
    easy_vqa_suite,
    in_plain_words,
    plain_questions,
    plain_training_questions,
    text_questions,
    text_suite,
)
from lvlm_study.data.toy_benchmarks import QuestionAnswer, benchmark_questions, training_image
from lvlm_study.data.toy_images import IMAGE_MAKERS, make_page, page_lines, shapes_in
from lvlm_study.evaluation.language import chat_answers, chat_blocks, perplexity, text_blocks
from lvlm_study import Plan, apply_plan, recover, save_lvlm
from lvlm_study.models import real_models
from lvlm_study.models.real_models import merge_adapter, smol_chat_template, split_parts
from lvlm_study.study import smol_training
from lvlm_study.study.smol_training import PictureText, SmolExample, cell_words, pack_example, packed_answer_losses
from lvlm_study.study.smol_training import share_of_right_answers, writing_losses
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

HAS_GGUF = importlib.util.find_spec('gguf') is not None


@pytest.fixture(scope='module')
def tiny():
    return load_lvlm('tiny-llava')


def rng(seed=0):
    import random

    return random.Random(seed)


# Questions


def test_options_are_answered_by_letter():
    q = in_plain_words(QuestionAnswer('SQA', 'rule', 'What does it do?', 'B', ('sink', 'float')))
    lines = q.prompt().splitlines()
    assert lines[1:3] == ['A. sink', 'B. float'] and 'letter' in lines[-1]
    assert q.reply() == 'B'


@pytest.mark.parametrize('answer, reply, hint', [('yes', 'Yes', 'yes or no'), ('7', '7', 'single word')])
def test_open_questions_say_what_form_the_answer_has(answer, reply, hint):
    q = PlainQuestion('POPE', 'x', 'Is it?', answer)
    assert q.reply() == reply and hint in q.prompt().splitlines()[-1]


def test_things_of_the_test_split_are_never_trained_on():
    asked = ' '.join(q.prompt() for i in range(400) for q in plain_training_questions(*training_image('train', i)))
    held_out = {thing for _, test in COLORED_THINGS.values() for thing in test}
    assert not [thing for thing in held_out if f'. {thing}\n' in asked]
    tested = ' '.join(q.prompt() for _, (q,) in plain_questions('MMMU') if q.subtask == 'thing')
    assert sum(f'. {thing}\n' in tested for thing in held_out) == len(held_out)


@pytest.mark.parametrize('bench', ['GQA', 'DocVQA', 'AI2D'])
def test_other_splits_ask_the_same_questions_about_the_same_pictures(bench):
    from lvlm_study.data.toy_benchmarks import trained_image_keys

    plain, toy = plain_questions(bench), benchmark_questions(bench, 0, trained_image_keys())
    assert [p.key() for p, _ in plain] == [p.key() for p, _ in toy]
    assert [[q.answer for q in qs] for _, qs in plain] == [[q.answer for q in qs] for _, qs in toy]


def test_right_letters_are_spread():
    letters = Counter(q.answer for _, (q,) in plain_questions('MMMU'))
    assert max(letters.values()) - min(letters.values()) <= 6
    assert len(set(Counter(q.answer for q in text_questions()).values())) == 1


def test_an_answer_is_among_the_options_once():
    for q in text_questions(seed=3):
        assert len(set(q.options)) == 4 and q.options['ABCD'.index(q.answer)] == q.balance


@pytest.mark.parametrize('kind', IMAGE_MAKERS)
def test_descriptions_name_everything(kind):
    for seed in range(20):
        p = IMAGE_MAKERS[kind](rng(seed))
        text = describe_image(p)
        if kind == 'page':
            assert all(f'{word} {number}' in text for _, word, number in page_lines(p))
        elif kind == 'scene':
            assert all(f'{s.color} {s.name} in row {r + 1}, column {c + 1}' in text for (r, c), s in shapes_in(p))
        assert text.count('.') == (len(page_lines(p)) if kind == 'page' else len(p.cells))


def test_text_suite_has_no_pictures():
    suite = text_suite()
    assert len(suite) == 200 and not any(suite['images'])


@pytest.fixture
def easy_folder(tmp_path):
    "A small folder of easy-VQA's form"
    for split in ('train', 'test'):
        (tmp_path / split / 'images').mkdir(parents=True)
        rows = []
        for i in range(12):
            Image.new('RGB', (64, 64), (255, 255, 255)).save(tmp_path / split / 'images' / f'{i}.png')
            rows += [['what color is the shape?', 'teal', i], ['is there a circle?', 'no', i]]
            rows += [['what shape is in the image?', 'rectangle', i]]
        (tmp_path / split / 'questions.json').write_text(json.dumps(rows))
    return tmp_path


def test_easy_vqa_from_a_folder(easy_folder):
    suite = easy_vqa_suite(9, folder=easy_folder)
    assert Counter(suite['subtask']) == {'form': 3, 'color': 3, 'yes/no': 3}
    assert suite[0]['images'][0].size == (80, 80)
    assert len(easy_vqa_questions('train', easy_folder)) == 36
    assert easy_vqa_plain('what color is the shape?', 'teal').prompt().startswith('What color')


@pytest.mark.parametrize(
    'questions, found',
    [
        ([('what color is the shape?', 'teal'), ('what shape is in the image?', 'circle')], ['teal', 'circle']),
        ([('is there a teal shape?', 'yes'), ('is there not a circle?', 'no')], ['teal', 'circle']),
        ([('is no red shape present?', 'no'), ('is there a circle?', 'no'), ('is no triangle present?', 'yes')],
         ['red', 'rectangle']),  # one choice is left
        ([('is there a teal shape?', 'no'), ('is there a circle?', 'no')], None),
    ],
)  # fmt: skip
def test_what_a_picture_shows_is_found_from_any_question(monkeypatch, questions, found):
    rows = [('a.png', question, answer) for question, answer in questions]
    monkeypatch.setattr(smol_training, 'easy_vqa_questions', lambda split: rows)
    smol_training.easy_vqa_pictures.cache_clear()
    shown = [words for _, _, words in smol_training.easy_vqa_pictures()]
    smol_training.easy_vqa_pictures.cache_clear()
    assert shown == ([found] if found else [])


def test_easy_vqa_absent_is_one_sentence(monkeypatch):
    monkeypatch.setattr(plain_benchmarks.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install'):
        easy_vqa_questions('test')
    with pytest.raises(ValueError, match="'train' or 'test'"):
        easy_vqa_questions('validation')


# Parts


def test_template_reads_texts_and_parts_alike():
    from jinja2 import Template

    text_only = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    template = Template(smol_chat_template(text_only, '<i>'))
    text = [dict(role='user', content='<i>\nHow many?'), dict(role='assistant', content='2')]
    parts = [
        dict(role='user', content=[dict(type='image'), dict(type='text', text='How many?')]),
        dict(role='assistant', content=[dict(type='text', text='2')]),
    ]
    assert template.render(messages=text) == template.render(messages=parts) == '[user]<i>\nHow many?[assistant]2'


def test_merged_adapter_is_the_sum(tiny):
    import copy

    lvlm = type(tiny)(copy.deepcopy(tiny.model), tiny.processor, tiny.tokenizer)
    layer = lvlm.part('lm').layers[1].mlp.up_proj
    before = layer.weight.detach().clone()
    a, b = torch.randn(4, before.shape[1]), torch.randn(before.shape[0], 4)
    merge_adapter(lvlm, {'layers.1.mlp.up_proj.lora_A': a, 'layers.1.mlp.up_proj.lora_B': b}, scale=0.5)
    expected = before.numpy() + 0.5 * b.numpy() @ a.numpy()
    assert np.allclose(layer.weight.detach().numpy(), expected, atol=1e-5)


def test_parts_are_split_by_name():
    parts = split_parts({'vision.x.y': 1, 'adapter.layers.0.q.lora_A': 2})
    assert parts == dict(vision={'x.y': 1}, projector={}, adapter={'layers.0.q.lora_A': 2})


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv('LVLM_CACHE', str(tmp_path))
    monkeypatch.setattr(real_models.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'lvlm_study\[real\]'"):
        real_models.smollm2_folder()


def test_another_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv('LVLM_CACHE', str(tmp_path))
    other = tmp_path / 'other.gguf'
    other.write_bytes(b'GGUF')
    monkeypatch.setattr(real_models, 'smollm2_file', lambda: other)
    with pytest.raises(ValueError, match='SHA-256'):
        real_models.smollm2_folder()
    assert not list((tmp_path / 'real_models').iterdir())


# Training


def test_words_of_a_page_stand_in_its_rows():
    page = make_page(rng(1))
    words = cell_words(page)
    for row, word, number in page_lines(page):
        assert [words[5 * row + c] for c in range(3)] == [['letter', letter, word] for letter in word]
        assert [words[5 * row + 3 + i][:2] for i in range(2)] == [['digit', digit] for digit in number]


def test_written_pictures_differ_where_the_pictures_do(tiny):
    text, seen = PictureText(tiny), set()
    for seed in range(30):
        p = IMAGE_MAKERS['scene'](rng(seed))
        ids = text.ids(cell_words(p))
        seen.add(tuple(ids.flatten().tolist()))
        vectors = text.vectors(cell_words(p)).unflatten(0, (25, 4))
        assert torch.equal(vectors[:, :3], tiny.part('embed').weight[ids])
        assert len({tuple(v.tolist()) for v in vectors[:, 3]}) == 25
    assert len(seen) == 30


def test_only_right_words_have_no_distance(tiny):
    text = PictureText(tiny)
    words = [cell_words(IMAGE_MAKERS[kind](rng(1))) for kind in ('scene', 'page')]
    tokens = torch.stack([text.vectors(cells) for cells in words])
    naming, distance, right = writing_losses(tokens, text, words)
    assert distance == 0 and right == 1
    worse = writing_losses(tokens.roll(1, 0), text, words)
    assert worse[0] > naming and worse[1] > 0.1 and worse[2] < 1


def test_right_answers_are_counted_whole():
    where = torch.tensor([[0, 4], [0, 5], [1, 6], [1, 9]])
    assert share_of_right_answers(where, torch.tensor([True, True, False, True])) == pytest.approx(2 / 3)
    assert share_of_right_answers(where, torch.tensor([True, False, False, False])) == 0


def test_packed_losses_equal_those_of_questions_asked_alone(tiny):
    "A packed question sees the picture and itself only."
    p, source = training_image('train', 5)
    questions, text = plain_training_questions(p, source, 4), PictureText(tiny)
    words = cell_words(p)
    tiny.part('lm').set_attn_implementation('matmul')
    with torch.no_grad():
        packed = packed_answer_losses(tiny, [pack_example(tiny, SmolExample(words, '', questions), 10**6)], text, 0)[0]
        alone = [pack_example(tiny, SmolExample(words, '', [q])) for q in questions]
        single = [packed_answer_losses(tiny, [sequence], text, 0)[0] for sequence in alone]
    tiny.part('lm').set_attn_implementation('sdpa')
    assert len(packed) == sum(map(len, single))
    assert torch.allclose(packed, torch.cat(single), atol=1e-4)


# Language alone


def test_perplexity_is_the_exponential_of_the_mean_loss(tiny):
    ids = text_blocks(tiny, n=3, length=48)
    with torch.no_grad():
        logits = tiny.model(input_ids=ids).logits[:, :-1]
    expected = math.exp(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).item())
    assert math.isclose(perplexity(tiny, ids, batch=2), expected, rel_tol=1e-4)


def test_training_and_test_texts_do_not_overlap(tiny):
    first, second = text_blocks(tiny, n=4, length=64), text_blocks(tiny, n=4, length=64, start=4)
    assert not {tuple(r) for r in first.tolist()} & {tuple(r) for r in second.tolist()}
    assert not {a for a, _ in chat_answers(True)} & {a for a, _ in chat_answers(False)}
    with pytest.raises(ValueError, match='fewer than'):
        text_blocks(tiny, n=10**6)
    with pytest.raises(ValueError, match='choose from reference, docstrings'):
        text_blocks(tiny, 'novel')


def test_only_answers_count_in_chat(tiny):
    ids, labels = chat_blocks(tiny)
    assert ids.shape == labels.shape and len(ids) == len(chat_answers())
    row = [t for t in labels[0].tolist() if t != -100]
    assert tiny.tokenizer.decode(row) == chat_answers()[0][1]


@pytest.mark.skipif(not HAS_GGUF, reason='gguf is not installed')
def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path):
    "The weights are those that were written, nothing counts as quantized, and stock transformers reads the folder."
    import gguf
    from lvlm_study.models.real_models import dense_from_gguf
    from transformers import AutoModelForCausalLM

    writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
    sizes = dict(block_count=1, embedding_length=32, feed_forward_length=64, head_count=4, head_count_kv=2)
    for name, value in (sizes | dict(context_length=64, vocab_size=40)).items():
        getattr(writer, f'add_{name}')(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [chr(i) for i in range(ord('!'), ord('!') + 39)] + ['!"']
    writer.add_tokenizer_model('gpt2')
    writer.add_token_list(letters)
    writer.add_token_types([1] * 40)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    r = np.random.default_rng(0)
    shapes = {'token_embd': (40, 32), 'output': (40, 32), 'output_norm': (32,), 'blk.0.attn_norm': (32,)}
    shapes |= {'blk.0.attn_q': (32, 32), 'blk.0.attn_k': (16, 32), 'blk.0.attn_v': (16, 32)}
    shapes |= {'blk.0.attn_output': (32, 32), 'blk.0.ffn_norm': (32,)}
    shapes |= {'blk.0.ffn_gate': (64, 32), 'blk.0.ffn_up': (64, 32), 'blk.0.ffn_down': (32, 64)}
    weights = {k: r.normal(size=v).astype('float32') for k, v in shapes.items()}
    for name, w in weights.items():
        writer.add_tensor(f'{name}.weight', w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = dense_from_gguf(tmp_path / 'm.gguf', tmp_path / 'dense')
    assert 'quantization_config' not in json.loads((folder / 'config.json').read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert np.array_equal(model.model.layers[0].mlp.down_proj.weight.detach().numpy(), weights['blk.0.ffn_down'])
    assert model.config.num_key_value_heads == 2 and not list(tmp_path.glob('*.partial'))


# Saved for the world

IN_A_CLEAN_PROCESS = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype='float32')
AutoProcessor.from_pretrained(sys.argv[1])
tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
logits = model(**load_file(sys.argv[2])).logits
save_file(dict(logits=logits.detach().contiguous()), sys.argv[3])
print('tied' if tied else 'apart', 'lvlm_study' in sys.modules)
"""


def small_language_model(folder):
    "A LLaMA with random weights and a tied head, whose tokenizer has the token that stands for a patch."
    tokenizer = load_lvlm('tiny-llava').tokenizer
    tokenizer.add_special_tokens(dict(additional_special_tokens=[real_models.SMOL_IMAGE_TOKEN]))
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    ends = dict(bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlamaConfig(**sizes, **ends, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('kind', ['random', 'smol-llava'])
def test_pruned_and_healed_it_loads_elsewhere(kind, tmp_path):
    "Stock transformers in a process of its own: the head is still tied, and the logits are the same."
    if kind == 'random':
        lvlm = real_models.build_smol_llava(language_model=small_language_model(tmp_path / 'lm'))
    else:
        try:
            lvlm = load_lvlm(kind)
        except FileNotFoundError as e:
            pytest.skip(str(e))
    L = len(lvlm.layers)
    student = apply_plan(lvlm, Plan.of(lvlm, layers=[i for i in range(L) if i != L // 2]))
    rows = plain_benchmarks.plain_instructions().select(range(4))
    healed = recover(student, rows, 'sft', trainable='projector+lora', fraction=1, batch_size=4, progress=False).lvlm
    before, after = (m.layers[0].mlp.down_proj.weight for m in (student, healed))
    assert not torch.equal(before, after)
    save_lvlm(healed, tmp_path / 'healed')
    picture = next(row['images'][0] for row in rows if row['images'])
    prompt = '<reponame>What is red?'
    inputs = lvlm.processor(images=picture, text=prompt, return_tensors='pt')
    inputs = {name: t.contiguous() for name, t in inputs.items()}
    save_file(inputs, tmp_path / 'inputs.safetensors')
    files = [str(tmp_path / name) for name in ('healed', 'inputs.safetensors', 'logits.safetensors')]
    command = [sys.executable, '-c', IN_A_CLEAN_PROCESS, *files]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ['tied', 'False']
    with torch.no_grad():
        ours = healed.model.eval()(**inputs).logits
    torch.testing.assert_close(load_file(files[2])['logits'], ours, atol=1e-4, rtol=1e-4)
