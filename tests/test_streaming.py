"Pruning a folder on disk: the same weights as in memory, whole or not at all when it is killed, clear errors."

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_surgery import KINDS, logits, plan_for, scores_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
import lvlm_study.pruning.checkpoint as checkpoint
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.loading import heterogeneous_layers, load_lvlm, save_lvlm
from lvlm_study.models.safetensors_files import read_header, weight_files
from lvlm_study.pruning.checkpoint import (
    meta_from_folder,
    prune_checkpoint,
    read_tensor_rows,
    stored_layer_prefix,
    write_shard,
)
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.pruning.width_pruning import width_plan


@pytest.fixture(scope='module')
def models():
    return {k: zoo.build(k) for k in zoo.BUILD}


@pytest.fixture(scope='module')
def folders(models, tmp_path_factory):
    d = tmp_path_factory.mktemp('src')
    for k, l in models.items():
        l.model.save_pretrained(d / k / 'one')
        l.model.save_pretrained(d / k / 'many', max_shard_size='90KB')
        for form in ('one', 'many'):
            (d / k / form / 'tokenizer_config.json').write_text('{}')
            (d / k / form / 'chat_template.jinja').write_text('{{ x }}')
            (d / k / form / 'old.bin').write_bytes(b'pickle')
            (d / k / form / 'code.py').write_text('')
    assert len(weight_files(d / 'mha' / 'many')) > 4
    return d


def read(folder):
    return {k: v for p in folder.glob('*.safetensors') for k, v in load_file(p).items()}


def load(folder):
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, 'vision_config') else AutoModelForCausalLM
    with heterogeneous_layers(config):
        m, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    return LVLM(m.eval())


@pytest.mark.parametrize('form', ['one', 'many'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', zoo.BUILD)
def test_it_is_what_surgery_in_memory_gives(models, folders, tmp_path, name, kind, form):
    plan = plan_for(models[name], kind)
    dst = prune_checkpoint(folders / name / form, tmp_path / 'dst', plan)
    live = apply_plan(load(folders / name / form), plan)
    live.model.save_pretrained(tmp_path / 'live')
    a, b = read(dst), read(tmp_path / 'live')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    configs = [json.loads((p / 'config.json').read_text()) for p in (dst, tmp_path / 'live')]
    assert configs[0] == configs[1]
    assert torch.equal(logits(load(dst)), logits(apply_plan(models[name], plan)))
    assert (
        Plan.from_json((dst / 'plan.json').read_text()).mlp_channels == plan.mlp_channels
        and json.loads((dst / 'plan.json').read_text())['notes'] == live.plan['notes']
    )


def test_what_is_copied_and_what_is_not(models, folders, tmp_path):
    dst = prune_checkpoint(folders / 'phi' / 'many', tmp_path / 'dst', plan_for(models['phi'], 'widths'))
    files = {p.name for p in dst.iterdir()}
    assert {
        'tokenizer_config.json',
        'chat_template.jinja',
        'generation_config.json',
        'plan.json',
        'README.md',
        'config.json',
    } <= files
    assert not {'old.bin', 'code.py', 'job.json'} & files
    index = json.loads((dst / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map'].values()) == {p.name for p in dst.glob('*.safetensors')}
    assert index['metadata']['total_size'] == sum(t.nbytes for t in read(dst).values())
    assert all(index['weight_map'][k] == p.name for p in dst.glob('*.safetensors') for k in load_file(p)) and not list(
        tmp_path.glob('*.partial')
    )


def test_files_that_lose_all_their_weights_are_left_out(models, folders, tmp_path):
    dst = prune_checkpoint(folders / 'mha' / 'many', tmp_path / 'dst', Plan.of(models['mha'], layers=[3]))
    n = len(weight_files(dst))
    assert n < len(weight_files(folders / 'mha' / 'many')) and all(
        p.name.endswith(f'-of-{n:05}.safetensors') for p in weight_files(dst)
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_are_moved_and_not_computed_with(models, tmp_path, dtype):
    m = copy.deepcopy(models['gqa'].model).to(dtype)
    m.save_pretrained(tmp_path / 'src')
    plan = plan_for(models['gqa'], 'combined')
    a, b = read(prune_checkpoint(tmp_path / 'src', tmp_path / 'dst', plan)), apply_plan(LVLM(m), plan).model
    assert {v.dtype for v in a.values()} == {dtype} and json.loads((tmp_path / 'dst' / 'config.json').read_text())[
        'dtype'
    ] == str(dtype).split('.')[1]
    want = sorted(v.flatten()[:5].tolist() for v in b.state_dict().values())
    assert sorted(v.flatten()[:5].tolist() for v in a.values()) == want


def test_pruned_twice_it_carries_the_plan_of_the_original(models, folders, tmp_path):
    lvlm = models['mha']
    first = prune_checkpoint(folders / 'mha' / 'one', tmp_path / 'a', plan_for(lvlm, 'layers'))
    g = load(first)
    second = prune_checkpoint(first, tmp_path / 'b', width_plan(scores_of(parameter_sizes(g), 2), 0.25))
    plan = Plan.from_json((second / 'plan.json').read_text())
    assert (
        plan.sizes == parameter_sizes(lvlm)
        and plan.layers == plan_for(lvlm, 'layers').layers
        and torch.equal(logits(load(second)), logits(apply_plan(lvlm, plan)))
    )


def test_the_study_model_passes_the_doctor(tmp_path):
    lvlm = load_lvlm('tiny-llava')
    src = save_lvlm(lvlm, tmp_path / 'src')
    plan = width_plan(scores_of(parameter_sizes(lvlm)), 0.3)
    dst = prune_checkpoint(src, tmp_path / 'dst', plan)
    assert doctor(dst).ok.all() and load_lvlm(dst).tokenizer.get_vocab() == lvlm.tokenizer.get_vocab()


def test_headers_are_read_as_safetensors_does(folders, tmp_path):
    for p in weight_files(folders / 'phi' / 'many'):
        mine, theirs = read_header(p), load_file(p)
        assert mine.keys() == theirs.keys()
        for k, v in theirs.items():
            assert np.array_equal(np.asarray(read_tensor_rows(mine[k])).view(np.float32).reshape(v.shape), v.numpy())
    save_file(dict(a=torch.tensor(3.0), b=torch.zeros(0, 4), c=torch.tensor([True])), tmp_path / 'odd.safetensors')
    h = read_header(tmp_path / 'odd.safetensors')
    assert h['b'].size == 0 and h['a'].shape == () and read_tensor_rows(h['b']).shape == (0, 4)


# --- killed -----------------------------------------------------------------------------------------------------


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def run_and_kill(src, dst, plan, after, begun=None):
    "Prune in a child process and kill it, some time after its start or after it began a folder; True if it still ran."
    pid = os.fork()
    if not pid:
        try:
            prune_checkpoint(src, dst, plan)
        finally:
            os._exit(0)
    end = time.time() + 60
    while begun and not begun.exists() and not dst.exists() and time.time() < end:
        time.sleep(0.0005)
    time.sleep(after)
    done, _ = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not done


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('moments', [16, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_is_absent_or_complete(models, folders, tmp_path, moments):
    src, plan, rng = folders / 'mha' / 'many', plan_for(models['mha'], 'widths'), random.Random(0)

    def pruned(dst, **kw):
        start = time.time()
        return digest(prune_checkpoint(src, dst, plan, **kw)), time.time() - start

    whole, took = pruned(tmp_path / 'whole')
    dst, part = tmp_path / 'dst', tmp_path / 'dst.partial'
    killed = begun = 0
    for i in range(moments):  # every second moment counts from where the folder is begun: a busy machine begins late
        killed += run_and_kill(
            src, dst, plan, rng.uniform(0, 0.12 * took if i % 2 else 3 * took), part if i % 2 else None
        )
        assert not dst.exists() or digest(dst) == whole
        begun += part.exists()
        again, took = pruned(dst, force=True)
        assert again == whole and not part.exists()
        shutil.rmtree(dst)
    assert killed > moments / 5 and begun > moments / 16, (
        f'{killed} killed, {begun} of them after the folder was begun: the moments are badly spread'
    )


@pytest.mark.parametrize('step', range(1, 9))
def test_stopped_after_each_step(models, folders, tmp_path, monkeypatch, step):
    "Stopped at every file, at the copied files and before the last rename: complete files are not written again."
    src, plan, dst = folders / 'mha' / 'many', plan_for(models['mha'], 'widths'), tmp_path / 'dst'
    written = []

    def stop_at(n):
        def f(path, pieces):
            if len(written) == n:
                raise KeyboardInterrupt
            written.append(path.name)
            return write_shard(path, pieces)

        return f

    stop = (
        dict(write_shard=stop_at(step))
        if step < 6
        else {
            ['_copy_extras', '_finish_job', '_shard_index'][step - 6]: lambda *a: (_ for _ in ()).throw(
                KeyboardInterrupt()
            )
        }
    )
    with monkeypatch.context() as m:
        for k, f in stop.items():
            m.setattr(checkpoint, k, f)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(src, dst, plan)
    assert not dst.exists() and (tmp_path / 'dst.partial').exists()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'dst.partial').glob('*.safetensors')}
    assert times
    prune_checkpoint(src, dst, plan)
    assert all((dst / k).stat().st_mtime_ns == v for k, v in times.items()) and digest(dst) == digest(
        prune_checkpoint(src, tmp_path / 'whole', plan)
    )


def test_a_beginning_of_another_job_is_not_taken_up(models, folders, tmp_path, monkeypatch):
    src, dst = folders / 'mha' / 'many', tmp_path / 'dst'
    with monkeypatch.context() as m:
        m.setattr(checkpoint, '_copy_extras', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(src, dst, Plan.of(models['mha'], mlp_channels={b: range(50) for b in range(4)}))
    plan = Plan.of(models['mha'], mlp_channels={b: range(40, 90) for b in range(4)})
    assert digest(prune_checkpoint(src, dst, plan)) == digest(prune_checkpoint(src, tmp_path / 'whole', plan))


# --- bad input --------------------------------------------------------------------------------------------------


def full_disk(m, src, d, mp):
    usage = shutil.disk_usage
    mp.setattr(shutil, 'disk_usage', lambda p: usage(p)._replace(free=10_000))
    prune_checkpoint(src, d / 'dst', Plan.of(m))


def taken(m, src, d, mp):
    (d / 'dst').mkdir()
    prune_checkpoint(src, d / 'dst', Plan.of(m))


def in_the_way(m, src, d, mp):
    (d / 'dst.partial').mkdir()
    (d / 'dst.partial' / 'thesis.txt').write_text('mine')
    prune_checkpoint(src, d / 'dst', Plan.of(m))


def copied(src, d):
    return Path(shutil.copytree(src, d / 'src'))


def truncated(m, src, d, mp):
    p = sorted(copied(src, d).glob('*.safetensors'))[1]
    p.write_bytes(p.read_bytes()[:-5])
    prune_checkpoint(d / 'src', d / 'dst', Plan.of(m))


def shard_missing(m, src, d, mp):
    sorted(copied(src, d).glob('*.safetensors'))[1].unlink()
    prune_checkpoint(d / 'src', d / 'dst', Plan.of(m))


def bad_index(m, src, d, mp):
    (copied(src, d) / 'model.safetensors.index.json').write_text('{')
    prune_checkpoint(d / 'src', d / 'dst', Plan.of(m))


def no_config(m, src, d, mp):
    (copied(src, d) / 'config.json').unlink()
    prune_checkpoint(d / 'src', d / 'dst', Plan.of(m))


def no_layers(m, src, d, mp):
    for p in copied(src, d).glob('*.safetensors'):
        save_file({k.replace('o_proj', 'oh_proj'): v for k, v in load_file(p).items()}, p)
    prune_checkpoint(d / 'src', d / 'dst', Plan.of(m))


BAD = dict(
    full_disk=(full_disk, 'free on the disk'),
    taken=(taken, 'dst exists already'),
    in_the_way=(in_the_way, 'dst.partial is in the way'),
    truncated=(truncated, 'truncated'),
    shard_missing=(shard_missing, 'which its index names'),
    bad_index=(bad_index, 'index.json is damaged'),
    no_config=(no_config, 'no config.json'),
    no_layers=(no_layers, 'do not fit the config'),
    nowhere=(lambda m, src, d, mp: prune_checkpoint(d / 'nowhere', d / 'dst', Plan.of(m)), 'no checkpoint folder'),
    inside=(lambda m, src, d, mp: prune_checkpoint(src, src / 'dst', Plan.of(m)), 'lies inside'),
    itself=(lambda m, src, d, mp: prune_checkpoint(src, src, Plan.of(m), force=True), 'which is only read'),
    other=(lambda m, src, d, mp: prune_checkpoint(src, d / 'dst', Plan.of(zoo.build('phi'))), 'made for phi'),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence_and_leaves_nothing(models, folders, tmp_path, monkeypatch, name):
    call, text = BAD[name]
    before = digest(folders / 'mha' / 'many')
    with pytest.raises((ValueError, OSError)) as e:
        call(models['mha'], folders / 'mha' / 'many', tmp_path, monkeypatch)
    assert text in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400
    assert (
        digest(folders / 'mha' / 'many') == before
        and not (tmp_path / 'dst' / 'config.json').exists()
        and (name == 'in_the_way') == (tmp_path / 'dst.partial').exists()
    )


def test_a_quantized_folder_is_refused(models, folders, tmp_path):
    p = tmp_path / 'src'
    shutil.copytree(folders / 'tied' / 'one', p)
    t = load_file(p / 'model.safetensors')
    head = json.dumps({k: dict(dtype='F4', shape=[1], data_offsets=[0, 1]) for k in t}).encode()
    (p / 'model.safetensors').write_bytes(len(head).to_bytes(8, 'little') + head + b'x')
    with pytest.raises(ValueError, match='F4 weights: prune first'):
        prune_checkpoint(p, tmp_path / 'dst', Plan.of(models['tied']))


def test_layers_are_told_from_those_of_the_vision_encoder(folders):
    for name in zoo.BUILD:
        stored = {k: v for p in weight_files(folders / name / 'many') for k, v in read_header(p).items()}
        prefix = stored_layer_prefix(stored, meta_from_folder(folders / name / 'many').architecture)
        assert 'vision' not in prefix and {k for k in stored if k.startswith(prefix)}
