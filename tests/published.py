"""Tiny checkpoints, random weights, in the shape of the files that people download.

`publish(name, folder)` writes config, weights, tokenizer, processor files and chat template (as a list of parts; in
chat_template.json, in a .jinja file or in the tokenizer's config) of one checkpoint."""

import json
import sys
import tempfile
from pathlib import Path
import datasets
import numpy as np
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from lvlm_study.core.store import Run, record
from lvlm_study.data.instruction_data import CONVERSATION_FEATURES, Collator, prompt_and_answer
from lvlm_study.evaluation.evaluate import answer_batch
from lvlm_study.importance.importance import score
from lvlm_study.models.loading import load_lvlm
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.model_types import reinit_weights
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.recovery.losses import DistillationModel, Recovery, TrainingSamples
from lvlm_study.recovery.recovery import recover

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGE = 28  # Side of what an encoder sees: two by two patches of 14
GRID = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
LM = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
EYE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE)

# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(cls, first=(), **kwargs):
    "A vocabulary of bytes, as those of GPT-2, Qwen and LLaMA-3 begin."
    vocab = {c: i for i, c in enumerate([*first, *bytes_to_unicode().values()])}
    if cls is not T.PreTrainedTokenizerFast:
        return cls(vocab=vocab, merges=[], **kwargs)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return cls(tokenizer_object=tokenizer, **kwargs)


def pieces(cls, first, **kwargs):
    "A vocabulary with spaces as marks and bytes for what is missing, as those of LLaMA-2 and Gemma."
    letters = [chr(c) for c in range(33, 127)]
    words = [*first, *(f'<0x{b:02X}>' for b in range(256)), '▁', *letters, '▁a', '▁i', '▁w']
    words += [w for w in ('\n', '\n\n') if cls is T.GemmaTokenizer]
    merges = [('▁', 'a'), ('▁', 'i'), ('▁', 'w')] + [('\n', '\n')] * (cls is T.GemmaTokenizer)
    return cls(vocab={w: i for i, w in enumerate(words)}, merges=merges, **kwargs)


def llama2(**kwargs):
    return pieces(T.LlamaTokenizer, ('<unk>', '<s>', '</s>'), **kwargs)


def llama3():
    special = dict(bos_token='<|begin_of_text|>', eos_token='<|eot_id|>')
    return byte_level(T.PreTrainedTokenizerFast, (), **special, additional_special_tokens=['<|start_header_id|>'])


def gemma(**kwargs):
    return pieces(T.GemmaTokenizer, ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>'), **kwargs)


def qwen(*marks, **kwargs):
    t = byte_level(T.Qwen2Tokenizer, (), eos_token='<|im_end|>', pad_token='<|endoftext|>', **kwargs)
    t.add_special_tokens(dict(additional_special_tokens=['<|im_start|>', *marks]))
    return t


# --- chat templates: contents are lists of parts ----------------------------------------------------------------------

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'assistant' %}{{ message['role'].upper() }}: {% for part in "
    "message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}{% for part in message['content'] if "
    "part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% else %}ASSISTANT: {% for part in message['content'] "
    "%}{% generation %}{{ part['text'] }}{% endgeneration %}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}ASSISTANT:{% endif %}'
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% for part in message['content'] if "
    "part['type'] == 'image' %}<image>\n{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %} [/INST]{% else %} {% for part in message['content'] %}{{ part['text'] }}"
    '{% endfor %}</s>{% endif %}{% endfor %}'
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] if "
    "part['type'] == 'image' %}<image>\n{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}<|im_end|>{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    '<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}'
)
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message['role'].capitalize() }}{{ ':' if "
    "message['content'][0]['type'] == 'image' else ': ' }}{% for part in message['content'] %}{% if part['type'] == "
    "'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    '{% if add_generation_prompt %}Assistant:{% endif %}'
)
MISTRAL3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% for part in "
    "message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "[/INST]{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    '{% endfor %}'
)
INTERNVL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    '{% endif %}{% endfor %}'
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    '{% if add_generation_prompt %}<|start_header_id|>assistant\n\n{% endif %}'
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
QWEN3 = (  # The last answer has an empty thought before it; earlier ones have none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "loop.index0 > ns.last and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|assistant|>\n{% endif %}'
)

# --- files ------------------------------------------------------------------------------------------------------------


def write(folder, model, tokenizer, processor=None, template=None, where='chat_template.json', **files):
    "One checkpoint: weights and config, tokenizer, processor files, template."
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / 'chat_template.jinja').unlink(missing_ok=True)
    for name, content in dict(processor_config=processor, **files).items():
        if content:
            (folder / f'{name}.json').write_text(json.dumps(content, indent=2))
    if template and where == 'chat_template.json':
        (folder / where).write_text(json.dumps(dict(chat_template=template)))
    elif template and where == 'tokenizer_config.json':
        config = json.loads((folder / where).read_text())
        (folder / where).write_text(json.dumps(config | dict(chat_template=template), indent=2))
    elif template:
        (folder / where).write_text(template)
    return folder


def random_weights(cls, config):
    "Weights that are large enough for a wrong place of a feature to be seen."
    torch.manual_seed(0)
    model = reinit_weights(cls(config)).eval()
    for name, p in model.named_parameters():
        if name.endswith('image_newline'):
            p.data.normal_()
    return model


def pixels(kind, processor, **more):
    "preprocessor_config.json"
    common = dict(do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True, rescale_factor=1 / 255)
    return common | dict(image_processor_type=kind, processor_class=processor, image_mean=MEAN, image_std=STD) | more


def id_of(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def special(tokenizer, **more):
    ids = {k: getattr(tokenizer, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    return LM | dict(vocab_size=len(tokenizer)) | ids | more


def clip(**more):
    return T.CLIPVisionConfig(**EYE, patch_size=14, **more)


def siglip(**more):
    return T.SiglipVisionConfig(**EYE | dict(patch_size=14, vision_use_head=False) | more)


def llava_15(folder):
    t = llama2(additional_special_tokens=['<image>'], pad_token='<pad>')
    text = T.LlamaConfig(**special(t))
    config = T.LlavaConfig(
        vision_config=clip(), text_config=text, image_token_id=id_of(t, '<image>'), image_seq_length=4
    )
    side = dict(
        size=dict(shortest_edge=IMAGE), crop_size=dict(height=IMAGE, width=IMAGE), do_center_crop=True, resample=3
    )
    own = dict(
        patch_size=14, vision_feature_select_strategy='default', image_token='<image>', num_additional_image_tokens=1
    )
    return write(
        folder,
        random_weights(T.LlavaForConditionalGeneration, config),
        t,
        own | dict(processor_class='LlavaProcessor'),
        VICUNA,
        preprocessor_config=pixels('CLIPImageProcessor', 'LlavaProcessor', **side),
    )


def vipllava(folder):
    t = llama2(additional_special_tokens=['<image>'], pad_token='<pad>')
    text = T.LlamaConfig(**special(t))
    ids = dict(image_token_id=id_of(t, '<image>'), image_seq_length=4)
    config = T.VipLlavaConfig(vision_config=clip(), text_config=text, vision_feature_layers=[-1, -2, 1], **ids)
    side = dict(size=dict(shortest_edge=IMAGE), crop_size=dict(height=IMAGE, width=IMAGE), do_center_crop=True)
    own = dict(patch_size=14, vision_feature_select_strategy='default', num_additional_image_tokens=1)
    return write(
        folder,
        random_weights(T.VipLlavaForConditionalGeneration, config),
        t,
        own | dict(processor_class='LlavaProcessor'),
        VICUNA,
        preprocessor_config=pixels('CLIPImageProcessor', 'LlavaProcessor', resample=3, **side),
    )


def pixtral(folder):
    "Pixtral-12B as it is published: a LLaVA whose encoder takes pictures of any shape."
    t = mistral_tokens()
    vision = T.PixtralVisionConfig(**EYE | dict(image_size=112), patch_size=14, head_dim=8)
    config = T.LlavaConfig(
        vision_config=vision,
        text_config=T.MistralConfig(**special(t, head_dim=8, sliding_window=None)),
        image_token_id=id_of(t, '[IMG]'),
        vision_feature_select_strategy='full',
        vision_feature_layer=-1,
    )
    side = dict(size=dict(longest_edge=112), patch_size=14, resample=3)
    return write(
        folder,
        random_weights(T.LlavaForConditionalGeneration, config),
        t,
        dict(patch_size=14, processor_class='PixtralProcessor'),
        MISTRAL3,
        preprocessor_config=pixels('PixtralImageProcessor', 'PixtralProcessor', **side),
    )


def llava_next(folder):
    t = llama2(additional_special_tokens=['<image>'], pad_token='<pad>')
    text = T.MistralConfig(**special(t), head_dim=8, sliding_window=None)
    config = T.LlavaNextConfig(
        vision_config=clip(),
        text_config=text,
        image_token_id=id_of(t, '<image>'),
        image_grid_pinpoints=GRID,
        image_seq_length=4,
    )
    side = dict(
        size=dict(shortest_edge=IMAGE), crop_size=dict(height=IMAGE, width=IMAGE), do_center_crop=True, resample=3
    )
    own = dict(
        patch_size=14, vision_feature_select_strategy='default', image_token='<image>', num_additional_image_tokens=1
    )
    return write(
        folder,
        random_weights(T.LlavaNextForConditionalGeneration, config),
        t,
        own | dict(processor_class='LlavaNextProcessor'),
        INST,
        preprocessor_config=pixels(
            'LlavaNextImageProcessor', 'LlavaNextProcessor', image_grid_pinpoints=GRID, do_pad=True, **side
        ),
    )


def llava_onevision(folder):
    t = qwen('<image>', '<video>')
    text = T.Qwen2Config(**special(t), tie_word_embeddings=True)
    config = T.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text,
        image_token_id=id_of(t, '<image>'),
        video_token_id=id_of(t, '<video>'),
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy='full',
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    side = dict(size=dict(height=IMAGE, width=IMAGE), resample=3)
    own = dict(num_image_tokens=4, vision_feature_select_strategy='full', vision_aspect_ratio='anyres_max_9')
    return write(
        folder,
        random_weights(T.LlavaOnevisionForConditionalGeneration, config),
        t,
        own | dict(processor_class='LlavaOnevisionProcessor', image_token='<image>', video_token='<video>'),
        ONEVISION,
        preprocessor_config=pixels(
            'LlavaOnevisionImageProcessor', 'LlavaOnevisionProcessor', image_grid_pinpoints=GRID, do_pad=True, **side
        ),
        video_preprocessor_config=pixels('', 'LlavaOnevisionProcessor', **side)
        | dict(video_processor_type='LlavaOnevisionVideoProcessor'),
    )


def _qwen_vl(folder, cls, config_cls, vision, patch, processor, text_config=None):
    t = qwen('<|vision_start|>', '<|vision_end|>', '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>')
    rope = dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 1, 1])
    text = special(t, rope_parameters=rope) | (text_config or {})
    config = config_cls(
        vision_config=vision | dict(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2),
        text_config=text,
        image_token_id=id_of(t, '<|image_pad|>'),
        video_token_id=id_of(t, '<|video_pad|>'),
        vision_start_token_id=id_of(t, '<|vision_start|>'),
        vision_end_token_id=id_of(t, '<|vision_end|>'),
    )
    size = dict(shortest_edge=(4 * patch) ** 2, longest_edge=(8 * patch) ** 2)
    side = dict(size=size, patch_size=patch, temporal_patch_size=2, merge_size=2)
    return write(
        folder,
        random_weights(cls, config),
        t,
        None,
        QWEN_VL,
        preprocessor_config=pixels('Qwen2VLImageProcessor', processor, **side),
        video_preprocessor_config=pixels('', processor, **side) | dict(video_processor_type='Qwen2VLVideoProcessor'),
    )


def qwen2_vl(folder):
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2)
    return _qwen_vl(folder, T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig, vision, 14, 'Qwen2VLProcessor')


def qwen2_5_vl(folder):
    vision = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, window_size=56)
    vision |= dict(fullatt_block_indexes=[1])
    return _qwen_vl(folder, T.Qwen2_5_VLForConditionalGeneration, T.Qwen2_5_VLConfig, vision, 14, 'Qwen2_5_VLProcessor')


def qwen3_vl(folder):
    vision = dict(depth=3, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    more = dict(head_dim=8)
    return _qwen_vl(folder, T.Qwen3VLForConditionalGeneration, T.Qwen3VLConfig, vision, 16, 'Qwen3VLProcessor', more)


def gemma3(folder):
    marks = dict(image_token='<image_soft_token>', boi_token='<start_of_image>', eoi_token='<end_of_image>')
    t = gemma(extra_special_tokens=marks, additional_special_tokens=['<start_of_turn>', '<end_of_turn>'])
    more = dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    more |= dict(layer_types=['sliding_attention', 'full_attention'] * 2)
    config = T.Gemma3Config(
        vision_config=siglip(image_size=56),
        text_config=T.Gemma3TextConfig(**special(t, **more)),
        image_token_id=id_of(t, marks['image_token']),
        boi_token_index=id_of(t, marks['boi_token']),
        eoi_token_index=id_of(t, marks['eoi_token']),
        mm_tokens_per_image=4,
    )
    side = dict(size=dict(height=56, width=56), resample=2, do_pan_and_scan=None)
    return write(
        folder,
        random_weights(T.Gemma3ForConditionalGeneration, config),
        t,
        dict(image_seq_length=4, processor_class='Gemma3Processor'),
        GEMMA3,
        preprocessor_config=pixels('Gemma3ImageProcessor', 'Gemma3Processor', image_seq_length=4, **side),
    )


def paligemma(folder):
    t = gemma(extra_special_tokens=dict(image_token='<image>'))
    t.add_tokens([f'<loc{i:0>4}>' for i in range(1024)] + [f'<seg{i:0>3}>' for i in range(128)])
    text = T.GemmaConfig(**special(t, head_dim=8))
    config = T.PaliGemmaConfig(
        vision_config=siglip(projection_dim=32), text_config=text, image_token_id=id_of(t, '<image>'), projection_dim=32
    )
    side = dict(size=dict(height=IMAGE, width=IMAGE), resample=3, image_seq_length=4)
    return write(
        folder,
        random_weights(T.PaliGemmaForConditionalGeneration, config),
        t,
        preprocessor_config=pixels('SiglipImageProcessor', 'PaliGemmaProcessor', **side),
    )


def _idefics(folder, cls, config_cls, text, t, kind, **files):
    vision = dict(EYE, image_size=32, patch_size=8)
    config = config_cls(vision_config=vision, text_config=text, image_token_id=id_of(t, '<image>'), scale_factor=2)
    side = dict(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32), do_image_splitting=True, do_pad=True)
    return write(
        folder,
        random_weights(cls, config),
        t,
        dict(image_seq_len=4, processor_class=f'{kind}Processor'),
        IDEFICS3,
        preprocessor_config=pixels(f'{kind}ImageProcessor', f'{kind}Processor', resample=1, **side),
        **files,
    )


MARKS = ['<fake_token_around_image>', '<image>', '<end_of_utterance>', '<global-img>', '<|im_start|>']
MARKS += [f'<row_{i}_col_{j}>' for i in range(1, 5) for j in range(1, 5)]


def idefics3(folder):
    t = llama3()
    t.add_special_tokens(dict(additional_special_tokens=MARKS, pad_token='<|reserved|>'))
    text = T.LlamaConfig(**special(t))
    return _idefics(folder, T.Idefics3ForConditionalGeneration, T.Idefics3Config, text, t, 'Idefics3')


def smolvlm(folder):
    t = byte_level(T.GPT2Tokenizer, bos_token='<|im_start|>', eos_token='<end_of_utterance>', pad_token='<|im_end|>')
    t.add_special_tokens(dict(additional_special_tokens=MARKS))
    video = pixels('', 'SmolVLMProcessor', size=dict(longest_edge=32), max_image_size=dict(longest_edge=32))
    video |= dict(video_processor_type='SmolVLMVideoProcessor', num_frames=4, fps=1)
    text = T.LlamaConfig(**special(t))
    cls, config_cls = T.SmolVLMForConditionalGeneration, T.SmolVLMConfig
    return _idefics(folder, cls, config_cls, text, t, 'SmolVLM', video_preprocessor_config=video)


def mistral_tokens():
    t = byte_level(T.PreTrainedTokenizerFast, bos_token='<s>', eos_token='</s>', pad_token='<pad>')
    t.add_special_tokens(dict(additional_special_tokens=['[INST]', '[/INST]', '[IMG]', '[IMG_BREAK]', '[IMG_END]']))
    return t


def mistral3(folder):
    t = mistral_tokens()
    vision = T.PixtralVisionConfig(**EYE | dict(image_size=112), patch_size=14, head_dim=8)
    config = T.Mistral3Config(
        vision_config=vision,
        text_config=T.MistralConfig(**special(t, head_dim=8, sliding_window=None)),
        image_token_id=id_of(t, '[IMG]'),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    marks = dict(image_token='[IMG]', image_break_token='[IMG_BREAK]', image_end_token='[IMG_END]')
    side = dict(size=dict(longest_edge=112), patch_size=14, resample=3)
    return write(
        folder,
        random_weights(T.Mistral3ForConditionalGeneration, config),
        t,
        marks | dict(patch_size=14, spatial_merge_size=2, processor_class='PixtralProcessor'),
        MISTRAL3,
        'chat_template.jinja',
        preprocessor_config=pixels('PixtralImageProcessor', 'PixtralProcessor', **side),
    )


def internvl(folder):
    marks = dict(start_image_token='<img>', end_image_token='</img>', context_image_token='<IMG_CONTEXT>')
    t = qwen(extra_special_tokens=marks | dict(video_token='<video>'))
    vision = T.InternVLVisionConfig(**EYE | dict(image_size=[IMAGE, IMAGE]), patch_size=[14, 14])
    config = T.InternVLConfig(
        vision_config=vision,
        text_config=T.Qwen2Config(**special(t)),
        image_token_id=id_of(t, '<IMG_CONTEXT>'),
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    side = dict(size=dict(height=IMAGE, width=IMAGE), crop_to_patches=False, min_patches=1, max_patches=4, resample=3)
    video = pixels('', 'InternVLProcessor', size=side['size']) | dict(video_processor_type='InternVLVideoProcessor')
    return write(
        folder,
        random_weights(T.InternVLForConditionalGeneration, config),
        t,
        dict(image_seq_length=1, processor_class='InternVLProcessor'),
        INTERNVL,
        'chat_template.jinja',
        preprocessor_config=pixels('GotOcr2ImageProcessor', 'InternVLProcessor', **side),
        video_preprocessor_config=video,
    )


VISION = dict(
    llava_15=llava_15,
    vipllava=vipllava,
    pixtral=pixtral,
    llava_next=llava_next,
    llava_onevision=llava_onevision,
    qwen2_vl=qwen2_vl,
    qwen2_5_vl=qwen2_5_vl,
    qwen3_vl=qwen3_vl,
    gemma3=gemma3,
    paligemma=paligemma,
    idefics3=idefics3,
    smolvlm=smolvlm,
    mistral3=mistral3,
    internvl=internvl,
)

# --- language models --------------------------------------------------------------------------------------------------


def _lm(kind, tokenizer, template, **more):
    def make(folder):
        t, cls = tokenizer(), getattr(T, f'{kind}Config')
        model = random_weights(getattr(T, f'{kind}ForCausalLM'), cls(**special(t, **more)))
        return write(folder, model, t, template=template, where='tokenizer_config.json')

    return make


def phi2_tokens():
    return byte_level(T.CodeGenTokenizer, ('<|endoftext|>',))


def phi3_tokens():
    t = llama2(pad_token='<unk>')
    t.add_special_tokens(dict(additional_special_tokens=['<|user|>', '<|assistant|>', '<|end|>']))
    return t


TEXT = dict(
    llama2=_lm('Llama', llama2, LLAMA2),
    llama3=_lm('Llama', llama3, LLAMA3, tie_word_embeddings=True),
    vicuna=_lm('Llama', llama2, None),
    phi2=_lm('Phi', phi2_tokens, None, num_key_value_heads=4),
    phi3=_lm('Phi3', phi3_tokens, PHI3, num_key_value_heads=4),
    qwen2=_lm('Qwen2', qwen, CHATML, tie_word_embeddings=True),
    qwen3=_lm('Qwen3', qwen, QWEN3, head_dim=8),
)
ALL = VISION | TEXT


def publish(name, folder):
    "Write one checkpoint into a new folder and return the folder."
    return ALL[name](folder)


# --- what is done with each checkpoint --------------------------------------------------------------------------------

ASKED = {  # Pictures of a sample -> question
    0: 'What is a color?',
    1: '<image>\nWhat color is it?',
    2: '<image>\n<image>\nWhat is there in both?',
}
LAST, BETWEEN = 'What color is it?\n<image>', 'Is <image> like <image>?'


def picture(seed, size=(70, 40)):
    "Noise, so that every patch differs."
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype='uint8')
    return Image.fromarray(pixels)


def sample(question, answer=None, seed=0, id='a'):
    "A row with as many pictures as its question has marks, each of another shape."
    sizes = [(70, 40), (40, 90)]
    images = [picture(seed + i, sizes[(seed + i) % 2]) for i in range(question.count('<image>'))]
    return dict(id=id, images=images, messages=prompt_and_answer(question, answer))


def rows_for(lvlm):
    "A few samples with one picture, two and none, as far as the model reads them."
    questions = [(ASKED[1], 'red'), (ASKED[2], 'a blue dog'), ('<image>\nIs it?', 'no'), (ASKED[0], 'red')]
    if lvlm.processor is None:
        questions = [('What color?', 'red'), ('Both of them?', 'blue'), ('Is it?', 'no'), (ASKED[0], 'red')]
    elif is_prefix(lvlm):
        questions = questions[:3]
    return [sample(q, a, seed=10 * i, id=str(i)) for i, (q, a) in enumerate(questions)]


def is_prefix(lvlm):
    return type(lvlm.processor).__name__ == 'PaliGemmaProcessor'


def as_parts(question, images):
    "A question as one gives it to a processor: pictures and texts in a list."
    parts, images = [], iter(images)
    for i, piece in enumerate(question.split('<image>')):
        if i > 0:
            parts.append(dict(type='image', image=next(images)))
        piece = piece.removeprefix('\n') if i else piece
        piece = piece.removesuffix('\n') if i < question.count('<image>') else piece
        parts += [dict(type='text', text=piece)] if piece else []
    return parts


def own_inputs(lvlm, row, prompt):
    "What the checkpoint's own processor or tokenizer makes of a row; nothing of this package has a part in it."
    question, *answer = [m['content'] for m in row['messages']]
    answer = None if prompt else answer[0]
    if lvlm.processor is None:
        messages = [dict(role='user', content=question)] + [dict(role='assistant', content=answer)] * (not prompt)
        return lvlm.tokenizer.apply_chat_template(
            messages, return_dict=True, add_generation_prompt=prompt, return_tensors='pt'
        )
    processor = T.AutoProcessor.from_pretrained(lvlm.model.name_or_path)
    if is_prefix(lvlm):
        texts = ''.join(p['text'] for p in as_parts(question, row['images']) if p['type'] == 'text')
        suffix = {} if prompt else dict(suffix=answer)
        images = row['images'] or None
        out = processor(images=images, text='<image>' * len(row['images']) + texts, **suffix, return_tensors='pt')
        return {k: v for k, v in out.items() if k != 'labels'}
    messages = [dict(role='user', content=as_parts(question, row['images']))]
    messages += [dict(role='assistant', content=[dict(type='text', text=answer)])] * (not prompt)
    how = dict(tokenize=True, return_dict=True, return_tensors='pt')
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, **how)


def reason(error):
    return ' '.join(str(error).split())


def compare_inputs(lvlm, question, prompt):
    "'equal', or what is in the way, for the ids and all other tensors of one sample."
    row = sample(question, None if prompt else 'red')
    try:
        ours = Collator(lvlm, prompt=prompt)([row])
    except ValueError as e:
        return f'refused: {reason(e)}'
    own = own_inputs(lvlm, row, prompt)
    if ours['input_ids'].tolist() != own['input_ids'].tolist():
        return 'other ids'
    other = [k for k, v in own.items() if not (k in ours and ours[k].shape == v.shape and torch.allclose(ours[k], v))]
    return f'other {", ".join(other)}' if other else 'equal'


def answer_labels(lvlm, row):
    "Labels of a single sample, which stand for its answer alone."
    labels = Collator(lvlm)([row])['labels']
    assert row['messages'][1]['content'] in lvlm.tokenizer.decode([t for t in labels[0].tolist() if t != -100])
    return labels


@torch.no_grad()
def stock_loss(stock, lvlm, rows):
    "Sum over all answer tokens of the stock model's loss, one sample at a time, from the processor's own inputs."
    total = 0.0
    for row in rows:
        labels = answer_labels(lvlm, row)
        logits = stock(**own_inputs(lvlm, row, prompt=False)).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction='sum').item()
    return total


@torch.no_grad()
def recovery_loss(lvlm, rows, **settings):
    "The same sum as recovery computes it for all samples at once."
    samples = TrainingSamples(lvlm, as_dataset(rows), **settings)
    used = samples.usable(range(len(rows)))
    step = DistillationModel(lvlm, Recovery()).train()
    return step(**samples.collate([samples[i] for i in used]))['sft'].item()


def as_dataset(rows):
    return datasets.Dataset.from_list(rows, features=CONVERSATION_FEATURES)


@torch.no_grad()
def stock_answers(stock, lvlm, rows, n=6):
    "Greedy answers of the stock model, one question at a time."
    answers = []
    for row in rows:
        own = own_inputs(lvlm, row, prompt=True)
        out = stock.generate(**own, max_new_tokens=n, do_sample=False, pad_token_id=0)
        answers.append(lvlm.tokenizer.decode(out[0, own['input_ids'].shape[1] :], skip_special_tokens=True).strip())
    return answers


def tried(fn):
    "What a step returns; 'refused: ' and the sentence of its ValueError."
    try:
        return fn()
    except ValueError as e:
        return f'refused: {reason(e)}'


def plan_of(lvlm, width):
    layers = [0, 2, 3]
    if not width:
        return Plan.of(lvlm, layers)
    a = lvlm.architecture
    heads = {i: range(1, a.kv_heads, 2) for i in layers}
    return Plan.of(lvlm, layers, kv_heads=heads, mlp_channels={i: range(0, a.mlp_channels, 2) for i in layers})


def prune_both_ways(lvlm, folder, out, width):
    "(in memory, on disk, doctor): 'yes' or the reason; the two ways give the same weights."
    plan = plan_of(lvlm, width)
    memory = tried(lambda: apply_plan(lvlm, plan))
    disk = tried(lambda: prune_checkpoint(folder, out, plan))
    if isinstance(disk, str):
        return memory if isinstance(memory, str) else 'yes', disk, ''
    again, state = load_lvlm(out), memory.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
    report = doctor(out)
    return 'yes', 'yes', 'yes' if report.ok.all() else '; '.join(report[~report.ok].astype(str).agg(' '.join, axis=1))


def trial(name, work):
    "One row of the table: each column is 'yes', 'equal', or a sentence."
    folder = publish(name, work / name)
    lvlm = load_lvlm(folder)
    row = dict(type=lvlm.config.model_type, processor=type(lvlm.processor or lvlm.tokenizer).__name__)
    pictures = ASKED if lvlm.processor else {0: ASKED[0]}
    for prompt, column in ((False, 'training'), (True, 'generation')):
        row |= {f'{column} {n}': compare_inputs(lvlm, q, prompt) for n, q in pictures.items()}
    rows = rows_for(lvlm)
    for width, column in ((False, 'layers'), (True, 'width')):
        steps = prune_both_ways(lvlm, folder, work / f'{name}-{column}', width)
        row |= dict(zip((f'{column} in memory', f'{column} on disk', f'{column} doctor'), steps))
    row['score'] = tried(lambda: 'yes' if score(lvlm, as_dataset(rows), criteria=('bi', 'taylor', 'wanda')) else 'no')
    stock = type(lvlm.model).from_pretrained(folder).eval()
    row['recovery loss'] = tried(lambda: same_loss(stock, lvlm, rows))
    row['recover'] = tried(lambda: recovers(lvlm, rows))
    row['evaluate'] = tried(lambda: same_answers(stock, lvlm, rows))
    return row


def same_loss(stock, lvlm, rows):
    ours, theirs = recovery_loss(lvlm, rows), stock_loss(stock, lvlm, rows)
    return 'equal' if abs(ours - theirs) < 1e-4 * theirs else f'{ours:.4f}, not {theirs:.4f}'


def recovers(lvlm, rows):
    pruned = apply_plan(lvlm, plan_of(lvlm, width=False))
    part = 'projector+lora' if lvlm.architecture.projector else 'lora'
    result = recover(pruned, as_dataset(rows), 'sft+kl', lvlm, trainable=part, batch_size=2, progress=False)
    return 'yes' if result.curves.loss.notna().all() else 'no'


def same_answers(stock, lvlm, rows):
    ours, theirs = answer_batch(lvlm, rows, max_new_tokens=6), stock_answers(stock, lvlm, rows)
    return 'equal' if ours == theirs else f'{ours}, not {theirs}'


def store(names=ALL):
    "Try checkpoints and store what came out, for the table of model types."
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            record(Run('checkpoints', model=name, suite=''), lambda: as_metrics(trial(name, Path(work))), force=True)


def as_metrics(row):
    good = ('equal', 'yes')
    return dict(metrics={k: int(v in good) for k, v in row.items() if k not in ('type', 'processor')}, text=row)


if __name__ == '__main__':
    store(sys.argv[1:] or ALL)
