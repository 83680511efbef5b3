"""What recovery costs: `python tests/bench_recovery.py [step] [memory] [--again]`.

step: a whole training step with a teacher beside the student's forward and backward pass and the teacher's forward pass, vision apart in both; timed in turn in
one process. memory: growth of a process's peak over logits distillation with 32,000 words, in chunks of tokens and with all logits at once. Rows go to
nbs/results/benchmarks.jsonl; those that are there are shown and not measured again unless asked."""
import argparse, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
os.chdir(Path(__file__).resolve().parent.parent)
import torch
import transformers
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from lvlm_study.core import Run, record
from lvlm_study.losses import Healing, last_states, next_labels, settings
from lvlm_study.models import LVLM
from lvlm_study.recovery import HealingTrainer, learner, training_arguments
from lvlm_study.surgery import Plan, apply_plan

# --- a step with a teacher --------------------------------------------------------------------------------------

def model(blocks=4, width=768, channels=2048):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=channels, num_hidden_layers=blocks, num_attention_heads=12, max_position_embeddings=2048)
    eye = CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=80, patch_size=16)
    return LVLM(LlavaForConditionalGeneration(LlavaConfig(vision_config=eye, text_config=text, image_token_id=3, image_seq_length=256)).eval())

def batch(T=512, image=256, answer=64):
    g = torch.Generator().manual_seed(0); ids = torch.randint(4, 32000, (1, T), generator=g); ids[:, 5:5+image] = 3
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(torch.arange(T)>=T-answer, ids, -100), features=torch.randn(image, 128, generator=g))

def seconds(f):
    "Processor time: other work on the machine hardly counts in it."
    t = time.process_time(); f(); return time.process_time()-t

def step(recipe, rounds=7):
    teacher,b = model(), batch(); student = apply_plan(teacher, Plan.of(teacher, blocks=[0, 1, 3]))
    s = settings(recipe); lvlm,_ = learner(student, s); given = {k: b[k] for k in ('input_ids', 'attention_mask', 'features')}
    healing = Healing(lvlm, s, teacher).train(); ps = [p for p in healing.parameters() if p.requires_grad]; on = next_labels(b['labels'])!=-100
    def forget():
        for p in ps: p.grad = None
    def plain():
        loss = F.cross_entropy(lvlm.part('head')(last_states(lvlm, **given)[on]).float(), next_labels(b['labels'])[on]); loss.backward()
        with torch.no_grad():
            t = last_states(teacher, **given)
            if s.beta: teacher.part('head')(t[on])
        forget()
    with tempfile.TemporaryDirectory() as d:
        trainer = HealingTrainer(s, healing, training_arguments(s, d, False))
        def whole(): n = trainer._get_num_items_in_batch([b], 'cpu'); trainer.training_step(healing, dict(b), n); forget()
        whole(); plain(); pairs = [(seconds(whole), seconds(plain)) for _ in range(rounds)]
    return dict(ratio=statistics.median(a/b for a,b in pairs), secs=statistics.median(a for a,_ in pairs), plain=statistics.median(b for _,b in pairs))

# --- memory: a process for each measurement, since a peak never falls -------------------------------------------

def peak_mb(chunk, tokens, words):
    "Growth of the process's peak over the losses of some tokens and the way back, in MB."
    torch.manual_seed(0); D = 256
    lm = lambda: LVLM(LlamaForCausalLM(LlamaConfig(vocab_size=words, hidden_size=D, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)))
    student,teacher = lm(), lm(); student.model.requires_grad_(False); healing = Healing(student, settings('sft+kl', chunk=chunk), teacher)
    h,t = torch.randn(1, tokens, D, requires_grad=True), torch.randn(1, tokens, D); next_BT = torch.randint(words, (1, tokens))
    go = lambda n: sum(healing._words(h[:, :n], t[:, :n], next_BT[:, :n], dict(answer=torch.ones(1, n, dtype=bool))).values()).backward()
    go(8); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; go(tokens)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024

def memory(words=32000):
    ask = lambda chunk, tokens: float(subprocess.run([sys.executable, __file__, '--peak', str(chunk), str(tokens), str(words)], capture_output=True, text=True, check=True).stdout)
    full,chunks,longer = ask(2048, 2048), ask(0, 2048), ask(0, 4096)
    return dict(words=words, tokens=2048, logits_MB=2048*words*4/2**20, full_MB=full, chunks_MB=chunks, ratio=chunks/full, chunks_twice_as_long_MB=longer)

BENCHES = {'step sft+hidden': lambda: step('sft+hidden'), 'step sft+hidden+kl': lambda: step('sft+hidden+kl'), 'memory': memory}

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('names', nargs='*', default=['step', 'memory'], help='step, memory')
    ap.add_argument('--again', action='store_true', help='measure what is stored already')
    ap.add_argument('--peak', nargs=3, help=argparse.SUPPRESS)
    args = ap.parse_args(); transformers.logging.set_verbosity_error()
    if args.peak: return print(peak_mb(*map(int, args.peak)))
    for n in (k for k in BENCHES if k.split()[0] in args.names):
        name = 'llava 4x768' if n.startswith('step') else 'heads 32000x256'
        row = record(Run('benchmarks', model=name, note=f'recovery: {n}'), lambda: dict(metrics=BENCHES[n]()), force=args.again)
        print(f'{n:20s}', {k: round(v, 3) for k,v in row['metrics'].items()}, flush=True)

if __name__=='__main__': main()
