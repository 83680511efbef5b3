"Scores against plain autograd and direct definitions, on the four architectures; stopping and going on; bad input."

import copy
import json
import math
import re
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    PhiConfig,
    SiglipVisionConfig,
)
from lvlm_study.core.store import Run, read_rows
from lvlm_study.importance import importance
from lvlm_study.importance.agreement import CALIBRATION_CRITERIA, run_calibration, spearman
from lvlm_study.importance.block_influence import block_influence, bootstrap_ci
from lvlm_study.importance.importance import CRITERIA, SCORE_KINDS, Scores, score
from lvlm_study.importance.layer_scores import iterative_influence, reference_block_influence, skip_layers
from lvlm_study.importance.taylor import hook_gradients, zero_groups
from lvlm_study.importance.validity import removal_effects, run_prediction
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import answer_loss

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
EYE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)


def llava(text, vision=None):
    cfg = LlavaConfig(
        vision_config=vision or CLIPVisionConfig(**EYE), text_config=text, image_token_id=3, image_seq_length=16
    )
    return LlavaForConditionalGeneration(cfg)


def bunny():
    cfg = LlavaConfig(
        vision_config=SiglipVisionConfig(**EYE),
        text_config=PhiConfig(**SMALL),
        image_token_id=3,
        image_seq_length=16,
        vision_feature_select_strategy='full',
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(cfg)


def internvl():
    eye = InternVLVisionConfig(**EYE | dict(image_size=[16, 16], patch_size=[4, 4]))
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=eye,
            text_config=Phi3Config(**SMALL | dict(num_key_value_heads=2)),
            image_token_id=3,
            image_seq_length=4,
            downsample_ratio=0.5,
        )
    )


FAMILIES = dict(
    llava=lambda: llava(LlamaConfig(**SMALL)),
    gqa=lambda: llava(LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    bunny=bunny,
    internvl=internvl,
)
TILES = dict(internvl=4)  # image tokens a picture; 16 elsewhere


def build(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for n, p in model.named_parameters():  # biases start at zero, where they would not be seen
        if n.endswith('bias'):
            torch.nn.init.normal_(p, std=0.3)
    return LVLM(model, name=name)


def make_batch(name, seed=0):
    "Three samples: one picture and a short question; two pictures; none. Padded on the right."
    g = torch.Generator().manual_seed(seed)
    n = TILES.get(name, 16)

    def word(k):
        return torch.randint(4, 64, (k,), generator=g).tolist()

    ids, labels = [], []
    for images, q, ans in ((1, 5, 2), (2, 3, 4), (0, 9, 1)):
        q, ans = [1] + [3] * (n * images) + word(q), word(ans) + [2]
        ids.append(q + ans)
        labels.append([-100] * len(q) + ans)
    T = max(map(len, ids))

    def pad(x, v):
        return torch.tensor([r + [v] * (T - len(r)) for r in x])

    return dict(
        input_ids=pad(ids, 0),
        labels=pad(labels, -100),
        attention_mask=pad([[1] * len(r) for r in ids], 0),
        pixel_values=torch.randn(3, 3, 16, 16, generator=g),
    )


@pytest.fixture(scope='module', params=FAMILIES)
def small(request):
    return build(request.param), make_batch(request.param)


def rel(a, b):
    "Largest difference, relative to the largest value"
    return float((a - b).abs().max() / b.abs().max())


# --- references that share no code with the package -------------------------------------------------------------


def found_maps(lvlm):
    return {
        (i, r): b.get_submodule(p)
        for i, b in enumerate(lvlm.layers)
        for r, p in (lvlm.architecture.attn | lvlm.architecture.mlp).items()
    }


def samples_of(name, batch):
    "Each sample alone, cut by hand: pictures 0; 1 and 2; none."
    out = []
    for i, pics in enumerate((slice(0, 1), slice(1, 3), None)):
        n = int(batch['attention_mask'][i].sum())
        out.append(
            {k: batch[k][i : i + 1, :n] for k in ('input_ids', 'labels', 'attention_mask')}
            | ({} if pics is None else dict(pixel_values=batch['pixel_values'][pics]))
        )
    return out


def by_autograd(lvlm, sample, mask=None, batch_mean=False):
    "{(layer, role): (weight, gradient, bias, gradient)}, all at once; with a mask the gradient through those tokens."
    maps = found_maps(lvlm)
    handles = []

    def only_there(m, args, out):
        const = F.linear(args[0], m.weight.detach(), None if m.bias is None else m.bias.detach())
        free = F.linear(args[0].detach(), m.weight, m.bias)
        return const + torch.where(mask[..., None], free - free.detach(), torch.zeros(()))

    if mask is not None:
        handles = [m.register_forward_hook(only_there) for m in maps.values()]
    lvlm.model.zero_grad(set_to_none=True)
    x = {k: v for k, v in sample.items() if k != 'labels'}
    if batch_mean:
        lvlm.model(**sample).loss.backward()
    else:
        F.cross_entropy(lvlm.model(**x).logits[0, :-1], sample['labels'][0, 1:]).backward()
    for h in handles:
        h.remove()
    out = {
        k: (m.weight.detach().clone(), m.weight.grad, m.bias, None if m.bias is None else m.bias.grad)
        for k, m in maps.items()
    }
    lvlm.model.zero_grad(set_to_none=True)
    return out


def units(a, role, g):
    "Rows (columns of o and down) of group g, spelt out."
    n, d, H = a.query_heads // a.kv_heads, a.head_dim, a.kv_heads
    q, k = list(range(g * n * d, (g + 1) * n * d)), list(range(g * d, (g + 1) * d))
    return dict(
        q=q,
        o=q,
        k=k,
        v=k,
        qkv=q + [a.query_heads * d + j for j in k] + [(a.query_heads + H) * d + j for j in k],
        gate=[g],
        up=[g],
        down=[g],
        gate_up=[g, a.mlp_channels + g],
    )[role]


def direct(a, tensors, f, biases=True):
    "layers, kv_heads, mlp_channels: sums of f(weight, gradient) over what belongs to each, group by group."
    layers, kv_heads, mlp_channels = (
        torch.zeros(a.num_layers),
        torch.zeros(a.num_layers, a.kv_heads),
        torch.zeros(a.num_layers, a.mlp_channels),
    )
    for (i, r), (w, gw, b, gb) in tensors.items():
        fw, fb = f(w, gw), None if b is None or not biases else f(b.detach(), gb)
        layers[i] += fw.sum() + (0 if fb is None else fb.sum())
        to = kv_heads if r in a.attn else mlp_channels
        for g in range(to.shape[1]):
            u = units(a, r, g)
            to[i, g] += fw[:, u].sum() if r in ('o', 'down') else fw[u].sum() + (0 if fb is None else fb[u].sum())
    return dict(layers=layers, kv_heads=kv_heads, mlp_channels=mlp_channels)


FIRST, SECOND = (lambda w, g: (w * g).abs()), (lambda w, g: (w * g - (w * g) ** 2 / 2).abs())


def hidden(lvlm, batch):
    "States before and after every layer (L+1, B, T, D): transformers' own, without the final norm."
    m = copy.deepcopy(lvlm.model)
    m.model.language_model.norm = torch.nn.Identity()
    if hasattr(m.model.language_model, 'final_layernorm'):
        m.model.language_model.final_layernorm = torch.nn.Identity()
    with torch.no_grad():
        return torch.stack(
            m(**{k: v for k, v in batch.items() if k != 'labels'}, output_hidden_states=True).hidden_states
        )


def masks(batch):
    ids, there = batch['input_ids'], batch['attention_mask'].bool()
    image, mark = ids == 3, (ids == 1) | (ids == 2)
    answer = (batch['labels'] != -100) & ~mark
    return dict(image=image & there, question=~image & ~mark & ~answer & there, answer=answer, special=mark & there)


# --- equality ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def scored(small):
    lvlm, batch = small
    return score(lvlm, batch, CRITERIA, tokens=True, seed=3)


def test_taylor_equals_autograd(small, scored):
    lvlm, batch = small
    for n, s in enumerate(samples_of(lvlm.name, batch)):
        grads = by_autograd(lvlm, s)
        for c, f in (('taylor', FIRST), ('taylor2', SECOND)):
            for what, want in direct(lvlm.architecture, grads, f).items():
                assert rel(scored.samples[what][c][n], want) <= 1e-5, (c, what, n)


def test_taylor_by_kind_equals_autograd(small, scored):
    lvlm, batch = small
    for n, s in enumerate(samples_of(lvlm.name, batch)):
        for kind, m in masks(s).items():
            got = {
                w: scored.samples[w][f'taylor/{kind}'][n] for w in ('layers', 'kv_heads', 'mlp_channels')
            }
            if not m.any():
                assert kind == 'image' and n == 2 and all(g.isnan().all() for g in got.values())
                continue
            for what, want in direct(lvlm.architecture, by_autograd(lvlm, s, m), FIRST).items():
                assert rel(got[what], want) <= 1e-5, (kind, what, n)


def test_published_taylor(small):
    lvlm, batch = small
    got = score(lvlm, batch, 'taylor', reference=True)
    for what, want in direct(lvlm.architecture, by_autograd(lvlm, batch, batch_mean=True), FIRST, biases=False).items():
        assert rel(getattr(got, what)['taylor'], want) <= 1e-5, what


def test_influence_equals_hidden_states(small, scored):
    lvlm, batch = small
    h = hidden(lvlm, batch)
    cos = F.cosine_similarity(h[:-1], h[1:], dim=-1)
    kinds = dict(all=batch['attention_mask'].bool(), **masks(batch))
    for k, m in kinds.items():
        want = 1 - (cos * m).sum(2).div(m.sum(1)).T
        got = scored.samples['layers']['bi' if k == 'all' else f'bi/{k}']
        assert torch.equal(got.isnan(), want.isnan()) and rel(got.nan_to_num(), want.nan_to_num()) <= 1e-5, k
    assert (
        rel(scored.layers['bi/image'], (1 - (cos * kinds['image']).sum(2).div(kinds['image'].sum(1)).T)[:2].mean(0))
        <= 1e-5
    )  # the sample without a picture does not count


def test_angles_of_spans(small, scored):
    lvlm, batch = small
    h = hidden(lvlm, batch)
    L = lvlm.architecture.num_layers
    last = batch['attention_mask'].sum(1) - 1
    for n in range(3):
        for i in range(L):
            for j in range(i + 1, L + 1):
                x, y = h[i, n, last[n]].double(), h[j, n, last[n]].double()
                want = math.acos(float(x @ y / (x.norm() * y.norm()))) / math.pi
                got = float(scored.samples['spans']['angular'][n, i, j - i - 1])
                assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
            assert scored.samples['spans']['angular'][n, i, L - i :].isnan().all()
    assert torch.equal(scored.samples['layers']['angular'], scored.samples['spans']['angular'][:, :, 0])


def test_activation_and_wanda(small, scored):
    lvlm, batch = small
    a, maps, fed = lvlm.architecture, found_maps(lvlm), {}
    handles = [
        maps[i, r].register_forward_hook(lambda m, args, out, k=(i, r): fed.update({k: args[0]}))
        for i in range(a.num_layers)
        for r in ('o', 'down')
    ]
    with torch.no_grad():
        lvlm.model(**batch)
    for h in handles:
        h.remove()
    for kind, m in dict(all=batch['attention_mask'].bool(), **masks(batch)).items():

        def name(c):
            return c if kind == 'all' else f'{c}/{kind}'

        for what, r, G in (('kv_heads', 'o', a.kv_heads), ('mlp_channels', 'down', a.mlp_channels)):
            for n in range(3):
                if not m[n].any():
                    assert scored.samples[what][name('wanda')][n].isnan().all()
                    continue
                for i in range(a.num_layers):
                    x, w = fed[i, r][n, m[n]], maps[i, r].weight.detach().abs().sum(0)
                    rms = x.pow(2).mean(0)
                    act = torch.stack([rms[units(a, r, g)].sum().sqrt() for g in range(G)])
                    wan = torch.stack([(rms.sqrt() * w)[units(a, r, g)].sum() for g in range(G)])
                    assert (
                        rel(scored.samples[what][name('activation')][n, i], act) <= 1e-5
                        and rel(scored.samples[what][name('wanda')][n, i], wan) <= 1e-5
                    )


def test_loss_without_a_layer_is_that_of_a_smaller_model(small, scored):
    lvlm, batch = small
    for n, s in enumerate(samples_of(lvlm.name, batch)):
        with torch.no_grad():
            base = lvlm.model(**s).loss
        for i in range(lvlm.architecture.num_layers):
            m = copy.deepcopy(lvlm.model)
            del m.model.language_model.layers[i]
            m.config.text_config.num_hidden_layers -= 1
            with torch.no_grad():
                want = m(**s, use_cache=False).loss - base
            assert float(scored.samples['layers']['loss'][n, i]) == pytest.approx(float(want), abs=1e-4)


def test_magnitude(small, scored):
    lvlm, _ = small
    weights = {k: (m.weight.detach(), None, m.bias, None) for k, m in found_maps(lvlm).items()}
    for what, want in direct(lvlm.architecture, weights, lambda w, g: w.abs()).items():
        assert rel(getattr(scored, what)['l1'], want) <= 1e-5
    for what, want in direct(lvlm.architecture, weights, lambda w, g: w**2).items():
        assert rel(getattr(scored, what)['l2'], want.sqrt()) <= 1e-5


def test_sizes_are_what_removal_saves(small):
    lvlm, _ = small
    a, s = lvlm.architecture, parameter_sizes(lvlm)
    ones = {
        k: (torch.ones_like(m.weight), None, None if m.bias is None else torch.ones_like(m.bias), None)
        for k, m in found_maps(lvlm).items()
    }
    n = direct(a, ones, lambda w, g: w)
    assert set(n['kv_heads'].flatten().tolist()) == {s['head']} and set(n['mlp_channels'].flatten().tolist()) == {
        s['channel']
    }
    assert (s['kv_heads'], s['mlp_channels']) == (a.kv_heads, a.mlp_channels)
    left = {n: p.numel() for n, p in lvlm.layers[0].named_parameters()}
    rest = sum(v for n, v in left.items() if 'norm' in n) + sum(
        maps.bias.numel()
        for (i, r), maps in found_maps(lvlm).items()
        if i == 0 and r in ('o', 'down') and maps.bias is not None
    )
    assert s['layers'] == [s['kv_heads'] * s['head'] + s['mlp_channels'] * s['channel'] + rest] * a.num_layers
    assert s['total'] == sum(p.numel() for p in lvlm.model.parameters())


def test_random_is_seeded(small):
    lvlm, batch = small
    a, b, c = (score(lvlm, batch, 'random', seed=s).kv_heads['random'] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def published_influence(h):
    "ShortGPT's formula on states (L+1, B, T, D): every token with every token, of which the diagonal is kept."
    out = []
    for x, y in zip(h[:-1], h[1:]):
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        sim = (x @ y.T).diagonal() / (x.norm(dim=-1) * y.norm(dim=-1))
        out.append((1 - sim.nan_to_num(0.5)).sum())
    return torch.stack(out)


def test_published_influence(small):
    lvlm, batch = small
    with torch.no_grad():
        h = torch.stack(lvlm.model(**batch, output_hidden_states=True).hidden_states)
    assert rel(score(lvlm, batch, 'bi', reference=True).layers['bi'], published_influence(h)) <= 1e-5


def test_states_that_are_missing_are_counted(small):
    "transformers gives no state for a layer of another class; hooks find all."

    class Unchanged(torch.nn.Module):
        def forward(self, hidden_states, *args, **options):
            return hidden_states

    lvlm, batch = copy.deepcopy(small[0]), small[1]
    n = len(lvlm.layers)
    lvlm.layers[1] = Unchanged()
    assert block_influence(lvlm, [batch]).mean(0)[1].abs() < 1e-6
    with pytest.raises(ValueError, match=f'gives {n} hidden states for {n} layers'):
        reference_block_influence(lvlm, [batch])


# --- properties -------------------------------------------------------------------------------------------------


def test_neither_padding_nor_neighbors_matter(small, scored):
    lvlm, batch = small
    alone = score(lvlm, samples_of(lvlm.name, batch), ('bi', 'activation', 'taylor'), tokens=True)
    for kind in SCORE_KINDS:
        for c, t in alone.samples[kind].items():
            assert rel(t.nan_to_num(), scored.samples[kind][c].nan_to_num()) <= 1e-5, c


def test_passes_are_shared(small, monkeypatch):
    "However many criteria: one forward pass a batch, or one forward and backward pass a sample."
    lvlm, batch = small
    calls = []
    h = lvlm.part('norm').register_forward_hook(lambda m, args, out: calls.append(len(out)))
    try:
        score(lvlm, batch, ('bi', 'angular', 'activation', 'wanda'), tokens=True)
        assert calls == [3]
        calls.clear()
        score(lvlm, batch, ('bi', 'angular', 'activation', 'wanda', 'taylor', 'taylor2'), tokens=True)
        assert calls == [1, 1, 1]
        calls.clear()
        score(lvlm, batch, ('l1', 'l2', 'random'))
        assert calls == []
    finally:
        h.remove()


def test_model_is_left_as_it_was(small):
    lvlm, batch = small
    m = lvlm.model
    before = {k: v.clone() for k, v in m.state_dict().items()}
    frozen = next(m.parameters())
    frozen.requires_grad_(False)
    kept = lvlm.layers[0].mlp.get_submodule(lvlm.architecture.mlp['down'].split('.')[-1]).weight
    kept.grad = torch.ones_like(kept)

    def hooks():
        return [len(c._forward_hooks) + len(c._forward_pre_hooks) for c in m.modules()]

    m.train()
    had = hooks()  # transformers may have left some of its own
    try:
        score(lvlm, batch, CRITERIA, tokens=True)
        assert (
            m.training
            and not frozen.requires_grad
            and torch.equal(kept.grad, torch.ones_like(kept))
            and sum(p.grad is not None for p in m.parameters()) == 1
        )
        for k, v in m.state_dict().items():
            assert torch.equal(v, before[k]), k
        assert hooks() == had and not any('forward' in vars(b) for b in lvlm.layers)
    finally:
        kept.grad = None
        frozen.requires_grad_(True)
        m.eval()


def test_train_mode_changes_nothing():
    "Phi has dropout; scores are made without it, whatever mode the model is in."
    lvlm, batch = build('bunny'), make_batch('bunny')
    want = score(lvlm, batch, ('bi', 'taylor'))
    for m in lvlm.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    got = score(LVLM(lvlm.model.train()), batch, ('bi', 'taylor'))
    assert torch.equal(got.layers['bi'], want.layers['bi']) and torch.equal(
        got.kv_heads['taylor'], want.kv_heads['taylor']
    )


def test_never_two_gradients_at_once(small):
    lvlm, batch = small
    alive = []

    def see(i, role, p, g):
        alive.append(sum(q.grad is not None for q in lvlm.model.parameters()))

    with hook_gradients(lvlm, see):
        answer_loss(lvlm, samples_of(lvlm.name, batch)[0]).sum().backward()
    assert len(alive) == sum(1 + (m.bias is not None) for m in found_maps(lvlm).values()) and set(alive) == {0}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    lvlm, batch = build('llava'), make_batch('llava')
    whole = score(lvlm, batch, ('bi', 'taylor', 'activation'))
    half = score(LVLM(lvlm.model.to(dtype)), batch, ('bi', 'taylor', 'activation'))
    for kind in SCORE_KINDS:
        for c, t in half.samples[kind].items():
            assert t.dtype == torch.float32 and torch.isfinite(t).all()
            assert rel(t, whole.samples[kind][c]) < (0.2 if dtype == torch.bfloat16 else 0.03), (kind, c)


def test_small_gradients_survive_float16():
    "Gradients below float16's smallest number would be zero without scaling."
    lvlm, batch = build('llava'), make_batch('llava')
    for part, by in (('norm', 3e-3), ('head', 1e-3)):
        lvlm.part(part).weight.data *= by
    want = score(lvlm, batch, 'taylor').mlp_channels['taylor']
    got = score(LVLM(lvlm.model.half()), batch, 'taylor').mlp_channels['taylor']
    assert rel(got, want) < 0.05


def test_silence_is_removal(small):
    "A channel, and where query, key and value maps are apart a KV head, cut out of the matrices by hand."
    lvlm, batch = small
    a = lvlm.architecture
    cases = [('mlp_channels', a.mlp, 3)] + ([('kv_heads', a.attn, 1)] if 'qkv' not in a.attn else [])
    for what, roles, g in cases:
        m = copy.deepcopy(lvlm.model)
        layer = m.model.language_model.layers[1]
        for r, path in roles.items():
            lin = layer.get_submodule(path)
            stay = [j for j in range(lin.weight.shape[1 if r in ('o', 'down') else 0]) if j not in units(a, r, g)]
            lin.weight.data = lin.weight.data[:, stay] if r in ('o', 'down') else lin.weight.data[stay]
            if lin.bias is not None and r not in ('o', 'down'):
                lin.bias.data = lin.bias.data[stay]
        with torch.no_grad():
            want = m(**batch).logits
            with zero_groups(lvlm, 1, what, g):
                got = lvlm.model(**batch).logits
            assert rel(got, want) <= 1e-5 and rel(lvlm.model(**batch).logits, want) > 1e-4


def test_effects_are_those_of_whole_passes(small):
    "Passes that begin in the middle give what whole passes give."
    lvlm, batch = small
    e = removal_effects(lvlm, [batch], mlp_channels=2, seed=1)
    with torch.no_grad():
        base = answer_loss(lvlm, batch)
        for i in range(lvlm.architecture.num_layers):
            with skip_layers(lvlm, [i]):
                assert rel(e['layers'][:, i], answer_loss(lvlm, batch) - base) <= 1e-4
            for h in range(lvlm.architecture.kv_heads):
                with zero_groups(lvlm, i, 'kv_heads', h):
                    assert torch.allclose(e['kv_heads'][:, i, h], answer_loss(lvlm, batch) - base, atol=1e-5)
            for j, c in enumerate(e['which'][i].tolist()):
                with zero_groups(lvlm, i, 'mlp_channels', c):
                    assert torch.allclose(e['mlp_channels'][:, i, j], answer_loss(lvlm, batch) - base, atol=1e-5)


def test_iterative_influence(small):
    "The same order as with models that are really made smaller, layer by layer."
    lvlm, batch = small
    m, left, order = copy.deepcopy(lvlm.model), list(range(lvlm.architecture.num_layers)), []
    for _ in range(2):
        bi = score(LVLM(m), batch, 'bi').layers['bi']
        j = int(bi.argmin())
        order.append(left.pop(j))
        del m.model.language_model.layers[j]
        m.config.text_config.num_hidden_layers -= 1
    assert iterative_influence(lvlm, batch, 2) == order


def test_spearman():
    g = np.random.default_rng(0)
    x, y = g.random(50), g.random(50)
    assert spearman(x, y) == pytest.approx(float(pd.DataFrame(dict(x=x, y=y)).corr(method='spearman').iloc[0, 1]))
    ties = [1, 1, 2, 2, 3], [1, 2, 2, 3, 3]
    assert spearman(*ties) == pytest.approx(
        float(pd.DataFrame(dict(x=ties[0], y=ties[1])).corr(method='spearman').iloc[0, 1])
    )
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)


def test_interval_holds_the_mean_and_skips_nan():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 5
    low, high = bootstrap_ci(x)
    assert (
        (low < x.mean(0).numpy()).all()
        and (x.mean(0).numpy() < high).all()
        and high[0] - low[0] == pytest.approx(4 * float(x[:, 0].std()) / 40**0.5, rel=0.15)
    )
    holes = torch.cat([x, torch.full((5, 3), float('nan'))])
    assert np.isfinite(bootstrap_ci(holes)).all() and abs(bootstrap_ci(holes)[0] - low).max() < 0.15


# --- kept, stopped, resumed -------------------------------------------------------------------------------------


def same(a, b):
    return all(
        list(a.samples[kind]) == list(b.samples[kind])
        and all(torch.equal(t.nan_to_num(), b.samples[kind][c].nan_to_num()) for c, t in a.samples[kind].items())
        for kind in SCORE_KINDS
    )


def test_saved_scores_come_back(small, scored, tmp_path):
    back = Scores.load(scored.save(tmp_path / 'deep' / 'v1.5'))
    assert same(back, scored) and back.meta == json.loads(json.dumps(scored.meta))
    assert sorted(p.name for p in (tmp_path / 'deep').iterdir()) == ['v1.5.json', 'v1.5.safetensors']
    assert {'model', 'sizes', 'ids', 'seed', 'env', 'criteria', 'dtype'} <= set(back.meta) and {
        'torch',
        'transformers',
    } <= set(back.meta['env'])


@pytest.mark.parametrize('stop', [1, 2])
def test_stopped_and_resumed(stop, tmp_path, monkeypatch):
    lvlm = build('gqa')
    data = [make_batch('gqa', seed=s) for s in range(3)]
    want = score(lvlm, data, ('bi', 'taylor'))
    whole, calls = importance.score_batch, []

    def stops(*args):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(*args)

    monkeypatch.setattr(importance, 'score_batch', stops)
    with pytest.raises(KeyboardInterrupt):
        score(lvlm, data, ('bi', 'taylor'), path=tmp_path / 's')
    assert not (tmp_path / 's.json').exists() and len(list((tmp_path / 's.parts').glob('*.safetensors'))) == stop
    monkeypatch.setattr(importance, 'score_batch', lambda *args: calls.append(1) or whole(*args))
    assert same(score(lvlm, data, ('bi', 'taylor'), path=tmp_path / 's'), want) and len(calls) == 3
    assert same(score(lvlm, data, ('bi', 'taylor'), path=tmp_path / 's'), want) and len(calls) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s.json', 's.safetensors']


@pytest.mark.parametrize('changed', ['samples', 'weights', 'criteria', 'seed'])
def test_another_job_is_not_taken_for_this_one(changed, tmp_path):
    lvlm, data = build('gqa'), [make_batch('gqa')]
    score(lvlm, data, ('bi', 'random'), path=tmp_path / 's')
    if changed == 'weights':
        lvlm.layers[0].mlp.down_proj.weight.data += 1
    kw = dict(
        samples=dict(data=[make_batch('gqa', seed=1)]), criteria=dict(criteria=('bi', 'l1')), seed=dict(seed=5)
    ).get(changed, {})
    with pytest.raises(FileExistsError, match='belongs to other scores'):
        score(lvlm, kw.pop('data', data), kw.pop('criteria', ('bi', 'random')), path=tmp_path / 's', **kw)


def test_progress_shows_the_time_left(capsys):
    lvlm, batch = build('llava'), make_batch('llava')
    score(lvlm, [batch] * 2, 'bi', progress=True)
    assert re.search(r'2/2 \[\d\d:\d\d<\d\d:\d\d', capsys.readouterr().err)
    score(lvlm, batch, 'bi', progress=False)
    assert capsys.readouterr().err == ''


# --- bad input --------------------------------------------------------------------------------------------------


def no_labels(b):
    return {k: v for k, v in b.items() if k != 'labels'}


def one_mute(b):
    return b | dict(labels=torch.cat([b['labels'][:2], torch.full_like(b['labels'][2:], -100)]))


def with_nan(lvlm):
    lvlm.layers[1].self_attn.o_proj.weight.data[0, 0] = float('nan')
    return lvlm


def narrower(lvlm):
    lvlm.layers[2].mlp.down_proj.weight.data = lvlm.layers[2].mlp.down_proj.weight.data[:, :30]
    return lvlm


BAD = dict(
    empty=(lambda l, b: score(l, []), 'at least one'),
    unknown=(lambda l, b: score(l, b, 'taylr'), "unknown criterion 'taylr'"),
    too_many=(lambda l, b: score(l, b, 'bi', limit=4), 'a limit of 4 samples was given: choose 1 to 3'),
    none=(lambda l, b: score(l, b, 'bi', limit=0), 'a limit of 0 samples was given'),
    no_labels=(lambda l, b: score(l, no_labels(b), 'taylor'), 'no answer tokens in sample 0 of batch 0'),
    mute=(lambda l, b: score(l, [b, one_mute(b)], 'loss'), 'no answer tokens in sample 2 of batch 1'),
    nan=(lambda l, b: score(with_nan(l), b, 'bi'), 'layers.1.self_attn.o_proj.weight holds values that are not finite'),
    widths=(lambda l, b: score(narrower(l), b, 'l1'), 'down of layer 2 is (32, 30)'),
    reference=(lambda l, b: score(l, b, 'wanda', reference=True), 'no published form'),
    use_images=(lambda l, b: score(l, b, 'bi', use_images=False), 'collated already'),
    pictures=(
        lambda l, b: score(l, b | dict(pixel_values=b['pixel_values'][:2]), 'taylor'),
        'cannot be shared out among 3 samples',
    ),
    iterative=(lambda l, b: iterative_influence(l, b, 3), '3 layers cannot be removed'),
    missing=(lambda l, b: Scores.load('nowhere'), 'nowhere.safetensors is not there'),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence(name, monkeypatch):
    lvlm, batch = build('llava'), make_batch('llava')
    call, says = BAD[name]
    passes = []
    lvlm.part('norm').register_forward_hook(lambda m, args, out: passes.append(1))
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        call(lvlm, batch)
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 300 and not passes


def test_limit_takes_the_first_samples(small):
    lvlm, batch = small
    first_two, all_of_them = (score(lvlm, batch, 'bi', limit=n).samples['layers']['bi'] for n in (2, None))
    assert rel(first_two, all_of_them[:2]) <= 1e-5


# --- rows of the study ------------------------------------------------------------------------------------------


def test_stored_rows_are_whole():
    "Each stored row has what its figures read."
    rows = [r for r in read_rows('importance').values() if 'metrics' in r]
    for r in rows:
        if r['run']['purpose'] == 'prediction':
            assert all(
                f'{w} {c} increase rho' in r['metrics']
                for w, c in (('layers', 'bi'), ('kv_heads', 'taylor'), ('mlp_channels', 'taylor'), ('layers', 'truth'))
            )
        if r['run']['purpose'] == 'calibration':
            assert all(
                len(r['curves'][f'{w} {c} rank mean']) == len(r['curves']['sizes']) for w, c in CALIBRATION_CRITERIA
            )
    if not rows:
        pytest.skip('no stored rows yet')


@pytest.mark.slow
def test_prediction_and_calibration_rows():
    p = run_prediction(Run('importance', calibration=2, limit=2, purpose='prediction'))
    c = run_calibration(Run('importance', calibration=8, purpose='calibration'))
    assert all(len(v) <= 200 for v in p['curves'].values()) and all(
        -1 <= v <= 1 for k, v in p['metrics'].items() if k.endswith('rho') and 'together' not in k
    )
    assert c['curves']['sizes'] == [1, 2] and all(0 <= v <= 1 for v in c['curves']['mlp_channels taylor choice mean'])
