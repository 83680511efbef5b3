"""Tiny checkpoints in the layouts of the originals, and what the original models compute, written out in plain torch.

Nothing of the package is used here. `write_*` put random tensors under the published names and write the small files
beside them; `*_logits` read those names and compute. A prompt is a list of token id lists and of pixel tensors, one for
each image or with its tiles."""

import json, math, struct
import torch
from safetensors.torch import save_file

# --- the computation ------------------------------------------------------------------------------------------------


def linear(w, n, x):
    return x @ w[f'{n}.weight'].T + w.get(f'{n}.bias', 0)


def layer_norm(w, n, x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f'{n}.weight'] + w[f'{n}.bias']


def rms_norm(w, n, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f'{n}.weight']


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def gelu_tanh(x):
    return x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def silu(x):
    return x * torch.sigmoid(x)


def attend(q, k, v, num_heads, causal):
    "Rows of (T, heads*d), every key with every query, one head after the other"
    out = []
    for q, k, v in zip(*(t.chunk(num_heads, -1) for t in (q, k, v))):
        s = q @ k.T / q.shape[-1] ** 0.5
        if causal:
            s = s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf)
        out.append(s.softmax(-1) @ v)
    return torch.cat(out, -1)


def rotate(x, num_heads, freq, scale=1.0):
    "Rotary positions on the first 2*len(freq) channels of each head: channel i goes with channel i+len(freq)"
    angle = torch.arange(len(x))[:, None] * freq
    c, s = angle.cos() * scale, angle.sin() * scale
    n = len(freq)
    return torch.cat(
        [
            torch.cat([a * c - b * s, b * c + a * s, rest], -1)
            for a, b, rest in (h.split([n, n, h.shape[-1] - 2 * n], -1) for h in x.chunk(num_heads, -1))
        ],
        -1,
    )


def patches(w, n, px):
    "A convolution whose stride is its kernel, as a product; pixels beyond the last whole patch are not used"
    k = w[f'{n}.weight']
    p = k.shape[-1]
    rows, cols = (s // p for s in px.shape[1:])
    tiles = px[:, : rows * p, : cols * p].reshape(3, rows, p, cols, p).permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)
    return tiles @ k.reshape(len(k), -1).T + w.get(f'{n}.bias', 0)


def clip_features(w, c, px, layer):
    "Hidden state `layer` (from the end) of CLIP's encoder without the class token"
    p, v = 'vision_model', c['vision_config']
    x = (
        torch.cat([w[f'{p}.embeddings.class_embedding'][None], patches(w, f'{p}.embeddings.patch_embedding', px)])
        + w[f'{p}.embeddings.position_embedding.weight']
    )
    states = [layer_norm(w, f'{p}.pre_layrnorm', x, 1e-5)]
    for i in range(v['num_hidden_layers']):
        states.append(vit_layer(w, f'{p}.encoder.layers.{i}', states[-1], v['num_attention_heads'], quick_gelu, 1e-5))
    return states[layer][1:]


def siglip_features(w, p, layers, num_heads, px):
    "The last hidden state of the layers that there are"
    x = patches(w, f'{p}.embeddings.patch_embedding', px) + w[f'{p}.embeddings.position_embedding.weight']
    for i in range(layers):
        x = vit_layer(w, f'{p}.encoder.layers.{i}', x, num_heads, gelu_tanh, 1e-6)
    return x


def vit_layer(w, p, x, num_heads, act, eps):
    h = layer_norm(w, f'{p}.layer_norm1', x, eps)
    x = x + linear(
        w,
        f'{p}.self_attn.out_proj',
        attend(*(linear(w, f'{p}.self_attn.{n}_proj', h) for n in 'qkv'), num_heads, False),
    )
    return x + linear(w, f'{p}.mlp.fc2', act(linear(w, f'{p}.mlp.fc1', layer_norm(w, f'{p}.layer_norm2', x, eps))))


def internvit_features(w, v, px):
    "InternViT: class token, fused qkv, scaled residuals, no final norm; then four neighbors side by side"
    p = 'vision_model'
    e = f'{p}.embeddings'
    x = (
        torch.cat([w[f'{e}.class_embedding'][0], patches(w, f'{e}.patch_embedding', px)])
        + w[f'{e}.position_embedding'][0]
    )
    for i in range(v['num_hidden_layers']):
        b = f'{p}.encoder.layers.{i}'
        q, k, u = linear(w, f'{b}.attn.qkv', layer_norm(w, f'{b}.norm1', x, 1e-6)).chunk(3, -1)
        x = x + w[f'{b}.ls1'] * linear(w, f'{b}.attn.proj', attend(q, k, u, v['num_attention_heads'], False))
        x = x + w[f'{b}.ls2'] * linear(
            w, f'{b}.mlp.fc2', gelu(linear(w, f'{b}.mlp.fc1', layer_norm(w, f'{b}.norm2', x, 1e-6)))
        )
    side = round(len(x[1:]) ** 0.5)
    x = x[1:].reshape(side, side, -1)
    x = torch.cat([x[0::2, 0::2], x[0::2, 1::2], x[1::2, 0::2], x[1::2, 1::2]], -1).flatten(0, 1)
    return linear(w, 'mlp1.3', gelu(linear(w, 'mlp1.1', layer_norm(w, 'mlp1.0', x, 1e-5))))


def llama(w, c, x, p='model', head='lm_head', eps=1e-5):
    H, K = c['num_attention_heads'], c['num_key_value_heads']
    d = c['hidden_size'] // H
    freq = 10000.0 ** (-torch.arange(0, d, 2) / d)
    for i in range(c['num_hidden_layers']):
        b = f'{p}.layers.{i}'
        h = rms_norm(w, f'{b}.input_layernorm', x, eps)
        q, k, v = (linear(w, f'{b}.self_attn.{n}_proj', h) for n in 'qkv')

        def share(t):
            return torch.cat([o for o in t.chunk(K, -1) for _ in range(H // K)], -1)

        x = x + linear(
            w, f'{b}.self_attn.o_proj', attend(rotate(q, H, freq), share(rotate(k, K, freq)), share(v), H, True)
        )
        h = rms_norm(w, f'{b}.post_attention_layernorm', x, eps)
        x = x + linear(
            w, f'{b}.mlp.down_proj', silu(linear(w, f'{b}.mlp.gate_proj', h)) * linear(w, f'{b}.mlp.up_proj', h)
        )
    return linear(w, head, rms_norm(w, f'{p}.norm', x, eps))


def phi(w, c, x):
    H = c['num_attention_heads']
    d = c['hidden_size'] // H
    r = int(c['partial_rotary_factor'] * d)
    freq = 10000.0 ** (-torch.arange(0, r, 2) / r)
    for i in range(c['num_hidden_layers']):
        b = f'model.layers.{i}'
        h = layer_norm(w, f'{b}.input_layernorm', x, 1e-5)
        q, k, v = (linear(w, f'{b}.self_attn.{n}_proj', h) for n in 'qkv')
        x = (
            x
            + linear(w, f'{b}.self_attn.dense', attend(rotate(q, H, freq), rotate(k, H, freq), v, H, True))
            + linear(w, f'{b}.mlp.fc2', gelu_tanh(linear(w, f'{b}.mlp.fc1', h)))
        )
    return linear(w, 'lm_head', layer_norm(w, 'model.final_layernorm', x, 1e-5))


def phi3(w, c, x):
    H = c['num_attention_heads']
    d = c['hidden_size'] // H
    freq, scale = 10000.0 ** (-torch.arange(0, d, 2) / d), 1.0
    if s := c['rope_scaling']:
        old, new = c['original_max_position_embeddings'], c['max_position_embeddings']
        freq, scale = (
            freq / torch.tensor(s['long_factor' if len(x) > old else 'short_factor']),
            (1 + math.log(new / old) / math.log(old)) ** 0.5,
        )
    for i in range(c['num_hidden_layers']):
        b = f'language_model.model.layers.{i}'
        q, k, v = linear(w, f'{b}.self_attn.qkv_proj', rms_norm(w, f'{b}.input_layernorm', x, 1e-5)).chunk(3, -1)
        x = x + linear(
            w, f'{b}.self_attn.o_proj', attend(rotate(q, H, freq, scale), rotate(k, H, freq, scale), v, H, True)
        )
        gate, up = linear(w, f'{b}.mlp.gate_up_proj', rms_norm(w, f'{b}.post_attention_layernorm', x, 1e-5)).chunk(
            2, -1
        )
        x = x + linear(w, f'{b}.mlp.down_proj', up * silu(gate))
    return linear(w, 'language_model.lm_head', rms_norm(w, 'language_model.model.norm', x, 1e-5))


def spliced(words, prompt, see):
    return torch.cat([words[p] if isinstance(p, list) else see(p) for p in prompt])


def projected(w, x, p='model.mm_projector', a='0', b='2'):
    return linear(w, f'{p}.{b}', gelu(linear(w, f'{p}.{a}', x)))


def llava_logits(o, prompt):
    def see(px):
        return projected(o['w'], clip_features(o['tower'], o['tower_config'], px, -2))

    return llama(o['w'], o['config'], spliced(o['w']['model.embed_tokens.weight'], prompt, see))


def bunny_logits(o, prompt):
    v = o['tower_config']['vision_config']

    def see(px):
        return projected(
            o['w'],
            siglip_features(
                o['w'],
                'model.vision_tower.vision_tower.vision_model',
                v['num_hidden_layers'] - 1,
                v['num_attention_heads'],
                px,
            ),
        )

    return phi(o['w'], o['config'], spliced(o['w']['model.embed_tokens.weight'], prompt, see))


def internvl_logits(o, prompt):
    def see(tiles):
        return torch.cat([internvit_features(o['w'], o['config']['vision_config'], t) for t in tiles])

    return phi3(
        o['w'], o['config']['llm_config'], spliced(o['w']['language_model.model.embed_tokens.weight'], prompt, see)
    )


def native_logits(o, prompt):
    "The llava-hf layout: the same LLaVA under the names of transformers"
    w = o['w']

    def see(px):
        return projected(
            w,
            clip_features({k.removeprefix('vision_tower.'): t for k, t in w.items()}, o['config'], px, -2),
            'multi_modal_projector',
            'linear_1',
            'linear_2',
        )

    return llama(
        w,
        o['config']['text_config'],
        spliced(w['language_model.model.embed_tokens.weight'], prompt, see),
        'language_model.model',
        'language_model.lm_head',
    )


LOGITS = dict(llava=llava_logits, bunny=bunny_logits, internvl=internvl_logits, native=native_logits)

# --- random tensors under the published names -----------------------------------------------------------------------


class Tensors(dict):
    "Random tensors by name"

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def put(self, name, *shape, mean=0.0, std=0.2):
        self[name] = mean + std * torch.randn(*shape, generator=self.random)

    def map(self, name, out, inn, bias=True):
        self.put(f'{name}.weight', out, inn, std=inn**-0.5)
        if bias:
            self.put(f'{name}.bias', out)

    def norm(self, name, n, bias=True):
        self.put(f'{name}.weight', n, mean=1.0)
        if bias:
            self.put(f'{name}.bias', n)


def vit(t, p, v, clip=True):
    D, P, N = v['hidden_size'], v['patch_size'], (v['image_size'] // v['patch_size']) ** 2 + clip
    if clip:
        t.put(f'{p}.embeddings.class_embedding', D)
        t.norm(f'{p}.pre_layrnorm', D)
    t.put(f'{p}.embeddings.patch_embedding.weight', D, 3, P, P, std=0.05)
    t.put(f'{p}.embeddings.position_embedding.weight', N, D)
    if not clip:
        t.put(f'{p}.embeddings.patch_embedding.bias', D)
    for i in range(v['num_hidden_layers']):
        b = f'{p}.encoder.layers.{i}'
        t.norm(f'{b}.layer_norm1', D)
        t.norm(f'{b}.layer_norm2', D)
        for n in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
            t.map(f'{b}.self_attn.{n}', D, D)
        t.map(f'{b}.mlp.fc1', v['intermediate_size'], D)
        t.map(f'{b}.mlp.fc2', D, v['intermediate_size'])
    t.norm(f'{p}.post_layernorm', D)


def llama_tensors(t, c, p='model', head='lm_head'):
    D, F, V, K = (
        c['hidden_size'],
        c['intermediate_size'],
        c['vocab_size'],
        c['num_key_value_heads'] * (c['hidden_size'] // c['num_attention_heads']),
    )
    t.put(f'{p}.embed_tokens.weight', V, D)
    t.norm(f'{p}.norm', D, False)
    t.map(head, V, D, False)
    for i in range(c['num_hidden_layers']):
        b = f'{p}.layers.{i}'
        t.norm(f'{b}.input_layernorm', D, False)
        t.norm(f'{b}.post_attention_layernorm', D, False)
        for n, out in (('q_proj', D), ('k_proj', K), ('v_proj', K), ('o_proj', D)):
            t.map(f'{b}.self_attn.{n}', out, D, False)
        t.map(f'{b}.mlp.gate_proj', F, D, False)
        t.map(f'{b}.mlp.up_proj', F, D, False)
        t.map(f'{b}.mlp.down_proj', D, F, False)


def phi_tensors(t, c):
    D, F, V = c['hidden_size'], c['intermediate_size'], c['vocab_size']
    t.put('model.embed_tokens.weight', V, D)
    t.norm('model.final_layernorm', D)
    t.map('lm_head', V, D, False)
    for i in range(c['num_hidden_layers']):
        b = f'model.layers.{i}'
        t.norm(f'{b}.input_layernorm', D)
        for n in ('q_proj', 'k_proj', 'v_proj', 'dense'):
            t.map(f'{b}.self_attn.{n}', D, D)
        t.map(f'{b}.mlp.fc1', F, D)
        t.map(f'{b}.mlp.fc2', D, F)


def phi3_tensors(t, c):
    D, F, V, p = c['hidden_size'], c['intermediate_size'], c['vocab_size'], 'language_model.model'
    t.put(f'{p}.embed_tokens.weight', V, D)
    t.norm(f'{p}.norm', D, False)
    t.map('language_model.lm_head', V, D, False)
    for i in range(c['num_hidden_layers']):
        b = f'{p}.layers.{i}'
        t.norm(f'{b}.input_layernorm', D, False)
        t.norm(f'{b}.post_attention_layernorm', D, False)
        t.map(f'{b}.self_attn.qkv_proj', 3 * D, D, False)
        t.map(f'{b}.self_attn.o_proj', D, D, False)
        t.map(f'{b}.mlp.gate_up_proj', 2 * F, D, False)
        t.map(f'{b}.mlp.down_proj', D, F, False)


def internvit_tensors(t, v, words):
    D, P, N, p = v['hidden_size'], v['patch_size'], (v['image_size'] // v['patch_size']) ** 2, 'vision_model'
    t.put(f'{p}.embeddings.class_embedding', 1, 1, D)
    t.put(f'{p}.embeddings.position_embedding', 1, N + 1, D)
    t.put(f'{p}.embeddings.patch_embedding.weight', D, 3, P, P, std=0.05)
    t.put(f'{p}.embeddings.patch_embedding.bias', D)
    for i in range(v['num_hidden_layers']):
        b = f'{p}.encoder.layers.{i}'
        for n in ('norm1', 'norm2'):
            t.norm(f'{b}.{n}', D)
        for n in ('ls1', 'ls2'):
            t.put(f'{b}.{n}', D, mean=0.5)
        t.map(f'{b}.attn.qkv', 3 * D, D)
        t.map(f'{b}.attn.proj', D, D)
        t.map(f'{b}.mlp.fc1', v['intermediate_size'], D)
        t.map(f'{b}.mlp.fc2', D, v['intermediate_size'])
    t.norm('mlp1.0', 4 * D)
    t.map('mlp1.1', words, 4 * D)
    t.map('mlp1.3', words, words)


# --- the files ------------------------------------------------------------------------------------------------------

WORDS = [
    '▁',
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?'|<>/0123456789",
    'he',
    '▁t',
    '▁the',
    'an',
    'ow',
    '▁H',
    '▁How',
    '▁m',
    '▁man',
    '▁many',
    '▁many?',
    'nd',
    '▁U',
    'SE',
    '▁USE',
    '▁USER',
]
BYTES = [f'<0x{i:02X}>' for i in range(256)]


def sentencepiece(path, words=WORDS):
    "A SentencePiece file: fields 1 (piece), 2 (score), 3 (type) of each piece, in the wire format of protocol buffers"

    def piece(text, score, kind):
        body = (
            b'\x0a'
            + bytes([len(text.encode())])
            + text.encode()
            + b'\x15'
            + struct.pack('<f', score)
            + bytes([0x18, kind])
        )
        return b'\x0a' + bytes([len(body)]) + body

    out = (
        [piece('<unk>', 0, 2), piece('<s>', 0, 3), piece('</s>', 0, 3)]
        + [piece(b, 0, 6) for b in BYTES]
        + [piece(w, -float(i), 1) for i, w in enumerate(words)]
    )
    path.write_bytes(b''.join(out) + b'\x12\x02\x08\x01')  # and a field that is of no interest
    return ['<unk>', '<s>', '</s>', *BYTES, *words]


def pieces(text, vocab, words=WORDS):
    "Ids of a text as SentencePiece finds them: best pairs of neighbors are joined while they are pieces; then bytes"
    ids, score, parts = (
        {w: i for i, w in enumerate(vocab)},
        {w: -i for i, w in enumerate(words)},
        list('▁' + text.replace(' ', '▁')),
    )
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for p in parts for i in ([ids[p]] if p in score else [ids[f'<0x{b:02X}>'] for b in p.encode()])]


def bytes_to_signs():
    "GPT-2's sign for each byte"
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {b: chr(b) if b in plain else chr(next(spare)) for b in range(256)}


def write_json(folder, **files):
    for n, v in files.items():
        (folder / f'{n}.json').write_text(json.dumps(v))


def write_shards(folder, w, pickled=False):
    "Two shards and an index"
    stem, end = ('pytorch_model', 'bin') if pickled else ('model', 'safetensors')
    names = [f'{stem}-0000{i}-of-00002.{end}' for i in (1, 2)]
    keys = list(w)
    for name, part in zip(names, (keys[::2], keys[1::2])):
        (torch.save if pickled else save_file)({k: w[k] for k in part}, folder / name)
    index = dict(
        metadata=dict(total_size=sum(t.numel() * 4 for t in w.values())),
        weight_map={k: names[i % 2] for i, k in enumerate(keys)},
    )
    (folder / f'{stem}.{end}.index.json').write_text(json.dumps(index))


def write_llava(folder, seed=0, kv_heads=4):
    "LLaVA-v1.5: pickled shards, slow tokenizer, the encoder apart as a whole CLIP"
    t, tower = Tensors(seed), Tensors(seed + 1)
    folder.mkdir(parents=True)
    clip = folder.parent / 'tiny-clip'
    clip.mkdir()
    vocab = sentencepiece(folder / 'tokenizer.model')
    v = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=28,
        patch_size=14,
        hidden_act='quick_gelu',
        layer_norm_eps=1e-5,
    )
    c = dict(
        architectures=['LlavaLlamaForCausalLM'],
        model_type='llava',
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=len(vocab),
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        hidden_act='silu',
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_scaling=None,
        torch_dtype='float16',
        image_aspect_ratio='pad',
        mm_projector_type='mlp2x_gelu',
        mm_hidden_size=24,
        mm_vision_tower='someone/tiny-clip',
        mm_vision_select_layer=-2,
        mm_vision_select_feature='patch',
        mm_use_im_start_end=False,
        use_mm_proj=True,
        freeze_mm_mlp_adapter=False,
    )
    llama_tensors(t, c)
    t.map('model.mm_projector.0', 32, 24)
    t.map('model.mm_projector.2', 32, 32)
    vit(tower, 'vision_model', v)
    more = dict(tower)
    more['logit_scale'] = torch.tensor(4.6)
    more['text_projection.weight'] = torch.ones(8, 8)
    more['visual_projection.weight'] = torch.ones(8, 24)
    more['text_model.final_layer_norm.weight'] = torch.ones(8)
    more['vision_model.embeddings.position_ids'] = torch.arange(5)[None]
    write_shards(
        folder, t | {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(4) for i in range(2)}, pickled=True
    )
    torch.save({k: t[k] for k in t if 'mm_projector' in k}, folder / 'mm_projector.bin')
    save_file(more, clip / 'model.safetensors')
    write_json(
        folder,
        config=c,
        generation_config=dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
        tokenizer_config=dict(
            tokenizer_class='LlamaTokenizer',
            legacy=False,
            bos_token='<s>',
            eos_token='</s>',
            unk_token='<unk>',
            pad_token='<unk>',
            model_max_length=2048,
        ),
    )
    write_json(
        clip,
        config=dict(model_type='clip', text_config={}, vision_config=v),
        preprocessor_config=dict(
            crop_size=28,
            do_center_crop=True,
            do_normalize=True,
            do_resize=True,
            feature_extractor_type='CLIPFeatureExtractor',
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            resample=3,
            size=28,
        ),
    )
    return dict(
        w=t,
        tower=tower,
        config=c,
        tower_config=dict(vision_config=v),
        vocab=vocab,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        size=28,
    )


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_bunny(folder, seed=0):
    "Bunny-v1.0: safetensors shards with all but the last layer of the encoder inside, files of Python beside"
    t = Tensors(seed)
    folder.mkdir(parents=True)
    siglip = folder.parent / 'tiny-siglip'
    siglip.mkdir()
    signs = list(bytes_to_signs().values())
    merges = [('h', 'e'), ('Ġ', 't'), ('Ġt', 'he'), ('Ġ', 'm'), ('a', 'n'), ('Ġm', 'an')]
    vocab = [*signs, *(a + b for a, b in merges), '<|endoftext|>']
    v = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=30,
        patch_size=14,
        model_type='siglip_vision_model',
    )
    c = dict(
        architectures=['BunnyPhiForCausalLM'],
        model_type='bunny-phi',
        auto_map=dict(AutoConfig='modeling.Config', AutoModelForCausalLM='modeling.Model'),
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(vocab),
        layer_norm_eps=1e-5,
        hidden_act='gelu_new',
        partial_rotary_factor=0.4,
        rope_theta=10000.0,
        rope_scaling=None,
        qk_layernorm=False,
        resid_pdrop=0.1,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        torch_dtype='float16',
        bos_token_id=len(vocab) - 1,
        eos_token_id=len(vocab) - 1,
        pad_token_id=len(vocab) - 1,
        image_aspect_ratio='pad',
        mm_projector_type='mlp2x_gelu',
        mm_hidden_size=24,
        mm_vision_tower='someone/tiny-siglip',
        use_mm_proj=True,
        tokenizer_model_max_length=2048,
    )
    phi_tensors(t, c)
    t.map('model.mm_projector.0', 40, 24)
    t.map('model.mm_projector.2', 40, 40)
    vit(t, 'model.vision_tower.vision_tower.vision_model', v | dict(num_hidden_layers=2), clip=False)
    write_shards(folder, t)
    (folder / 'modeling.py').write_text("raise RuntimeError('this file must not be run')")
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, merges)))
    write_json(
        folder,
        config=c,
        vocab={s: i for i, s in enumerate(vocab)},
        tokenizer_config=dict(
            tokenizer_class='CodeGenTokenizer',
            add_prefix_space=False,
            bos_token='<|endoftext|>',
            eos_token='<|endoftext|>',
            unk_token='<|endoftext|>',
            model_max_length=2048,
            auto_map=dict(AutoTokenizer=['modeling.Tok', None]),
        ),
    )
    write_json(
        siglip,
        config=dict(model_type='siglip', vision_config=v),
        preprocessor_config=dict(
            image_processor_type='SiglipImageProcessor',
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            resample=3,
            size=dict(height=30, width=30),
        ),
    )
    return dict(
        w=t,
        config=c,
        tower_config=dict(vision_config=v),
        vocab=vocab,
        merges=merges,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        size=30,
    )


MARKS = [
    '<|endoftext|>',
    '<|assistant|>',
    '<|system|>',
    '<|end|>',
    '<|user|>',
    '<img>',
    '</img>',
    '<IMG_CONTEXT>',
    '<quad>',
]


def write_internvl(folder, seed=0, scaled=True):
    "Mini-InternVL-Chat-4B-V1-5: everything inside, fused maps, files of Python beside"
    t = Tensors(seed)
    folder.mkdir(parents=True)
    vocab = sentencepiece(folder / 'tokenizer.model')
    v = dict(
        architectures=['InternVisionModel'],
        model_type='intern_vit_6b',
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        num_channels=3,
        hidden_act='gelu',
        layer_norm_eps=1e-6,
        norm_type='layer_norm',
        qkv_bias=True,
        qk_normalization=False,
        initializer_factor=1.0,
        use_flash_attn=True,
        drop_path_rate=0.1,
    )
    c = dict(
        architectures=['Phi3ForCausalLM'],
        model_type='phi3',
        auto_map={},
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(vocab) + len(MARKS),
        rms_norm_eps=1e-5,
        hidden_act='silu',
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=len(vocab),
        max_position_embeddings=640,
        original_max_position_embeddings=160,
        rope_scaling=dict(type='su', short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 3.0, 4.5])
        if scaled
        else None,
        torch_dtype='bfloat16',
    )
    whole = dict(
        architectures=['InternVLChatModel'],
        model_type='internvl_chat',
        auto_map=dict(AutoConfig='modeling.Config'),
        vision_config=v,
        llm_config=c,
        downsample_ratio=0.5,
        ps_version='v2',
        select_layer=-1,
        template='phi3-chat',
        force_image_size=16,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        pad2square=False,
        torch_dtype='bfloat16',
    )
    phi3_tensors(t, c)
    internvit_tensors(t, v, 32)
    write_shards(folder, t)
    (folder / 'modeling.py').write_text("raise RuntimeError('this file must not be run')")
    write_json(
        folder,
        config=whole,
        added_tokens={m: len(vocab) + i for i, m in enumerate(MARKS)},
        tokenizer_config=dict(
            tokenizer_class='LlamaTokenizer',
            legacy=False,
            bos_token='<s>',
            eos_token='</s>',
            unk_token='<unk>',
            pad_token='</s>',
            model_max_length=8192,
        ),
    )
    return dict(
        w=t, config=whole, vocab=[*vocab, *MARKS], mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], size=16
    )


def write_native(folder, seed=0):
    "llava-hf: the names that transformers writes, one file"
    t = Tensors(seed)
    folder.mkdir(parents=True)
    vocab = {
        w: i for i, w in enumerate(['<unk>', '<s>', '</s>', '<image>', '<pad>', *(chr(i) for i in range(32, 127))])
    }
    v = dict(
        model_type='clip_vision_model',
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=28,
        patch_size=14,
        projection_dim=24,
        vocab_size=100,
    )
    c = dict(
        model_type='llama',
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocab),
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )
    whole = dict(
        architectures=['LlavaForConditionalGeneration'],
        model_type='llava',
        image_token_index=3,
        text_config=c,
        vision_config=v,
        vision_feature_layer=-2,
        vision_feature_select_strategy='default',
        projector_hidden_act='gelu',
        ignore_index=-100,
        pad_token_id=4,
        torch_dtype='float32',
    )
    llama_tensors(t, c, 'language_model.model', 'language_model.lm_head')
    vit(t, 'vision_tower.vision_model', v)
    t.map('multi_modal_projector.linear_1', 32, 24)
    t.map('multi_modal_projector.linear_2', 32, 32)
    save_file(t, folder / 'model.safetensors', metadata=dict(format='pt'))
    added = [
        dict(id=i, content=w, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for w, i in list(vocab.items())[:5]
    ]
    write_json(
        folder,
        config=whole,
        tokenizer=dict(
            version='1.0',
            truncation=None,
            padding=None,
            added_tokens=added,
            normalizer=None,
            pre_tokenizer=dict(type='Split', pattern=dict(Regex='.'), behavior='Isolated', invert=False),
            post_processor=None,
            decoder=None,
            model=dict(type='WordLevel', vocab=vocab, unk_token='<unk>'),
        ),
        tokenizer_config=dict(
            tokenizer_class='PreTrainedTokenizerFast',
            bos_token='<s>',
            eos_token='</s>',
            pad_token='<pad>',
            unk_token='<unk>',
        ),
        processor_config=dict(
            image_token='<image>',
            patch_size=14,
            processor_class='LlavaProcessor',
            vision_feature_select_strategy='default',
            num_additional_image_tokens=1,
        ),
        preprocessor_config=dict(
            image_processor_type='CLIPImageProcessor',
            crop_size=dict(height=28, width=28),
            size=dict(shortest_edge=28),
            do_center_crop=True,
            do_convert_rgb=True,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            resample=3,
            rescale_factor=1 / 255,
        ),
    )
    return dict(w=t, config=whole, vocab=list(vocab), mean=CLIP_MEAN, std=CLIP_STD, size=28)


WRITE = dict(llava=write_llava, bunny=write_bunny, internvl=write_internvl, native=write_native)
