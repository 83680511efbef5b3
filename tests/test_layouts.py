"""Original checkpoints against an independent forward pass: names, shapes, files, tokens, images, memory, bad input.

`python tests/test_layouts.py` stores the table of largest differences that the notebook on conversion shows."""

import gc, json, math, re, shutil, sys, weakref
from collections import defaultdict
from pathlib import Path
import originals as o
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from lvlm_study.models import conversion
from lvlm_study.core.store import Run, read_rows, record
from lvlm_study.data.instruction_data import Collator
from lvlm_study.models.loading import image_inputs, image_text, load_lvlm, save_lvlm

CASES = {'text': (), 'one picture': (1,), 'three pictures': (1, 1, 1), 'pictures of 4, 1 and 3 tiles': (4, 1, 3)}
PER = 4  # tokens of a picture or a tile, in all four layouts
FORMS = [(single, pickled) for single in (False, True) for pickled in (False, True)]


def write_form(folder, w, single, pickled):
    "The same tensors in other files"
    for f in [*folder.glob('*.bin*'), *folder.glob('*.safetensors*')]:
        f.unlink()
    if not single:
        return o.write_shards(folder, w, pickled)
    if pickled:
        torch.save(dict(w), folder / 'pytorch_model.bin')
    else:
        save_file(dict(w), folder / 'model.safetensors')


def write_all(d):
    "layout -> (what the writer returns, [folders in all forms])"
    out = {}
    for k, write in o.WRITE.items():
        made = write(d / k / 'published')
        out[k] = made, [d / k / 'published']
        for single, pickled in FORMS:
            if k == 'native' and (pickled or single):
                continue  # it is published in one file of safetensors
            folder = d / k / f'{"one" if single else "shards"}{".bin" * pickled}'
            shutil.copytree(d / k / 'published', folder)
            write_form(folder, made['w'], single, pickled)
            out[k][1].append(folder)
    return out


def compare(lvlm, k, made, *tiles, seed=0):
    "Logits of the native model and of the original computation for a prompt with pictures of so many tiles"
    g = torch.Generator().manual_seed(seed)
    m = lvlm.model
    px = [torch.randn(n, 3, made['size'], made['size'], generator=g) for n in tiles]
    prompt = [[1, 5, 9, 30, 12]] + [p for x in px for p in (x if k == 'internvl' else x[0], [7, 11, 40])]
    runs = [
        p if isinstance(p, list) else [m.config.image_token_id] * PER * (len(p) if p.dim() == 4 else 1) for p in prompt
    ]
    seen = dict(pixel_values=torch.cat(px)) if px else {}
    with torch.no_grad():
        ours, theirs = m(input_ids=torch.tensor([sum(runs, [])]), **seen).logits[0], o.LOGITS[k](made, prompt)
    return ours[:, : theirs.shape[1]], theirs


def gap(*args, **kw):
    ours, theirs = compare(*args, **kw)
    return (ours - theirs).abs().max().item()


def cases(k):
    return {c: tiles for c, tiles in CASES.items() if k == 'internvl' or max(tiles, default=1) == 1}


def largest(k, made, folders):
    "case -> largest difference over all forms of a layout"
    lvlms = [load_lvlm(f) for f in folders]
    return {c: max(gap(lvlm, k, made, *tiles) for lvlm in lvlms) for c, tiles in cases(k).items()}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp('layouts'))


@pytest.fixture(scope='module')
def loaded(written):
    return {k: load_lvlm(folders[0]) for k, (_, folders) in written.items()}


# --- logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('k', o.WRITE)
def test_logits(written, k):
    fresh = largest(k, *written[k])
    stored = {r['run']['purpose']: r['metrics']['gap'] for r in read_rows('layouts').values() if r['run']['model'] == k}
    assert max(fresh.values()) <= 1e-4 and fresh.keys() == stored.keys()
    assert all(
        stored[c] <= 1e-4 and abs(stored[c] - v) < 2e-5 for c, v in fresh.items()
    )  # what the notebook shows is still so


@pytest.mark.parametrize('k', o.WRITE)
def test_the_comparison_can_fail(written, loaded, k):
    made = written[k][0]
    ours, theirs = compare(loaded[k], k, made, 1)
    assert (
        theirs.std() > 0.3 and (compare(loaded[k], k, made, 1, seed=1)[0] - ours).abs().max() > 0.01
    )  # and pictures are seen
    assert (
        max(
            gap(loaded[k], k, made | dict(w=made['w'] | {n: t * 1.05}), 1)
            for n, t in made['w'].items()
            if 'layers.0.' in n or 'linear_1' in n or 'mlp1.1' in n
        )
        > 0.01
    )


def test_long_prompts_use_the_other_table(tmp_path):
    made = o.write_internvl(tmp_path / 'scaled')
    lvlm = load_lvlm(tmp_path / 'scaled')
    assert gap(lvlm, 'internvl', made, 12, 12, 12, 12) <= 1e-4  # more than 160 positions
    made = o.write_internvl(tmp_path / 'plain', scaled=False)
    assert gap(load_lvlm(tmp_path / 'plain'), 'internvl', made, 12, 2) <= 1e-4


def test_shared_keys_and_a_tower_inside(tmp_path):
    made = o.write_llava(tmp_path / 'a' / 'shared', kv_heads=2)
    lvlm = load_lvlm(tmp_path / 'a' / 'shared')
    assert lvlm.architecture.kv_heads == 2 and gap(lvlm, 'llava', made, 1) <= 1e-4
    inside = {f'model.vision_tower.vision_tower.{k}': t for k, t in made['tower'].items()}
    write_form(tmp_path / 'a' / 'shared', made['w'] | inside, single=True, pickled=False)
    (tmp_path / 'a' / 'tiny-clip' / 'model.safetensors').unlink()
    assert gap(load_lvlm(tmp_path / 'a' / 'shared'), 'llava', made, 1) <= 1e-4


def test_a_bunny_with_its_encoder_apart(tmp_path):
    made = o.write_bunny(tmp_path / 'bunny')
    t, p = o.Tensors(9), 'model.vision_tower.vision_tower.'
    o.vit(t, f'{p}vision_model', made['tower_config']['vision_config'], clip=False)
    t.put(f'{p}vision_model.head.probe', 1, 1, 24)
    write_form(
        tmp_path / 'bunny', {k: v for k, v in made['w'].items() if 'vision_tower' not in k}, single=True, pickled=False
    )
    save_file({k.removeprefix(p): v for k, v in t.items()}, tmp_path / 'tiny-siglip' / 'model.safetensors')
    lvlm = load_lvlm(tmp_path / 'bunny')
    assert lvlm.config.vision_feature_layer == -2 and gap(lvlm, 'bunny', made | dict(w=made['w'] | t), 1) <= 1e-4


# --- how it is loaded -------------------------------------------------------------------------------------------


def test_nothing_of_a_checkpoint_is_run(written, loaded):
    assert all((written[k][1][0] / 'modeling.py').exists() for k in ('bunny', 'internvl'))  # they raise when run
    assert [type(loaded[k].model).__module__.split('.')[0] for k in loaded] == ['transformers'] * 4
    assert {k: loaded[k].architecture.parallel for k in loaded} == dict(
        llava=False, bunny=True, internvl=False, native=False
    )
    assert loaded['internvl'].architecture.attn.keys() == {'qkv', 'o'} and 'q' in loaded['bunny'].architecture.biases


def test_dtype(written):
    made, folders = written['bunny']
    folder = folders[0]
    assert (
        load_lvlm(folder).model.dtype == torch.float32
        and load_lvlm(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    )


def anonymous():
    "Bytes of memory that are backed by no file"
    return 1024 * int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.parametrize('pickled', [False, True])
def test_never_two_copies(tmp_path, monkeypatch, pickled):
    made = o.write_llava(tmp_path / 'wide')
    c = made['config'] | dict(intermediate_size=40_000)
    t = o.Tensors(0)
    o.llama_tensors(t, c)
    o.write_json(tmp_path / 'wide', config=c)
    w = made['w'] | t
    size, largest = sum(v.nbytes for v in w.values()), max(v.nbytes for v in w.values())
    write_form(tmp_path / 'wide', w, single=False, pickled=pickled)
    del made, t, w
    gc.collect()
    held, peak, base = defaultdict(int), defaultdict(int), anonymous()
    plain = conversion.open_shard

    def note(**now):
        for k, v in now.items():
            peak[k] = max(peak[k], v)

    def watched(read):
        def f():
            t = read()
            n = t.nbytes
            held['read'] += n
            weakref.finalize(t, lambda: held.update(read=held['read'] - n))
            note(read=held['read'], memory=anonymous() - base)
            return t

        return f

    monkeypatch.setattr(
        conversion, 'open_shard', lambda path: {k: (shape, watched(read)) for k, (shape, read) in plain(path).items()}
    )
    lvlm = load_lvlm(tmp_path / 'wide')
    note(memory=anonymous() - base)
    assert size > 25e6 and sum(p.nbytes for p in lvlm.model.parameters()) >= size
    if not pickled:
        assert peak['read'] <= largest  # those of a .bin stay on the disk
    assert peak['memory'] <= size + largest + 6e6 < 1.6 * size, f'{peak["memory"] / size:.2f} of the weights'


# --- saved in the native layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize('k', o.WRITE)
def test_saved_natively(written, loaded, tmp_path, k):
    lvlm, made = loaded[k], written[k][0]
    folder = save_lvlm(lvlm, tmp_path / 'saved')
    again = load_lvlm(folder)
    names = load_file(folder / 'model.safetensors').keys()
    assert not list(folder.glob('*.bin')) and {n.split('.')[0] for n in names} == {
        'vision_tower',
        'multi_modal_projector',
        'language_model',
    }
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = torch.tensor([[1, 5, 9, 30, 12]])
    with torch.no_grad():
        want, *got = (m(input_ids=ids).logits for m in (lvlm.model, again.model, stock))
    assert all(torch.equal(want, x) for x in got) and gap(again, k, made, 1) <= 1e-4
    text = f'A man {image_text(lvlm)}\nHow many men? USER: 12</s><|end|>the man'
    assert (
        again.tokenizer(text).input_ids == lvlm.tokenizer(text).input_ids
        and again.tokenizer.chat_template == lvlm.tokenizer.chat_template
    )
    picture = views()[0]
    (a, n), (b, m) = (image_inputs(x, [picture]) for x in (lvlm, again))
    assert n == m and torch.equal(a['pixel_values'], b['pixel_values'])
    assert again.model.generation_config.to_dict() == lvlm.model.generation_config.to_dict()


# --- pictures -----------------------------------------------------------------------------------------------------


def views():
    "Broad, high, square, tiny, extreme"
    g = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(256, (h, w, 3), generator=g, dtype=torch.uint8).numpy())
        for w, h in ((60, 32), (33, 97), (48, 48), (5, 4), (200, 20), (16, 16), (20, 20))
    ]


def pixels(im, made):
    "Scaled to [0, 1] and normalized, as (3, H, W)"
    x = torch.tensor(np.array(im), dtype=torch.float64).permute(2, 0, 1) / 255
    return (
        (x - torch.tensor(made['mean'], dtype=torch.float64)[:, None, None])
        / torch.tensor(made['std'], dtype=torch.float64)[:, None, None]
    ).float()


def padded(im, made):
    "On a square of the mean color, in the middle; then scaled"
    side = max(im.size)
    square = Image.new('RGB', (side, side), tuple(int(x * 255) for x in made['mean']))
    square.paste(im, ((side - im.width) // 2, (side - im.height) // 2))
    return pixels(square.resize((made['size'],) * 2, Image.BICUBIC), made)


def tiled(im, made, most=12):
    "Tiles of the nearest grid, row by row, and a thumbnail if there are several"
    s, (w, h) = made['size'], im.size
    best, miss = (1, 1), math.inf
    for i, j in sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}, key=lambda g: g[0] * g[1]
    ):
        d = abs(w / h - i / j)
        if d < miss or d == miss and w * h > 0.5 * s * s * i * j:
            best, miss = (i, j), d
    i, j = best
    sheet = im.resize((s * i, s * j), Image.BICUBIC)
    out = [sheet.crop((s * x, s * y, s * x + s, s * y + s)) for y in range(j) for x in range(i)]
    return torch.stack([pixels(t, made) for t in out + ([im.resize((s, s), Image.BICUBIC)] if len(out) > 1 else [])])


@pytest.mark.parametrize('k', ['llava', 'bunny'])
def test_pictures_are_padded(written, loaded, k):
    made = written[k][0]
    for im in views():
        seen, (n,) = image_inputs(loaded[k], [im])
        assert n == PER and torch.allclose(seen['pixel_values'][0], padded(im, made), atol=1e-5), im.size


def test_pictures_are_tiled(written, loaded):
    made = written['internvl'][0]
    counts = set()
    for im in views():
        want = tiled(im, made)
        seen, (n,) = image_inputs(loaded['internvl'], [im])
        counts.add(len(want))
        assert n == PER * len(want) <= PER * 13 and torch.allclose(seen['pixel_values'], want, atol=1e-5), im.size
    assert len(counts) >= 3 and max(counts) <= 13 and min(counts) == 1
    seen, n = image_inputs(loaded['internvl'], views())  # all at once: one after the other
    assert torch.allclose(seen['pixel_values'], torch.cat([tiled(im, made) for im in views()]), atol=1e-5) and sum(
        n
    ) == PER * len(seen['pixel_values'])


# --- prompts ------------------------------------------------------------------------------------------------------

VICUNA = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def conversation(lvlm, *texts, ask=True):
    messages = [dict(role=('user', 'assistant')[i % 2], content=s) for i, s in enumerate(texts)]
    return lvlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def test_conversations(loaded):
    for k, end in (('llava', '</s>'), ('bunny', '<|endoftext|>')):
        assert (
            conversation(loaded[k], '<image>\nHow many?').replace('<image> \n', '<image>\n')
            == f'{VICUNA}USER: <image>\nHow many? ASSISTANT:'
        )
        assert (
            conversation(loaded[k], 'Who?', 'A man', 'Why?')
            == f'{VICUNA}USER: Who? ASSISTANT: A man{end}USER: Why? ASSISTANT:'
        )
        assert conversation(loaded[k], 'Who?', 'A man', ask=False) == f'{VICUNA}USER: Who? ASSISTANT: A man{end}'
    assert conversation(loaded['internvl'], '<IMG_CONTEXT>\nHow many?', '12', 'Why?') == (
        '<|system|>\nYou are an AI assistant whose name is Phi-3.<|end|><|user|>\n<IMG_CONTEXT>\nHow many?<|end|>'
        '<|assistant|>\n12<|end|><|user|>\nWhy?<|end|><|assistant|>\n'
    )
    listed = [dict(role='user', content=[dict(type='image'), dict(type='text', text='How many?')])]
    for k in ('llava', 'bunny', 'internvl'):
        assert loaded[k].tokenizer.apply_chat_template(
            listed, tokenize=False, add_generation_prompt=True
        ) == conversation(loaded[k], f'{image_text(loaded[k])}\nHow many?')


def byte_pairs(text, made):
    "Ids of a text as GPT-2 finds them"
    ids, order, sign = (
        {s: i for i, s in enumerate(made['vocab'])},
        {m: i for i, m in enumerate(made['merges'])},
        o.bytes_to_signs(),
    )
    out = []
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text):
        parts = [sign[b] for b in word.encode()]
        while pairs := [(order[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in order]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [ids[p] for p in parts]
    return out


def original_ids(k, made, tiles, question):
    "Parts of a prompt with one picture as the original tokenizes it: ids before, ids after"
    if k == 'internvl':
        ids = {m: made['vocab'].index(m) for m in o.MARKS}
        mark = re.compile('(' + '|'.join(map(re.escape, o.MARKS)) + ')')

        def read(text):
            return [
                i
                for part in mark.split(text)
                if part
                for i in ([ids[part]] if part in ids else o.pieces(part, made['vocab']))
            ]

        return [1] + read('<|system|>\nYou are an AI assistant whose name is Phi-3.<|end|><|user|>\n<img>'), read(
            f'</img>\n{question}<|end|><|assistant|>\n'
        )
    parts = (f'{VICUNA}USER: ', f'\n{question} ASSISTANT:')
    if k == 'bunny':
        return [byte_pairs(p, made) for p in parts]
    first, then = (o.pieces(p, made['vocab']) for p in parts)
    return [1] + first, then


@pytest.mark.parametrize('k', ['llava', 'bunny', 'internvl'])
def test_a_question_about_a_picture_from_end_to_end(written, loaded, k):
    made, lvlm, im = written[k][0], loaded[k], views()[0]
    question = "How many men, and what's the word?"
    px = tiled(im, made) if k == 'internvl' else padded(im, made)
    before, after = original_ids(k, made, px, question)
    batch = Collator(lvlm, prompt=True)(
        [dict(images=[im], messages=[dict(role='user', content=f'<image>\n{question}')])]
    )
    seen = len(px) * PER if k == 'internvl' else PER
    assert batch['input_ids'][0].tolist() == before + [lvlm.config.image_token_id] * seen + after
    with torch.no_grad():
        ours, theirs = lvlm.model(**batch).logits[0], o.LOGITS[k](made, [before, px, after])
    assert (ours[:, : theirs.shape[1]] - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize('k, end', [('llava', '</s>'), ('bunny', '<|endoftext|>'), ('internvl', '<|end|>')])
def test_answers_end_and_are_learned(loaded, k, end):
    lvlm = loaded[k]
    stop = lvlm.tokenizer.convert_tokens_to_ids(end)
    eos = lvlm.model.generation_config.eos_token_id
    assert stop in (eos if isinstance(eos, list) else [eos])
    messages = [dict(role='user', content='<image>\nHow many men?'), dict(role='assistant', content='the man')]
    batch = Collator(lvlm)([dict(images=[views()[0]], messages=messages)])
    learned = batch['input_ids'][batch['labels'] != -100].tolist()
    assert learned[-1] == stop and lvlm.tokenizer.decode(learned[:-1]).strip() == 'the man'


# --- bad input ----------------------------------------------------------------------------------------------------


def cut(path, n=300):
    path.write_bytes(path.read_bytes()[:-n])


def config(folder, **kw):
    (folder / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text()) | kw))


def change(folder, name, t=None):
    "Put another tensor into a shard, for the first name that ends so, or take it away"
    for shard in sorted(folder.glob('*.safetensors')):
        w = load_file(shard)
        k = next((k for k in w if k.endswith(name)), None)
        if k is None:
            continue
        w.pop(k)
        return save_file(w | ({} if t is None else {k: t}), shard)
    save_file(w | {name: t}, shard)  # a new one


BAD = {
    'no config': (
        'bunny',
        lambda f: (f / 'config.json').unlink(),
        FileNotFoundError,
        'shards is no checkpoint folder: it has no config.json',
    ),
    'damaged config': ('bunny', lambda f: cut(f / 'config.json', 20), ValueError, 'shards/config.json is no JSON'),
    'unknown type': (
        'bunny',
        lambda f: config(f, architectures=['BunnyQwenForCausalLM'], model_type='bunny-qwen'),
        ValueError,
        "'bunny-qwen' is not one that transformers knows, and the Python files that come with it are not run",
    ),
    'truncated shard': (
        'llava',
        lambda f: cut(f / 'model-00002-of-00002.safetensors'),
        ValueError,
        'shards/model-00002-of-00002.safetensors is truncated or damaged: ',
    ),
    'no weights': (
        'llava',
        lambda f: [p.unlink() for p in f.glob('model*')],
        FileNotFoundError,
        'shards has no weights: neither model.safetensors nor pytorch_model.bin',
    ),
    'lost shard': (
        'llava',
        lambda f: (f / 'model-00002-of-00002.safetensors').unlink(),
        FileNotFoundError,
        'shards has no model-00002-of-00002.safetensors, which its index names',
    ),
    'a key missing': (
        'internvl',
        lambda f: change(f, 'language_model.model.embed_tokens.weight'),
        ValueError,
        'the weights do not fit the config: missing: model.language_model.embed_tokens.weight',
    ),
    'a key too many': (
        'internvl',
        lambda f: change(f, 'language_model.model.layers.9.x', torch.ones(1)),
        ValueError,
        'unexpected: language_model.model.layers.9.x',
    ),
    'a key of another shape': (
        'internvl',
        lambda f: change(f, 'language_model.model.embed_tokens.weight', torch.ones(9, 32)),
        ValueError,
        'misshapen: language_model.model.embed_tokens.weight is 9x32',
    ),
    'rows that are no three parts': (
        'internvl',
        lambda f: change(f, 'attn.qkv.bias', torch.ones(73)),
        ValueError,
        'attn.qkv.bias is 73, model.vision_tower.encoder.layer.0.attention.k_proj.bias is made from 72',
    ),
    'other sizes': (
        'bunny',
        lambda f: config(f, intermediate_size=60),
        ValueError,
        'layers.{0-1}.mlp.fc1.bias is 56, model.language_model.layers.{0-1}.mlp.fc1.bias is made from 60',
    ),
    'sizes that contradict': (
        'llava',
        lambda f: config(f, hidden_size=33),
        ValueError,
        'shards/config.json is not consistent',
    ),
    'an entry missing': (
        'bunny',
        lambda f: (f / 'config.json').write_text(
            json.dumps({k: v for k, v in json.loads((f / 'config.json').read_text()).items() if k != 'mm_vision_tower'})
        ),
        ValueError,
        "shards/config.json has no entry 'mm_vision_tower'",
    ),
    'another projector': (
        'bunny',
        lambda f: config(f, mm_projector_type='ldp'),
        ValueError,
        "a projector of type 'ldp' is not known, only mlp2x_gelu",
    ),
    'no encoder': (
        'llava',
        lambda f: config(f, mm_vision_tower='someone/else'),
        FileNotFoundError,
        'its vision encoder someone/else is neither in its folder nor beside it',
    ),
    'another shuffle': (
        'internvl',
        lambda f: config(f, ps_version='v1'),
        ValueError,
        "ps_version is 'v1'; only 'v2' has a native form",
    ),
    'truncated tokenizer': (
        'llava',
        lambda f: cut(f / 'tokenizer.model', 5),
        ValueError,
        'shards/tokenizer.model is truncated',
    ),
}
BAD_BIN = {
    'truncated .bin': (lambda p: cut(p), 'pytorch_model-00001-of-00002.bin is truncated or damaged'),
    'no plain weights': (
        lambda p: torch.save({'model.norm.weight': Path}, p),
        'holds more than tensors and is not read',
    ),
    'code in a pickle': (
        lambda p: p.write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR."),
        'pytorch_model-00001-of-00002.bin',
    ),
}


def refused(folder, error):
    "The sentence of the error; '' if there are several lines"
    with pytest.raises(error) as e:
        load_lvlm(folder)
    return '' if '\n' in str(e.value) or len(str(e.value)) > 2000 else str(e.value)


@pytest.mark.parametrize('what', BAD)
def test_bad_input(written, tmp_path, what):
    k, spoil, error, says = BAD[what]
    source = next(f for f in written[k][1] if f.name == 'shards')
    shutil.copytree(source.parent, tmp_path / k)
    spoil(tmp_path / k / 'shards')
    assert says in refused(tmp_path / k / 'shards', error)


@pytest.mark.parametrize('what', BAD_BIN)
def test_bad_bin(written, tmp_path, what):
    spoil, says = BAD_BIN[what]
    shutil.copytree(written['llava'][1][0].parent, tmp_path / 'llava')
    spoil(tmp_path / 'llava' / 'published' / 'pytorch_model-00001-of-00002.bin')
    assert says in refused(tmp_path / 'llava' / 'published', ValueError)


# --- the table ----------------------------------------------------------------------------------------------------


def store(d):
    "Compute and store the largest differences"
    for k, (made, folders) in write_all(Path(d)).items():
        for c, v in largest(k, made, folders).items():
            record(Run('layouts', model=k, suite='', purpose=c), lambda: dict(metrics=dict(gap=v)), force=True)


if __name__ == '__main__':
    import tempfile

    with tempfile.TemporaryDirectory() as d:
        store(d)
    sys.exit(0 if read_rows('layouts') else 1)
