"""Kill prune, recover, evaluate and score by SIGKILL at random moments: nothing lost, nothing half taken for whole.

`python tests/kills.py 50 [seed]` makes so many kills and prints what was found after each. A kill falls at a random
time of the run, or at a random change of the files, so that writes are hit as well. Afterwards the inputs must be
untouched; what stands under the final name must be whole, old or new; and the same call, made again, must end with
what a run that was never killed gives.
"""

import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file

from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.evaluation.evaluate import evaluate
from lvlm_study.importance.importance import Scores
from lvlm_study.models.loading import load_lvlm
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.recovery.recovery import load_recovery, recover
from lvlm_study.study import cli


def weights(folder):
    "All weights of a folder that `load_lvlm` takes."
    load_lvlm(folder)
    found = {}
    for path in sorted(Path(folder).glob('*.safetensors')):
        found |= load_file(path)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@dataclass
class Job:
    "What is run, where its result gets its name, and how that is read."

    name: str
    out: str  # The final name in the working folder
    act: object  # Called with force
    read: object  # Path -> result that can be compared; raises where it is not whole

    def present(self, d):
        "Is something there under the final name?"
        return (d / self.out).exists()


def train(force):
    student = apply_plan(load_lvlm('m'), Plan.of(load_lvlm('m'), layers=(0, 1, 11)))
    rows = instructions('recovery', 6)
    kw = dict(trainable='projector+lora', lora_rank=2, batch_size=2, save_every=1, progress=False)
    with cli._replaced(['r'], force):
        recover(student, rows, 'sft', out='r', **kw)


def ask(force):
    with cli._replaced(['e.parquet'], force):
        evaluate(load_lvlm('m'), 'small', limit=1, batch_size=4, every=1, records='e.parquet', progress=False)


def cut(force):
    lvlm = load_lvlm('m')
    plan = Plan.of(lvlm, layers=range(9), mlp_channels={i: range(0, 300, 2) for i in range(9)})
    prune_checkpoint('m', 'p', plan, force=force)


def rate(force):
    cli.lvlm_score('m', 's', samples=4, criteria='bi,taylor', batch_size=1, device='cpu', force=force)


def read_records(path):
    records = pd.read_parquet(path)
    return dict(zip(records.id, records.prediction))


def read_scores(path):
    scores = Scores.load(str(path).removesuffix('.json'))
    return {f'{k}:{c}': rows for k, by in scores.samples.items() for c, rows in by.items()}


JOBS = [
    Job('prune', 'p', cut, weights),
    Job('recover', 'r/model', train, lambda path: load_recovery(path.parent).lvlm.model.state_dict()),
    Job('evaluate', 'e.parquet', ask, read_records),
    Job('score', 's.json', rate, read_scores),
]


def tree(d):
    "Every file with size and time, and the folders: what a kill at a change looks at."
    found = []
    for place, folders, files in os.walk(d):
        found += [(place, f) for f in folders]
        for f in files:
            try:
                found.append((place, f, os.stat(os.path.join(place, f)).st_size))
            except OSError:
                pass
    return found


def child(d, job, force):
    "Run a job in a process of its own; its id."
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(d)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get('KILLS_SHOW'):
            os.dup2(null, 2)
        torch.set_num_threads(1)
        job.act(force)
        status = 0
    except BaseException as e:
        (d.parent / 'error.txt').write_text(f'{type(e).__name__}: {e}')
    finally:
        os._exit(status)


def run_whole(d, job, force):
    "Seconds of a run that is not disturbed."
    start = time.time()
    _, status = os.waitpid(child(d, job, force), 0)
    assert status == 0, f'{job.name} failed: {(d.parent / "error.txt").read_text()}'
    return time.time() - start


def run_and_kill(d, job, force, rng, seconds, changes):
    "Start a job and kill it; what it was killed at, or 'done' where it was faster."
    pid, start = child(d, job, force), time.time()
    by_clock = rng.random() < 0.5
    moment, change = rng.uniform(0, seconds), rng.randint(1, max(1, changes))
    before, seen = tree(d), 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if by_clock and time.time() - start >= moment:
            break
        if not by_clock:
            now = tree(d)
            seen += now != before
            before = now
            if seen >= change:
                break
        time.sleep(0.0005)
    else:
        return 'done'
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'time' if by_clock else 'write'


def count_changes(d, job, force):
    "How many changes of the files can be seen in a whole run."
    pid, before, seen = child(d, job, force), tree(d), 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        now = tree(d)
        seen += now != before
        before = now
        time.sleep(0.0005)
    return seen


def fresh(base, n):
    "A working folder with its own copy of the input."
    d = Path(base) / str(n)
    d.mkdir()
    shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', d / 'm')
    return d


def put_old(d, job, old):
    "What stood there before, to be replaced by force; how it is read."
    root = Path(job.out).parts[0]
    if job.name == 'score':
        for ending in ('json', 'safetensors'):
            shutil.copy(old / f's.{ending}', d / f's.{ending}')
    elif (old / root).is_dir():
        shutil.copytree(old / root, d / root)
    else:
        shutil.copy(old / root, d / root)


def old_is_there(d, job, old):
    "Are the files that were to be replaced somewhere still, under their name or beside it?"
    root = Path(job.out).parts[0]
    roots = ['s.json', 's.safetensors'] if job.name == 'score' else [root]
    return all(any(equal(old / r, place) for place in d.glob(f'{r}*')) for r in roots)


def equal(a, b):
    if a.is_dir() != b.is_dir():
        return False
    if a.is_file():
        return a.read_bytes() == b.read_bytes()
    mine, other = ({str(p.relative_to(x)): p for p in x.rglob('*') if p.is_file()} for x in (a, b))
    return mine.keys() == other.keys() and all(p.read_bytes() == other[k].read_bytes() for k, p in mine.items())


def check(d, job, force, want, old, source):
    "What stands there after a kill: 'nothing', 'part' (of answers), 'new' or 'old'; AssertionError for a half."
    assert equal(d / 'm', source), 'the input was touched'
    found = 'nothing'
    if job.present(d):
        try:
            got = job.read(d / job.out)
        except FileNotFoundError as e:  # scores in two files: refused, and so not taken for whole
            assert job.name == 'score', e
            got = None
        if got is None:
            found = 'refused'
        elif job.name == 'evaluate':
            assert got.items() <= want.items() or force and equal(d / job.out, old / job.out), 'answers that are none'
            found = 'new' if got == want else 'part'
        elif same(got, want):
            found = 'new'
        else:
            assert force and old_is_there(d, job, old), 'something that is neither old nor new'
            found = 'old'
    if force and found != 'new':
        assert old_is_there(d, job, old), 'the old one is lost'
    return found


def agrees(got, want, job):
    return got == want if job.name == 'evaluate' else same(got, want)


def kill_many(count, seed=0, log=print):
    "Make so many kills; (job, force, killed at, found) -> how often. AssertionError where something is wrong."
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng, counts = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        reference, old = fresh(base, 'reference'), fresh(base, 'old')
        wants, seconds, changes = {}, {}, {}
        for job in JOBS[: max(1, min(count, len(JOBS)))]:
            seconds[job.name] = run_whole(reference, job, False)
            wants[job.name] = job.read(reference / job.out)
            counted = fresh(base, f'counted-{job.name}')
            changes[job.name] = count_changes(counted, job, False)
            shutil.rmtree(counted)
            make_old(old, job, reference)
        made = 0
        for n in range(2 * count):
            job, force = JOBS[made % len(JOBS)], made % 3 == 2
            d = fresh(base, n)
            if force:
                put_old(d, job, old)
            at = run_and_kill(d, job, force, rng, seconds[job.name], changes[job.name])
            found = check(d, job, force, wants[job.name], old, reference / 'm')
            if job.name != 'prune' or found != 'new':  # a second pruning is refused: the folder exists
                run_whole(d, job, force and found != 'new' and job.present(d))
            assert agrees(job.read(d / job.out), wants[job.name], job), f'{job.name} ends with something else'
            assert equal(d / 'm', reference / 'm'), 'the input was touched'
            shutil.rmtree(d)
            if at == 'done':
                continue  # it was faster than the kill
            made += 1
            counts[job.name, 'force' if force else 'new', at, found] += 1
            log(f'{made:3d}/{count}  {job.name:9s} {"force" if force else "new":6s} killed at {at:6s} found {found}')
            if made == count:
                break
    return counts


def make_old(old, job, reference):
    "An earlier result of another kind under the same name."
    here = os.getcwd()
    os.chdir(old)
    try:
        if job.name == 'prune':
            prune_checkpoint('m', 'p', Plan.of(load_lvlm('m'), layers=range(5)))
        elif job.name == 'score':
            cli.lvlm_score('m', 's', samples=2, criteria='l1', device='cpu')
        elif job.name == 'evaluate':
            evaluate(load_lvlm('m'), 'small', limit=1, use_images=False, records='e.parquet', progress=False)
        else:
            shutil.copytree(reference / 'r', 'r')
            settings = json.loads(Path('r/settings.json').read_text())
            settings = copy.deepcopy(settings) | dict(data='other')
            Path('r/settings.json').write_text(json.dumps(settings))
            shutil.rmtree('r/model')
            prune_checkpoint('m', 'r/model', Plan.of(load_lvlm('m'), layers=range(2)))
    finally:
        os.chdir(here)


if __name__ == '__main__':
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    result = kill_many(total, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for key, n in sorted(result.items()):
        print(f'{n:4d}  {", ".join(key)}')
    print(f'{sum(result.values())} kills: nothing lost, nothing half taken for whole')
