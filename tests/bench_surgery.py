"""What surgery costs: `python tests/bench_surgery.py [ratio] [bunny] [llava] [--folder F] [--rounds N] [--again]`.

ratio: a new ratio and what is redrawn for it, at the size of a 7B model. bunny, llava: a folder of random weights in the shapes of Bunny-v1.0-3B or
LLaVA-v1.5-7B is written, pruned weight by weight in a process of its own, and compared with copying as many bytes as are kept. That needs three times
the size of the folder on the disk; all of it is removed afterwards. Rows go to nbs/results/benchmarks.jsonl; those that are there are shown and not
measured again unless asked."""
import argparse, json, os, resource, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
os.chdir(Path(__file__).resolve().parent.parent)
import numpy as np
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig
from transformers.core_model_loading import revert_weight_conversion
from lvlm_study.core import Run, record
from lvlm_study.layer_pruning import layer_plan
from lvlm_study.plans import Plan, sizes
from lvlm_study.streaming import ghost, prune_checkpoint, read_head, weight_files
from lvlm_study.width_pruning import kept_line, picture, width_plan

def random_scores(sizes):
    g = torch.Generator().manual_seed(0); L,draw = len(sizes['blocks']), lambda *s: torch.rand(s, generator=g)
    return SimpleNamespace(blocks=dict(bi=draw(L)), heads=dict(taylor=draw(L, sizes['heads'])), channels=dict(taylor=draw(L, sizes['channels'])),
        meta=dict(sizes=sizes, model='random'))

# --- a new ratio ------------------------------------------------------------------------------------------------

def median_ms(f, rounds=15):
    "Processor time in milliseconds: other work on the machine hardly counts in it."
    def once(): t = time.process_time(); f(); return 1e3*(time.process_time()-t)
    f(); return statistics.median(once() for _ in range(rounds))

def ratio():
    head,channel = 4*128*4096, 3*4096
    s = random_scores(dict(lm=6_738_415_616, total=7_063_427_072, blocks=[32*head+11008*channel+2*4096]*32, head=head, channel=channel, heads=32, channels=11008))
    def redraw(how): p = width_plan(s, .3, how=how); return kept_line(p, 11008), kept_line(p, 32, 'heads')
    return dict(uniform_ms=median_ms(lambda: redraw('uniform')), global_ms=median_ms(lambda: redraw('global')),
        layers_ms=median_ms(lambda: layer_plan(s, .3)), picture_once_ms=median_ms(lambda: picture(s.channels['taylor'])))

# --- folders of the size of real models -------------------------------------------------------------------------

def bunny():
    eye = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False)
    text = PhiConfig(vocab_size=50296, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, partial_rotary_factor=.4)
    return LlavaConfig(vision_config=eye, text_config=text, vision_feature_select_strategy='full', dtype='bfloat16')

def llava():
    eye = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    return LlavaConfig(vision_config=eye, text_config=text, dtype='bfloat16')

def in_files(names, shard):
    "Names and shapes, parted into files of at most `shard` bytes."
    files,room = [], 0
    for k,s in names.items():
        n = 2*int(np.prod(s))
        if n>room: files.append({}); room = shard
        files[-1][k] = s; room -= n
    return files

def write_file(path, weights, tile):
    at,head = 0, dict(__metadata__=dict(format='pt'))
    for k,s in weights.items(): n = 2*int(np.prod(s)); head[k] = dict(dtype='BF16', shape=s, data_offsets=(at, at+n)); at += n
    text = json.dumps(head).encode(); text += b' '*(-len(text)%8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little')); f.write(text)
        for s in weights.values():
            n = 2*int(np.prod(s))
            for a in range(0, n, len(tile)): f.write(tile[:min(len(tile), n-a)])

def write_source(folder, config, shard=5_000_000_000):
    "A checkpoint with random bfloat16 weights under the names that transformers saves, written weight by weight."
    with torch.device('meta'): m = LlavaForConditionalGeneration(config)
    files = in_files({k: tuple(v.shape) for k,v in revert_weight_conversion(m, m.state_dict()).items()}, shard)
    folder.mkdir(parents=True); config.architectures = [type(m).__name__]; config.save_pretrained(folder)
    tile = torch.randn(32_000_000, generator=torch.Generator().manual_seed(0)).mul_(.02).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    name = lambda i: f'model-{i:05}-of-{len(files):05}.safetensors'
    for i,f in enumerate(files, 1): write_file(folder/name(i), f, tile)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={k: name(i) for i,f in enumerate(files, 1) for k in f})))

def forget(folder):
    "Write everything out and drop the folder from the page cache, so that each run starts alike."
    os.sync()
    for p in folder.glob('*.safetensors'):
        f = os.open(p, os.O_RDONLY); os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED); os.close(f)

def copied(src, dst, size):
    "Seconds that it takes to copy so many bytes of a folder and have them on the disk."
    forget(src); dst.mkdir(); t = time.perf_counter()
    for p in weight_files(src):
        if size<=0: break
        with open(p, 'rb') as a, open(dst/p.name, 'wb') as b:
            while size>0 and (x := a.read(min(1<<23, size))): b.write(x); size -= len(x)
    os.sync(); secs = time.perf_counter()-t
    shutil.rmtree(dst); return secs

def child(src, dst, plan):
    "In a process of its own: prune; print seconds and the peak of memory."
    plan = Plan.from_json(Path(plan).read_text()); forget(Path(src)); t = time.perf_counter()
    prune_checkpoint(src, dst, plan); os.sync()
    print(json.dumps(dict(secs=time.perf_counter()-t, peak=1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)))

def pruned(src, dst, plan):
    run = subprocess.run([sys.executable, __file__, '--child', str(src), str(dst), str(plan)], capture_output=True, text=True)
    assert run.returncode==0, run.stderr[-500:]
    return json.loads(run.stdout.splitlines()[-1])

def check(folder, size):
    "The new folder holds every weight of the model that its config describes, and as many bytes as the plan says."
    stored = {k: v for p in weight_files(folder) for k,v in read_head(p).items()}
    assert sum(v.size for v in stored.values())==size, 'the new folder is not as large as the plan says'
    m = ghost(folder).model; want = {k: tuple(v.shape) for k,v in revert_weight_conversion(m, m.state_dict()).items()}
    assert {k: v.shape for k,v in stored.items()}==want, 'weights and config do not agree'

def on_disk(config, base, rounds):
    d = Path(tempfile.mkdtemp(dir=base)); src = d/'model'
    try:
        write_source(src, config); plan = width_plan(random_scores(sizes(ghost(src))), .3); (d/'plan.json').write_text(plan.to_json())
        size,pairs = 2*plan.left['parameters'], []
        for _ in range(rounds):
            pairs.append((copied(src, d/'copy', size), pruned(src, d/'cut', d/'plan.json')))
            check(d/'cut', size); shutil.rmtree(d/'cut')
        files = [p.stat().st_size for p in weight_files(src)]; median = lambda f: statistics.median(f(a, b) for a,b in pairs)
        return dict(source_GB=sum(files)/1e9, kept_GB=size/1e9, copy_secs=median(lambda a, b: a), prune_secs=median(lambda a, b: b['secs']),
            time_ratio=median(lambda a, b: b['secs']/a), peak_GB=max(b['peak'] for _,b in pairs)/1e9, memory_ratio=max(b['peak'] for _,b in pairs)/max(files))
    finally: shutil.rmtree(d, ignore_errors=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('names', nargs='*', default=['ratio'], help='ratio, bunny, llava')
    ap.add_argument('--again', action='store_true', help='measure what is stored already')
    ap.add_argument('--folder', help='where the large folders go (default: the temporary folder)')
    ap.add_argument('--rounds', type=int, default=3, help='how often copying and pruning are timed in turn')
    ap.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    args = ap.parse_args(); transformers.logging.set_verbosity_error()
    if args.child: return child(*args.child)
    jobs = dict(ratio=('a new ratio at 7B', ratio), bunny=('Bunny-3B on disk', lambda: on_disk(bunny(), args.folder, args.rounds)),
        llava=('LLaVA-7B on disk', lambda: on_disk(llava(), args.folder, args.rounds)))
    for n in args.names:
        note,f = jobs[n]; row = record(Run('benchmarks', model='random', note=f'surgery: {note}'), lambda: dict(metrics=f()), force=args.again)
        print(f'{note}: ' + ', '.join(f'{k} {v:.3g}' for k,v in row['metrics'].items()))

if __name__ == '__main__': main()
