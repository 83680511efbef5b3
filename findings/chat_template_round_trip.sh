#!/usr/bin/env bash
# Library: transformers 5.23.0 (LlavaProcessor)
# Guess:   a processor uses the chat template of its tokenizer when it has none of its own, and a save and load keeps
#          both templates where both are set.
# Happens: with a template on the tokenizer alone `processor.apply_chat_template` raises, and works after save and load:
#          the file is read by both. With two different templates one file is written, the processor's, and the
#          tokenizer comes back with the processor's template: text that is rendered by the tokenizer changes without a
#          warning.
# Do:      keep one template, set on the processor; before evaluation render one conversation with what was trained and
#          with what was loaded, and compare.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0 pillow==13.0.0 jinja2==3.1.6)
py=${FINDINGS_VENV:+$(cd "$FINDINGS_VENV" && pwd)/bin/python}
if [ -z "$py" ]; then
  python3 -m venv "$tmp/venv"; py=$tmp/venv/bin/python
  "$py" -m pip install -q "${pins[@]}"
fi
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 HF_HOME=$tmp TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
cd "$tmp"
"$py" - "${pins[@]}" <<'PY'
import sys
from importlib.metadata import version

for name, pin in (text.split("==") for text in sys.argv[1:]):
    print(name, version(name))
    if version(name).split("+")[0] != pin:
        print(f"note: run with {name} {version(name)} instead of the pinned {pin}")
PY
"$py" - <<'PY'
import logging
import os
import warnings
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "transformers"):
    logging.getLogger(name).addHandler(handler)
transformers.logging.disable_default_handler()
transformers.logging.set_verbosity_warning()
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
words = ["<unk>", "<s>", "</s>", "user", "assistant", "hello"]
fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
FOR_TEXT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
FOR_IMAGES = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def processor():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default")


def render(owner, chat):
    try:
        return owner.apply_chat_template(chat, tokenize=False)
    except ValueError as e:
        return f"raises: {str(e)[:70]}"


text = [{"role": "user", "content": "hello"}]
image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}]
one = processor()
one.tokenizer.chat_template = FOR_IMAGES
before = render(one, image)
one.save_pretrained("one")
after = render(AutoProcessor.from_pretrained("one"), image)
print("template on the tokenizer alone:", before, "| after save and load:", after)

two = processor()
two.tokenizer.chat_template, two.chat_template = FOR_TEXT, FOR_IMAGES
two.save_pretrained("two")
print("files:", sorted(f for f in os.listdir("two") if "template" in f))
loaded = AutoProcessor.from_pretrained("two")
same = [owner.chat_template == FOR_IMAGES for owner in (loaded, loaded.tokenizer, AutoTokenizer.from_pretrained("two"))]
print("after save and load: processor, its tokenizer, AutoTokenizer have the processor's template:", same)
about = [text for text in heard if "template" in text.lower()]
print("warnings:", heard or "none")
assert not about, "it now warns"
assert before.startswith("raises") and after == "user <image> hello ", "the tokenizer's template is now used"
assert render(two.tokenizer, text) == "user : hello </s> " and same == [True, True, True], "both templates are now kept"
PY
