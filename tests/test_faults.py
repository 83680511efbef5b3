"""Damaged weights, scores, plans and pictures are refused in one sentence, or left out where that was asked for."""

import json
import shutil
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_inputs import scores_of, write_data

from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.evaluation.evaluate import evaluate
from lvlm_study.importance.calibration import readable_samples
from lvlm_study.importance.importance import Scores
from lvlm_study.models.loading import check_finite, load_lvlm
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.folder_repair import repair_folder
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.repair import repair
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.study.cli import lvlm_prune, lvlm_score, read_data

NOT_FINITE = r'layers.1.self_attn.o_proj.weight holds values that are not finite'


@pytest.fixture
def lvlm():
    return load_lvlm('tiny-llava')


def damage(lvlm, layer=1):
    lvlm.layers[layer].self_attn.o_proj.weight.data[3, 2] = float('nan')


def forbid_passes(monkeypatch, lvlm):
    def forward(*args, **kwargs):
        raise AssertionError('the model was asked')

    monkeypatch.setattr(lvlm.model, 'forward', forward)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_every_value_that_is_not_finite_is_seen(lvlm, value):
    check_finite(lvlm)
    lvlm.layers[1].self_attn.o_proj.weight.data[3, 2] = value
    with pytest.raises(ValueError, match=NOT_FINITE):
        check_finite(lvlm)
    check_finite(lvlm, layer=0)
    with pytest.raises(ValueError, match=NOT_FINITE):
        check_finite(lvlm, layer=1)


def test_evaluate_refuses_damaged_weights(lvlm, monkeypatch):
    damage(lvlm)
    forbid_passes(monkeypatch, lvlm)
    with pytest.raises(ValueError, match=NOT_FINITE):
        evaluate(lvlm, limit=1, progress=False)


@pytest.mark.parametrize('which', ['teacher', 'student'])
def test_repair_refuses_damaged_weights(lvlm, monkeypatch, which):
    student = apply_plan(lvlm, Plan.of(lvlm, [0, 1, 2]))
    damage(dict(teacher=lvlm, student=student)[which])
    forbid_passes(monkeypatch, lvlm)
    with pytest.raises(ValueError, match=NOT_FINITE):
        repair(student, lvlm, instructions('recovery', 2))


def nan_folder(folder):
    shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', folder)
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith('layers.1.self_attn.o_proj.weight'))
    tensors[name][3, 2] = float('nan')
    save_file(tensors, path, metadata=dict(format='pt'))
    return folder


def test_a_refused_repair_leaves_nothing_behind(tmp_path, lvlm):
    src, plan = nan_folder(tmp_path / 'nan'), Plan.of(lvlm, [0, 1, 2])
    again = partial(repair_folder, calibration=instructions('recovery', 2))
    with pytest.raises(ValueError, match=NOT_FINITE):
        prune_checkpoint(src, tmp_path / 'p', plan, repair=again)
    assert [p.name for p in tmp_path.iterdir()] == ['nan']


def test_a_stopped_repair_can_still_be_taken_up(tmp_path, lvlm):
    def stopped(src, dst):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(STUDY_MODELS_FOLDER / 'tiny-llava', tmp_path / 'p', Plan.of(lvlm, [0, 1]), repair=stopped)
    assert (tmp_path / 'p.partial').is_dir()


@pytest.mark.parametrize('name, cut', [('layers:bi', 1), ('kv_heads:taylor', 2), ('mlp_channels:taylor', 2)])
def test_scores_of_other_sizes_are_refused(tmp_path, lvlm, name, cut):
    path = scores_of(lvlm).save(tmp_path / 's')
    Scores.load(path)
    tensors = load_file(f'{path}.safetensors')
    tensors[name] = tensors[name].narrow(cut, 0, tensors[name].shape[cut] - 1).contiguous()
    save_file(tensors, f'{path}.safetensors')
    with pytest.raises(ValueError, match='s is damaged: .* score again'):
        Scores.load(path)


def test_scores_without_rows_are_refused(tmp_path, lvlm):
    path = scores_of(lvlm).save(tmp_path / 's')
    tensors = load_file(f'{path}.safetensors')
    save_file(tensors | {'layers:bi': torch.zeros(0, len(lvlm.layers))}, f'{path}.safetensors')
    with pytest.raises(ValueError, match='s is damaged'):
        Scores.load(path)


@pytest.mark.parametrize(
    'layers, why',
    [
        ([0, 1, 1], 'layer 1 is named twice'),
        ([-1, 0], 'not -1'),
        ([True, 2], 'not True'),
        ([0, 1.0], 'not 1.0'),
        ([0, '1'], "not '1'"),
        ([2, 0], '0 comes after 2'),
        ([0, 99], 'no layer 99'),
        (3, 'not iterable'),
    ],
)
def test_layers_of_a_plan(lvlm, layers, why):
    data = json.loads(Plan.of(lvlm, [0, 2]).to_json())
    assert Plan.from_json(json.dumps(data)).layers == (0, 2)
    with pytest.raises(ValueError, match=f'^this is no plan: .*{why}') as e:
        Plan.from_json(json.dumps(data | dict(layers=layers)))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('text', ['[]', '[{"id": 1, "image": "x"}]', '[[1, 2]]', '"layers"', '3', 'null'])
def test_json_that_is_no_plan(text):
    with pytest.raises(ValueError, match='this is no plan: it is a .*, a plan is an object'):
        Plan.from_json(text)


@pytest.fixture
def mixed(tmp_path):
    "Training data of which the first sample has a picture that is cut; the folder, the ids of the others."
    write_data(tmp_path)
    rows = json.loads((tmp_path / 'train.json').read_text())
    (tmp_path / 'mixed.json').write_text(json.dumps([dict(rows[0], id='cut', image='cut.png'), *rows]))
    return tmp_path, [r['id'] for r in rows]


def test_readable_samples_are_the_first_that_decode(mixed):
    folder, ids = mixed
    ds = read_data(folder / 'mixed.json', folder / 'pictures', True)
    with pytest.warns(UserWarning, match="left out 1 samples whose picture does not decode: 'cut'"):
        assert readable_samples(ds)['id'][:] == ids
    with pytest.warns(UserWarning):
        assert readable_samples(ds, 1)['id'][:] == ids[:1]
    with pytest.raises(ValueError, match="picture of 'cut' does not decode"):
        readable_samples(ds.select([0]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(readable_samples(ds.select([1]))) == 1


def test_skip_leaves_pictures_out_that_do_not_decode(mixed):
    folder, ids = mixed
    data = dict(data=str(folder / 'mixed.json'), images=str(folder / 'pictures'))
    with pytest.raises(ValueError, match="'cut': its picture does not decode"):
        lvlm_score('tiny-llava', str(folder / 's'), **data, criteria='bi')
    with pytest.warns(UserWarning, match='left out 1'):
        done = lvlm_score('tiny-llava', str(folder / 's2'), **data, criteria='bi', skip=True)
    assert done['samples'] == len(ids) and Scores.load(folder / 's2').sample_ids == ids
    prune = dict(scores=str(folder / 's2'), ratio=0.2, repair=True)
    with pytest.raises(ValueError, match="'cut': its picture does not decode"):
        lvlm_prune('tiny-llava', str(folder / 'p'), **prune, **data)
    assert not list(folder.glob('p.partial')) and not (folder / 'p').exists()
    with pytest.warns(UserWarning, match='left out 1'):
        done = lvlm_prune('tiny-llava', str(folder / 'p'), **prune, **data, skip=True)
    assert done['repaired_on'] == len(ids) and (folder / 'p' / 'config.json').exists()


@pytest.mark.parametrize('name, text', [('tokenizer_config.json', '{'), ('chat_template.jinja', '{% for')])
def test_doctor_names_a_small_file_that_cannot_be_read(tmp_path, name, text):
    from lvlm_study import doctor, load_lvlm, save_lvlm

    folder = save_lvlm(load_lvlm('tiny-llava'), tmp_path / 'm')
    found = doctor(folder).set_index('check').loc['its small files can be read']
    assert found.ok and not found.detail
    (folder / name).write_text(text)
    found = doctor(folder).set_index('check').loc['its small files can be read']
    assert not found.ok and found.detail.startswith(name)
