"""What scores cost beside what they need anyway: `python tests/bench_scores.py [NAME ...] [--again]`.

Each number is a ratio of two things that are timed in turn in one process. Rows go to nbs/results/benchmarks.jsonl; those that are there are shown and not measured
again unless asked."""
import argparse, os, resource, statistics, subprocess, sys, time
from pathlib import Path
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
os.chdir(Path(__file__).resolve().parent.parent)
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lvlm_study.core import Run, record
from lvlm_study.groups import maps, only_grad, taylor
from lvlm_study.models import LVLM
from lvlm_study.traces import answer_loss, block_influence, inputs, turn

def model(blocks, width, channels, heads):
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=512, hidden_size=width, intermediate_size=channels, num_hidden_layers=blocks, num_attention_heads=heads, max_position_embeddings=4096)
    return LVLM(LlamaForCausalLM(cfg).eval())

def sample(T):
    ids = torch.randint(4, 512, (1, T), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(torch.arange(T)>=T-16, ids, -100))

def seconds(f):
    "Processor time: other work on the machine hardly counts in it"
    t = time.process_time(); f(); return time.process_time()-t

def compare(f, plain, rounds):
    "Median over rounds of the time of f over that of plain, timed in turn; also both medians"
    f(); plain(); pairs = [(seconds(f), seconds(plain)) for _ in range(rounds)]
    return dict(ratio=statistics.median(a/b for a,b in pairs), secs=statistics.median(a for a,_ in pairs), plain=statistics.median(b for _,b in pairs))

# --- Block Influence beside the forward pass --------------------------------------------------------------------

def influence(T, rounds=9):
    lvlm,s = model(2, 1024, 2816, 16), sample(T)
    @torch.inference_mode()
    def plain(): lvlm.model(**inputs(lvlm, s), use_cache=False, logits_to_keep=1)
    return compare(lambda: block_influence(lvlm, [s]), plain, rounds)

# --- Taylor beside forward and backward -------------------------------------------------------------------------

def gradients(T, rounds=7):
    lvlm,s = model(2, 1024, 2816, 16), sample(T)
    def plain():
        with only_grad(lvlm, [m.weight for _,_,m in maps(lvlm)]): answer_loss(lvlm, s).sum().backward()
    return compare(lambda: taylor(lvlm, s), plain, rounds)

# --- memory: a process for each measurement, since a peak never falls -------------------------------------------

def peak_mb(how, blocks):
    "Growth of the process's peak from the end of the forward pass to the end of the backward pass, in MB."
    lvlm,s = model(blocks, 512, 1408, 8), sample(32); weights = [m.weight for _,_,m in maps(lvlm)]
    peak,backward,before = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, torch.Tensor.backward, []
    def watched(self, *args): before.append(peak()); backward(self, *args)
    torch.Tensor.backward = watched
    if how=='taylor': taylor(lvlm, s)
    else:
        with only_grad(lvlm, weights): answer_loss(lvlm, s).sum().backward()
    return peak()-before[-1]

def memory():
    block = sum(m.weight.numel() for i,_,m in maps(model(1, 512, 1408, 8)))*4/2**20
    ask = lambda how, n: float(subprocess.run([sys.executable, __file__, '--peak', how, str(n)], capture_output=True, text=True, check=True).stdout)
    return {f'{how}_{n}_blocks': ask(how, n)/block for how in ('taylor', 'plain') for n in (2, 4, 8, 16)}

# --- the published formula of Block Influence -------------------------------------------------------------------

def published(x_BTD, y_BTD):
    "Every token with every token, of which the diagonal is kept"
    x,y = x_BTD.flatten(0, 1), y_BTD.flatten(0, 1)
    sim = (x@y.T).diagonal()/(x.norm(dim=-1)*y.norm(dim=-1))
    return 1-sim.nan_to_num(.5)

def formula(T, rounds=9):
    x,y = torch.randn(2, 1, T, 4096, generator=torch.Generator().manual_seed(0)); w = torch.full((1, 1, T), 1/T)
    assert abs(float(published(x, y).mean()-turn(x, y, w)))<1e-5
    return compare(lambda: published(x, y), lambda: turn(x, y, w), rounds)

BENCHES = dict(influence_704=lambda: influence(704), taylor_704=lambda: gradients(704), memory=memory, published_704=lambda: formula(704), published_2048=lambda: formula(2048, 5))
MODELS = dict(influence_704='llama 2x1024', taylor_704='llama 2x1024', memory='llama 512', published_704='states 4096', published_2048='states 4096')

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__); ap.add_argument('names', nargs='*'); ap.add_argument('--again', action='store_true'); ap.add_argument('--peak', nargs=2)
    args = ap.parse_args()
    if args.peak: print(peak_mb(args.peak[0], int(args.peak[1]))); sys.exit()
    for n in args.names or BENCHES:
        row = record(Run('benchmarks', model=MODELS[n], note=f'scores {n}'), lambda: dict(metrics=BENCHES[n]()), force=args.again)
        print(f'{n:16s}', {k: round(v, 3) for k,v in row['metrics'].items()}, flush=True)
