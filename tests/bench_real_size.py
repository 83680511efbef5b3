"""What scores, surgery and recovery cost at the size of real models, on a GPU: `python tests/bench_real_size.py [NAME ...] [--again] [--small]`.

The models have the shapes of the three published checkpoints and random weights, so no accuracy is measured here: only time, memory, and that what is computed is
right at that size. Every ratio is of two things timed in turn in one process. Names: scores, memory, recovery, speed, and exact, which takes a few blocks of
full width in float32 and runs on a CPU as well. Rows go to nbs/results/benchmarks.jsonl; those that are there are shown and not measured again unless asked.
--small takes tiny shapes, keeps no row and needs no GPU."""
import argparse, os, statistics, tempfile, time
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
os.chdir(Path(__file__).resolve().parent.parent)
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from lvlm_study.core import Run, default_device, record
from lvlm_study.groups import maps, only_grad, silence, taylor
from lvlm_study.importance import score
from lvlm_study.layer_pruning import layer_plan
from lvlm_study.losses import Healing, last_states, next_labels, settings, vision_features
from lvlm_study.models import LVLM, bunny_config, internvl_config, llava_config, paper_config
from lvlm_study.recovery import HealingTrainer, learner, training_arguments
from lvlm_study.surgery import apply_plan
from lvlm_study.traces import answer_loss, block_influence, inputs, skip_blocks, turn
from lvlm_study.width_pruning import width_plan

NAMES = ('LLaVA-v1.5-7B', 'Bunny-v1.0-3B', 'Mini-InternVL-Chat-4B-V1-5')
SMALL = dict(zip(NAMES, (llava_config, bunny_config, internvl_config)))
GPU,BF16 = default_device(), torch.bfloat16
small = False

def model(name, dtype=BF16, blocks=None):
    "Random weights in the shape of a published checkpoint, or of its first blocks."
    torch.manual_seed(0); config = SMALL[name](vocab=512, image_token=3) if small else paper_config(name)
    if not small: config.image_token_id = 0
    if blocks: config.text_config.num_hidden_layers = blocks; config.vision_config.num_hidden_layers = 3
    with torch.device(GPU): m = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for n,p in m.named_parameters():
        if p.ndim==1 and 'norm' not in n: torch.nn.init.normal_(p.data, std=.02)      # biases are there to be cut
    return LVLM(m.eval(), name=f'{name}, random weights')

def picture(lvlm):
    v = lvlm.config.vision_config; size = v.image_size if isinstance(v.image_size, int) else v.image_size[0]
    return dict(pixel_values=torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(GPU, lvlm.model.dtype))

def sample(lvlm, T=704, answer=16):
    "One picture and text, T tokens in all, of which the last are the answer."
    with torch.inference_mode(): n = len(vision_features(lvlm, picture(lvlm)))
    ids = torch.randint(4, 500, (1, max(T, n+2*answer)), generator=torch.Generator().manual_seed(0)).to(GPU); ids[:, 5:5+n] = lvlm.config.image_token_id
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(torch.arange(ids.shape[1], device=GPU)>=ids.shape[1]-answer, ids, -100), **picture(lvlm))

def wait(): GPU.type=='cuda' and torch.cuda.synchronize()
def seconds(f): wait(); t = time.perf_counter(); f(); wait(); return time.perf_counter()-t

def compare(f, plain, rounds=9):
    "Median over rounds of the time of f over that of plain, timed in turn; also both medians."
    f(); plain(); pairs = [(seconds(f), seconds(plain)) for _ in range(rounds)]
    return dict(ratio=statistics.median(a/b for a,b in pairs), secs=statistics.median(a for a,_ in pairs), plain=statistics.median(b for _,b in pairs))

def now(): return torch.cuda.memory_allocated()/2**20 if GPU.type=='cuda' else 0.
def peak(f):
    "The most memory that was taken while f ran, in MB."
    if GPU.type!='cuda': f(); return 1.
    wait(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); f(); wait(); return torch.cuda.max_memory_allocated()/2**20

@lru_cache(maxsize=1)
def large(): return model(NAMES[0])

# --- scores beside the passes they need -------------------------------------------------------------------------

def influence(T):
    lvlm = large(); s = sample(lvlm, T)
    @torch.inference_mode()
    def plain(): lvlm.model(**inputs(lvlm, s), use_cache=False, logits_to_keep=1)
    return compare(lambda: block_influence(lvlm, [s]), plain)

def backward(lvlm, s):
    with only_grad(lvlm, [m.weight for _,_,m in maps(lvlm)]): answer_loss(lvlm, s).sum().backward()

def gradients(T):
    lvlm = large(); s = sample(lvlm, T)
    return compare(lambda: taylor(lvlm, s), lambda: backward(lvlm, s), 5)

def published(x_BTD, y_BTD):
    "Every token with every token, of which the diagonal is kept."
    x,y = x_BTD.flatten(0, 1), y_BTD.flatten(0, 1)
    return 1-((x@y.T).diagonal()/(x.norm(dim=-1)*y.norm(dim=-1))).nan_to_num(.5)

def formula(T):
    x,y = torch.randn(2, 1, T, 4096, generator=torch.Generator().manual_seed(0)).to(GPU); w = torch.full((1, 1, T), 1/T, device=GPU)
    assert abs(float(published(x, y).mean()-turn(x, y, w)))<1e-4
    return compare(lambda: published(x, y), lambda: turn(x, y, w), 51)

def memory(T=704):
    "From the start of the backward pass to the peak, in units of the gradients of one block; and everything, in GB."
    lvlm = large(); s = sample(lvlm, T); block = sum(m.weight.numel()*m.weight.element_size() for i,_,m in maps(lvlm) if i==0)/2**20
    before,plain = [], torch.Tensor.backward
    def watched(self, *args): before.append(now()); plain(self, *args)
    out = dict(weights_GB=now()/1024, block_GB=block/1024)
    torch.Tensor.backward = watched
    try:
        for how,f in (('taylor', lambda: taylor(lvlm, s)), ('plain', lambda: backward(lvlm, s))):
            top = peak(f); out |= {f'{how}_blocks': (top-before[-1])/block, f'{how}_GB': top/1024, 'activations_GB': before[-1]/1024-out['weights_GB']}
    finally: torch.Tensor.backward = plain
    return out

# --- recovery with a teacher ------------------------------------------------------------------------------------

def recovery(recipe, T=704, answer=64):
    "A step of LoRA and projector on a model 30 % narrower, with the original beside it."
    teacher = large(); s = sample(teacher, T, answer)
    student = apply_plan(teacher, width_plan(score(teacher, [s], criteria=('random',), progress=False), .3))
    b = {k: s[k] for k in ('input_ids', 'attention_mask', 'labels')}
    with torch.inference_mode(): f = vision_features(teacher, picture(teacher))
    b['features'] = f.clone(); given = {k: b[k] for k in ('input_ids', 'attention_mask', 'features')}
    rec = settings(recipe, bf16=True); lvlm,_ = learner(student, rec); del student
    healing = Healing(lvlm, rec, teacher if rec.needs_teacher else None).to(GPU).train(); ps = [p for p in healing.parameters() if p.requires_grad]
    on = next_labels(b['labels'])!=-100
    def forget():
        for p in ps: p.grad = None
    def plain():
        with torch.autocast(GPU.type, BF16):
            loss = F.cross_entropy(lvlm.part('head')(last_states(lvlm, **given)[on]).float(), next_labels(b['labels'])[on])
            if rec.needs_teacher:
                with torch.no_grad():
                    t = last_states(teacher, **given)
                    if rec.beta: teacher.part('head')(t[on])
        loss.backward(); forget()
    healing.forward = torch.autocast(GPU.type, BF16)(healing.forward)              # as accelerate does it
    with tempfile.TemporaryDirectory() as d:
        trainer = HealingTrainer(rec, healing, training_arguments(rec, d, False))
        def whole(): trainer.training_step(healing, dict(b), trainer._get_num_items_in_batch([b], GPU)); forget()
        return compare(whole, plain) | dict(peak_GB=peak(whole)/1024, weights_GB=now()/1024, tokens=b['input_ids'].shape[1])

# --- what pruning buys ------------------------------------------------------------------------------------------

def speed(method, ratio, new=48):
    "Seconds to read a picture with its question and seconds a word, one question at a time, beside the original."
    lvlm = large(); s = sample(lvlm); q = {k: s[k] for k in ('input_ids', 'attention_mask', 'pixel_values')}
    scores = score(lvlm, [s], criteria=('random', 'bi'), progress=False)
    cut = apply_plan(lvlm, layer_plan(scores, ratio, 'random') if method=='layer' else width_plan(scores, ratio, 'random'))
    def say(l, n):
        with torch.inference_mode(): l.model.generate(**q, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    read = compare(lambda: say(cut, 1), lambda: say(lvlm, 1), 5); both = compare(lambda: say(cut, new), lambda: say(lvlm, new), 3)
    word = [(both[k]-read[k])/(new-1) for k in ('secs', 'plain')]
    return dict(realised_lm=cut.plan['realised']['lm'], read_secs=read['secs'], read_ratio=read['secs']/read['plain'], word_secs=word[0], word_ratio=word[0]/word[1],
        GB=sum(p.numel()*p.element_size() for p in cut.model.parameters())/2**30)

# --- is it right at that size? ----------------------------------------------------------------------------------

@torch.inference_mode()
def logits(lvlm, s): return lvlm.model(**inputs(lvlm, s), use_cache=False, logits_to_keep=8).logits.float()
def far(a, b): return float((a-b).norm()/b.norm())

def exact(name, blocks=4):
    "In float32: removed equals skipped or zeroed, cached equals uncached, and the original is left as it was."
    lvlm = model(name, torch.float32, blocks); s = sample(lvlm, 0); base = logits(lvlm, s)
    scores = score(lvlm, [s], criteria=('random', 'bi', 'taylor'), progress=False); out = dict(parameters=sum(p.numel() for p in lvlm.model.parameters()))
    for method,plan in (('layer', layer_plan(scores, .3)), ('width', width_plan(scores, .3))):
        with ExitStack() as e:
            if method=='layer': e.enter_context(skip_blocks(lvlm, plan.removed))
            else:
                for i in range(plan.depth):
                    for kind,total in (('heads', lvlm.anatomy.kv_heads), ('channels', lvlm.anatomy.channels)):
                        e.enter_context(silence(lvlm, i, kind, sorted(set(range(total))-set(getattr(plan, kind)[i]))))
            want = logits(lvlm, s)
        cut = apply_plan(lvlm, plan); got = logits(cut, s); q = {k: v for k,v in inputs(cut, s).items()}
        with torch.inference_mode(): a,b = (cut.model.generate(**q, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=c, suppress_tokens=[cut.config.image_token_id]) for c in (True, False))
        out |= {f'{method}_error': far(got, want), f'{method}_effect': far(want, base), f'{method}_same_words': int(torch.equal(a, b)), f'{method}_realised': plan.realised['lm']}
        del cut
    return out | dict(untouched=far(logits(lvlm, s), base))

JOBS = {}
for T in (704, 2048):
    JOBS |= {f'scores: influence {T}': (NAMES[0], lambda T=T: influence(T)), f'scores: taylor {T}': (NAMES[0], lambda T=T: gradients(T)), f'scores: published {T}': ('states 4096', lambda T=T: formula(T))}
JOBS['memory: taylor'] = NAMES[0], memory
for r in ('sft', 'sft+hidden', 'sft+hidden+kl'): JOBS[f'recovery: step {r}'] = NAMES[0], lambda r=r: recovery(r)
for m in ('layer', 'width'):
    for r in (.30, .60): JOBS[f'speed: {m} {r:.2f}'] = NAMES[0], lambda m=m, r=r: speed(m, r)
for n in NAMES[::-1]: JOBS[f'exact: {n}'] = n, lambda n=n: exact(n)

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('names', nargs='*', help='scores, memory, recovery, speed, exact')
    ap.add_argument('--again', action='store_true', help='measure what is stored already'); ap.add_argument('--small', action='store_true', help='tiny shapes; no row is kept')
    args = ap.parse_args(); transformers.logging.set_verbosity_error()
    global small; small = args.small
    if GPU.type!='cuda' and not small and args.names!=['exact']: raise SystemExit('no GPU here: exact needs none, and --small tries everything on tiny shapes')
    for k,(name,f) in JOBS.items():
        if args.names and k.split(':')[0] not in args.names: continue
        if k.startswith('exact'): large.cache_clear()
        if GPU.type=='cuda': torch.cuda.empty_cache()
        try: row = dict(metrics=f()) if small else record(Run('benchmarks', model=name, note=f'real size, {k}'), lambda: dict(metrics=f()), force=args.again)
        except Exception as e: print(f'{k:28s} failed: {type(e).__name__}: {str(e)[:300]}', flush=True); continue
        print(f'{k:28s}', {a: round(v, 4) for a,v in row['metrics'].items()}, flush=True)

if __name__=='__main__': main()
