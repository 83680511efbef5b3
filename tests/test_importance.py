"Scores against plain autograd and direct definitions, on the four architectures; stopping and going on; bad input."
import json
import pytest
import torch
from torch.nn import functional as F
from transformers import (AutoModelForCausalLM, CLIPVisionConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig, LlavaConfig,
    LlavaForConditionalGeneration, Phi3Config, PhiConfig, SiglipVisionConfig)
from lvlm_study.models import LVLM

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, max_position_embeddings=256, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, initializer_range=.3)
EYE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)

def llava(text, vision=None):
    cfg = LlavaConfig(vision_config=vision or CLIPVisionConfig(**EYE), text_config=text, image_token_id=3, image_seq_length=16)
    return LlavaForConditionalGeneration(cfg)

def bunny():
    cfg = LlavaConfig(vision_config=SiglipVisionConfig(**EYE), text_config=PhiConfig(**SMALL), image_token_id=3, image_seq_length=16, vision_feature_select_strategy='full', vision_feature_layer=-1)
    return LlavaForConditionalGeneration(cfg)

def internvl():
    eye = InternVLVisionConfig(**EYE | dict(image_size=[16, 16], patch_size=[4, 4]))
    return InternVLForConditionalGeneration(InternVLConfig(vision_config=eye, text_config=Phi3Config(**SMALL | dict(num_key_value_heads=2)), image_token_id=3, image_seq_length=4, downsample_ratio=.5))

FAMILIES = dict(llava=lambda: llava(LlamaConfig(**SMALL)), gqa=lambda: llava(LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True)), bunny=bunny, internvl=internvl)
TILES = dict(internvl=4)                                                    # image tokens a picture; 16 elsewhere

def build(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for n,p in model.named_parameters():                                    # biases start at zero, where they would not be seen
        if n.endswith('bias'): torch.nn.init.normal_(p, std=.3)
    return LVLM(model, name=name)

def make_batch(name, seed=0):
    "Three samples: one picture and a short question; two pictures; none. Padded on the right."
    g = torch.Generator().manual_seed(seed); n = TILES.get(name, 16)
    word = lambda k: torch.randint(4, 64, (k,), generator=g).tolist()
    ids,labels = [], []
    for images,q,ans in ((1, 5, 2), (2, 3, 4), (0, 9, 1)):
        q,ans = [1]+[3]*(n*images)+word(q), word(ans)+[2]
        ids.append(q+ans); labels.append([-100]*len(q)+ans)
    T = max(map(len, ids)); pad = lambda x, v: torch.tensor([r+[v]*(T-len(r)) for r in x])
    return dict(input_ids=pad(ids, 0), labels=pad(labels, -100), attention_mask=pad([[1]*len(r) for r in ids], 0), pixel_values=torch.randn(3, 3, 16, 16, generator=g))

@pytest.fixture(scope='module', params=FAMILIES)
def small(request): return build(request.param), make_batch(request.param)

def rel(a, b):
    "Largest difference, relative to the largest value"
    return float((a-b).abs().max()/b.abs().max())
