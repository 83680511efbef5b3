"Tiny models with random weights, one of each shape of layer that surgery has to know, built by transformers alone."

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    PhiConfig,
    SiglipVisionConfig,
)
from lvlm_study.models.architecture import LVLM

VISION_SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
LM = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
LONG_ROPE = dict(
    rope_type='longrope',
    rope_theta=1e4,
    short_factor=[1.0 + i / 10 for i in range(4)],
    long_factor=[2.0 + i for i in range(4)],
)


def llava(text, vision=None, **kw):
    vision = vision or CLIPVisionConfig(**VISION_SIZES)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=4, **kw)
    )


def internvl(text):
    c = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION_SIZES),
        text_config=text,
        image_token_id=3,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(c)


BUILD = dict(
    mha=lambda: llava(LlamaConfig(**LM)),
    gqa=lambda: llava(LlamaConfig(**LM | dict(num_attention_heads=16, num_key_value_heads=8))),
    phi=lambda: llava(
        PhiConfig(**LM),
        SiglipVisionConfig(**VISION_SIZES, vision_use_head=False),
        vision_feature_select_strategy='full',
        vision_feature_layer=-1,
    ),
    phi3=lambda: internvl(Phi3Config(**LM)),
    long=lambda: internvl(Phi3Config(**LM, rope_parameters=LONG_ROPE, original_max_position_embeddings=128)),
    tied=lambda: LlamaForCausalLM(LlamaConfig(**LM, tie_word_embeddings=True)),
)


def random_biases(model):
    "Biases start at zero, and a test with zeros cannot fail."
    for n, p in model.named_parameters():
        if n.endswith('bias'):
            torch.nn.init.normal_(p, std=0.2)


def build(name):
    torch.manual_seed(sorted(BUILD).index(name))
    model = BUILD[name]().eval()
    random_biases(model)
    model.generation_config.suppress_tokens = [3]  # an image token in the continuation would need pixels
    return LVLM(model, name=name)


def inputs(lvlm, n=12):
    "A text, with an image in it where the model reads images."
    torch.manual_seed(7)
    ids = torch.randint(4, 64, (2, n))
    if not lvlm.architecture.vision:
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    marks = torch.full((2, lvlm.config.image_seq_length), 3)
    ids = torch.cat([ids[:, :2], marks, ids[:, 2:]], 1)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(2, 3, 16, 16))
