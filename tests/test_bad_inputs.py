"""A hundred bad inputs on the commands: each ends in one sentence and status 2, and nothing is written."""

import copy
import dataclasses
import json
import math
import shutil

import datasets
import pytest
import torch
from test_real_checkpoints import edit_config, lm, quantized_folder

from lvlm_study.core.store import Run
from lvlm_study.data.instruction_data import Collator
from lvlm_study.data.toy_benchmarks import instructions
from lvlm_study.efficiency.engines import check_engine, export
from lvlm_study.efficiency.quantization import quantize
from lvlm_study.evaluation.evaluate import evaluate
from lvlm_study.importance.importance import Scores, score
from lvlm_study.models.architecture import parameter_sizes
from lvlm_study.models.loading import load_lvlm, rgb_image, save_lvlm
from lvlm_study.models.study_models import STUDY_MODELS_FOLDER
from lvlm_study.pruning.checkpoint import prune_checkpoint
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.layer_pruning import layer_plan
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.repair import repair
from lvlm_study.pruning.surgery import apply_plan
from lvlm_study.pruning.width_pruning import width_plan
from lvlm_study.recovery.losses import Recovery
from lvlm_study.recovery.recovery import load_recovery, recover
from lvlm_study.recovery.teacher_cache import cache_teacher
from lvlm_study.study import cli as commands
from lvlm_study.study.runner import run_all


def scores_of(lvlm):
    sizes = parameter_sizes(lvlm)
    L, H, F = len(sizes['layers']), sizes['kv_heads'], sizes['mlp_channels']
    torch.manual_seed(0)
    layers = dict(bi=torch.rand(1, L))
    groups = dict(kv_heads=dict(taylor=torch.rand(1, L, H)), mlp_channels=dict(taylor=torch.rand(1, L, F)))
    return Scores(dict(layers=layers) | groups, lvlm.name, sizes, None, 4)


def write_data(d):
    "Training data, whole and in many broken forms."
    (d / 'pictures').mkdir()
    rows = []
    for r in instructions('recovery', 2):
        r['images'][0].save(d / 'pictures' / f'{r["id"]}.png')
        talk = [{'from': 'human' if m['role'] == 'user' else 'gpt', 'value': m['content']} for m in r['messages'][:2]]
        rows.append(dict(id=r['id'], image=f'{r["id"]}.png', conversations=talk))
    cut = d / 'pictures' / 'cut.png'
    cut.write_bytes((d / 'pictures' / rows[0]['image']).read_bytes()[:60])
    unanswered = dict(rows[0], conversations=rows[0]['conversations'][:1])
    contents = dict(
        train=rows,
        object=dict(rows=rows),
        numbers=[1, 2],
        nothing=[],
        unanswered=[unanswered],
        gone_picture=[dict(rows[0], image='gone.png')],
        cut_picture=[dict(rows[0], image='cut.png')],
        no_turns=[dict(id='a')],
    )
    for name, content in contents.items():
        (d / f'{name}.json').write_text(json.dumps(content))
    (d / 'lines.json').write_text('\n'.join(map(json.dumps, rows)))
    (d / 'empty.json').write_text('')
    (d / 'binary.json').write_bytes(bytes(range(200, 256)))


def write_models(d):
    "A good model, and folders that are none."
    shutil.copytree(STUDY_MODELS_FOLDER / 'tiny-llava', d / 'm')
    (d / 'void').mkdir()
    lm(d / 'lm')
    for name in ('no_json', 'json_list', 'new_type', 'no_type', 'no_weights', 'truncated', 'stale', 'misfit'):
        shutil.copytree(d / 'lm', d / name)
    (d / 'no_json' / 'config.json').write_text('{')
    (d / 'json_list' / 'config.json').write_text('[]')
    edit_config(d / 'new_type', model_type='llama9', auto_map={'AutoModel': 'x.Y'})
    edit_config(d / 'no_type', model_type=None)
    edit_config(d / 'misfit', num_hidden_layers=9)
    (d / 'no_weights' / 'model.safetensors').unlink()
    weights = d / 'truncated' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    (d / 'stale' / 'model.safetensors').unlink()
    index = dict(weight_map={'a': 'model-1.safetensors'})
    (d / 'stale' / 'model.safetensors.index.json').write_text(json.dumps(index))
    quantized_folder(d / 'awq', 'awq')
    (d / 'pickle').mkdir()
    shutil.copy(d / 'lm' / 'config.json', d / 'pickle')
    torch.save({}, d / 'pickle' / 'pytorch_model.bin')


def write_plans(d):
    "Scores, plans and records, whole and broken."
    lvlm, other = load_lvlm(d / 'm', torch.float32), load_lvlm(d / 'lm')
    good = scores_of(lvlm)
    good.save(d / 'scores')
    scores_of(other).save(d / 'other')
    broken = copy.deepcopy(good.samples)
    broken['layers']['bi'][0, 1] = math.nan
    broken['kv_heads']['taylor'][0, 1] = math.inf
    Scores(broken, 'm', good.sizes, None, 4).save(d / 'nan')
    for name in ('half', 'unjson', 'lonely'):
        for ending in ('json', 'safetensors'):
            shutil.copy(d / f'scores.{ending}', d / f'{name}.{ending}')
    (d / 'half.safetensors').write_bytes((d / 'scores.safetensors').read_bytes()[:200])
    (d / 'unjson.json').write_text('{')
    (d / 'lonely.json').unlink()
    plan = json.loads(Plan.of(lvlm, layers=range(9)).to_json())
    plans = dict(
        plan=plan,
        plan_list=[1],
        plan_old=dict(blocks=[1], depth=12),
        plan_extra=plan | dict(color='red'),
        plan_beyond=plan | dict(layers=[0, 99]),
        plan_empty=plan | dict(layers=[]),
        plan_words=plan | dict(layers=['one']),
        plan_other=json.loads(Plan.of(other, layers=range(4)).to_json()),
    )
    for name, content in plans.items():
        (d / f'{name}.json').write_text(json.dumps(content))
    evaluate(lvlm, 'small', limit=1, records=d / 'm.parquet', progress=False)
    evaluate(load_lvlm('tiny-gqa'), 'small', limit=1, records=d / 'gqa.parquet', progress=False)
    (d / 'text.parquet').write_text('no parquet')
    (d / 'foreign').mkdir()
    (d / 'foreign' / 'letter.txt').write_text('dear')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp('bad')
    write_data(d)
    write_models(d)
    write_plans(d)
    return d


def names_and_sizes(d):
    return {str(p.relative_to(d)): p.stat().st_size for p in d.rglob('*') if p.is_file()}


DATA = ' --data train.json --images pictures'
BAD = """
lvlm_score                                          | required: model, out
lvlm_score m                                        | required: out
lvlm_score nowhere s                                | nowhere is neither a study model
lvlm_score owner/name/more s                        | neither a study model
lvlm_score train.json s                             | train.json is neither
lvlm_score void s                                   | void is no checkpoint folder: it has no config.json
lvlm_score no_json s                                | no_json/config.json is no JSON
lvlm_score json_list s                              | holds a list
lvlm_score new_type s                               | 'llama9' is not one that transformers knows, and the Python files
lvlm_score no_type s                                | model_type None
lvlm_score no_weights s                             | no_weights has no model.safetensors
lvlm_score truncated s                              | truncated/model.safetensors is truncated or damaged
lvlm_score stale s                                  | stale has no model-1.safetensors, which its index names
lvlm_score misfit s                                 | the weights do not fit the config
lvlm_score awq s                                    | awq is quantized (awq)
lvlm_score pickle s                                 | weights are read from safetensors only
lvlm_score m s --criteria fame                      | unknown criterion 'fame': choose from bi
lvlm_score m s --criteria ,                         | no criterion is named
lvlm_score m s --samples -3                         | not -3
lvlm_score m s --samples five                       | invalid int value: 'five'
lvlm_score m s --samples 2.5                        | invalid int value: '2.5'
lvlm_score m s --batch_size 0                       | batch_size is a whole number from 1 on, not 0
lvlm_score m s --dtype int4                         | dtype is float32, bfloat16 or float16, not 'int4'
lvlm_score m s --device gpu                         | not 'gpu'
lvlm_score m s --device cuda:99                     | cuda
lvlm_score m s --data gone.json                     | gone.json is no data
lvlm_score m s --data pictures                      | pictures is no data
lvlm_score m s --data empty.json                    | empty.json is not one JSON list
lvlm_score m s --data object.json                   | is to be a JSON list
lvlm_score m s --data numbers.json                  | is to be a JSON list
lvlm_score m s --data nothing.json                  | at least one
lvlm_score m s --data lines.json                    | is not one JSON list (line 2)
lvlm_score m s --data binary.json                   | is no text in UTF-8
lvlm_score m s --data no_turns.json                 | has no conversations
lvlm_score m s --data gone_picture.json --images pictures  | an image that is not there: gone.png
lvlm_score m s --data cut_picture.json --images pictures   | picture
lvlm_score m s --data unanswered.json --images pictures    | has no answer to learn from
lvlm_score m s --data train.json --images nowhere   | an image that is not there
lvlm_score m s --data train.json --images pictures --skip --colour red | --colour is not known here
lvlm_score m s extra                                | extra is not known here
lvlm_score lm s --data train.json --images pictures | lm is a plain language model, which reads no images
lvlm_score m train --data train.json                | train.json, which is only read
lvlm_score m plan --samples 1                       | plan.json
lvlm_score m train.json/s --samples 1               | train.json
lvlm_prune                                          | required: model, out
lvlm_prune m p                                      | either --scores (with --ratio) or --plan
lvlm_prune m p --scores scores --plan plan.json     | either --scores (with --ratio) or --plan
lvlm_prune nowhere p --scores scores                | nowhere is neither a study model
lvlm_prune m p --scores gone                        | gone.safetensors is not there
lvlm_prune m p --scores lonely                      | lonely.json is not there
lvlm_prune m p --scores half                        | half
lvlm_prune m p --scores unjson                      | unjson
lvlm_prune m p --scores other                       | this plan was made for
lvlm_prune m p --scores nan                         | bi of layers is not finite
lvlm_prune m p --scores nan --method width          | not finite
lvlm_prune m p --scores scores --ratio 0            | a ratio lies between 0 and 1
lvlm_prune m p --scores scores --ratio 1            | a ratio lies between 0 and 1
lvlm_prune m p --scores scores --ratio -0.1         | a ratio lies between 0 and 1
lvlm_prune m p --scores scores --ratio 30           | a ratio lies between 0 and 1
lvlm_prune m p --scores scores --ratio nan          | a ratio lies between 0 and 1
lvlm_prune m p --scores scores --ratio third        | invalid float value: 'third'
lvlm_prune m p --scores scores --method depth       | method is layer or width, not 'depth'
lvlm_prune m p --scores scores --criterion fame     | there is no way 'fame'
lvlm_prune m p --scores scores --method width --criterion bi | by 'bi'
lvlm_prune m p --scores scores --tolerance -1       | a tolerance is a share from 0 on
lvlm_prune m p --scores scores --tolerance 0.000001 | the nearest are
lvlm_prune m p --plan gone.json                     | gone.json is no plan
lvlm_prune m p --plan empty.json                    | this is no plan
lvlm_prune m p --plan binary.json                   | binary.json is no plan
lvlm_prune m p --plan plan_list.json                | this is no plan
lvlm_prune m p --plan plan_old.json                 | written in old words
lvlm_prune m p --plan plan_extra.json               | 'color' is not a field of a plan
lvlm_prune m p --plan plan_beyond.json              | plan
lvlm_prune m p --plan plan_empty.json                 | no layer left
lvlm_prune m p --plan plan_words.json               | plan
lvlm_prune m p --plan plan_other.json               | this plan was made for
lvlm_prune m void --plan plan.json                  | void exists already
lvlm_prune m foreign --plan plan.json --force       | foreign is a folder that no command here has written
lvlm_prune m train.json/p --plan plan.json          | train.json
lvlm_prune truncated p --plan plan_other.json       | is truncated or damaged
lvlm_prune misfit p --plan plan_other.json          | the weights do not fit the config
lvlm_recover                                        | required: model, out
lvlm_recover nowhere r                              | nowhere is neither a study model
lvlm_recover m r --recipe prayer                    | prayer
lvlm_recover m r --recipe +                         | recipe
lvlm_recover m r --recipe hidden                    | name it with --teacher
lvlm_recover m r --recipe kl --teacher nowhere      | nowhere is neither a study model
lvlm_recover m r --recipe kl --teacher lm           | the vision encoder of the teacher is another one
lvlm_recover m r --trainable full                   | full
lvlm_recover m r --trainable nothing                | nothing
lvlm_recover m r --fraction 0                       | fraction
lvlm_recover m r --fraction 5                       | fraction
lvlm_recover m r --fraction some                    | invalid float value: 'some'
lvlm_recover m r --batch_size 0                     | batch_size
lvlm_recover m r --epochs 0                         | epochs
lvlm_recover m r --epochs -1                        | epochs
lvlm_recover m r --epochs nan                       | epochs
lvlm_recover m r --seed x                           | invalid int value: 'x'
lvlm_recover m r --dtype float8                     | not 'float8'
lvlm_recover m r --data gone.json                   | gone.json is no data
lvlm_recover m r --data cut_picture.json --images pictures | picture
lvlm_recover m text.parquet                         | text.parquet is a file
lvlm_recover m foreign                              | foreign is in use and holds no recovery
lvlm_recover lm r                                   | which reads no images
lvlm_recover m r --trains lora                      | --trains is called --trainable now
lvlm_evaluate                                       | required: model
lvlm_evaluate nowhere                               | nowhere is neither a study model
lvlm_evaluate m --suite popes                       | there is no suite 'popes'
lvlm_evaluate m --limit -1                          | limit is a number of questions, 0 for all, not -1
lvlm_evaluate m --limit few                         | invalid int value: 'few'
lvlm_evaluate m --batch_size 0                      | batch_size is a whole number from 1 on, not 0
lvlm_evaluate m --dtype double                      | not 'double'
lvlm_evaluate m --device tpu9                       | not 'tpu9'
lvlm_evaluate m --records text.parquet              | text.parquet is no file of records
lvlm_evaluate m --records gqa.parquet --limit 1     | gqa.parquet holds records of another model
lvlm_evaluate m --records m.parquet --no_images --dtype float32 | with and without pictures
lvlm_evaluate m --records foreign                   | foreign
lvlm_evaluate m --base gone.parquet                 | gone.parquet is no file of records
lvlm_evaluate m --base text.parquet                 | text.parquet is no file of records
lvlm_evaluate m --blind                             | --blind is called --no_images now
lvlm_evaluate lm --limit 1                          | reads no images
lvlm_doctor                                         | required: folder
lvlm_doctor m more                                  | more is not known here
lvlm_doctor m --deep                                | --deep is not known here
lvlm_study                                          | required: action
lvlm_study fly                                      | invalid choice: 'fly'
lvlm_study show --preset nonsense                   | nonsense
lvlm_study run --preset nonsense                    | nonsense
lvlm_study run --models nothing                     | nothing
lvlm_study run --suite popes                        | popes
lvlm_study run --seeds a,b                          | 'a' is no seed
lvlm_study run --seeds -1                           | seed
lvlm_study run --shard 0/2                          | '0/2' is no share
lvlm_study run --shard 3/2                          | '3/2' is no share
lvlm_study run --minutes soon                       | invalid float value: 'soon'
lvlm_study run --minutes -1                         | minutes
lvlm_study draw --preset nonsense                   | nonsense
lvlm_study check --preset nonsense                  | nonsense
"""
CASES = [tuple(map(str.strip, line.split('|'))) for line in BAD.strip().splitlines()]


def test_there_are_a_hundred():
    assert len({words for words, _ in CASES}) == len(CASES) >= 100
    assert {words.split()[0] for words, _ in CASES} == {
        'lvlm_score',
        'lvlm_prune',
        'lvlm_recover',
        'lvlm_evaluate',
        'lvlm_doctor',
        'lvlm_study',
    }


@pytest.mark.parametrize('words,why', CASES, ids=lambda text: text)
def test_bad_input(words, why, run, place, monkeypatch):  # noqa: F811
    monkeypatch.chdir(place)
    monkeypatch.setenv('LVLM_RESULTS', str(place / 'void'))
    before = names_and_sizes(place)
    name, *rest = words.split()
    command = 'study_command' if name == 'lvlm_study' else name
    if '--device' not in rest and command in ('lvlm_score', 'lvlm_evaluate') and rest:
        rest += ['--device', 'cpu']
    status, out, err = run(command, *rest)
    assert (status, out) == (2, ''), (status, out, err)
    assert err.startswith(f'{name}: ') and err.count('\n') == 1 and why in err, err
    assert 'Error: ' not in err and len(err) < 500, err
    assert names_and_sizes(place) == before, 'something was written'


# --- from Python ------------------------------------------------------------------------------------------------

LVLM_CALLS = dict(
    score=lambda m: score(m, instructions('recovery', 2)),
    evaluate=lambda m: evaluate(m, 'small', limit=1),
    recover=lambda m: recover(m, instructions('recovery', 2)),
    apply_plan=lambda m: apply_plan(m, Plan((0,), 1)),
    save_lvlm=lambda m: save_lvlm(m, 'somewhere'),
    cache_teacher=lambda m: cache_teacher(m, None, 'somewhere'),
)


@pytest.mark.parametrize('name', LVLM_CALLS)
def test_a_name_is_no_model(name, place, monkeypatch):
    monkeypatch.chdir(place)
    before = names_and_sizes(place)
    for given, says in (
        ('tiny-llava', r"is loaded first: give load_lvlm\('tiny-llava'\)"),
        (None, 'what load_lvlm gives, not a NoneType'),
        (torch.nn.Linear(1, 1), 'what load_lvlm gives, not a Linear'),
    ):
        with pytest.raises(ValueError, match=says):
            LVLM_CALLS[name](given)
    assert names_and_sizes(place) == before


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-llava')


@pytest.fixture(scope='module')
def rows():
    return instructions('recovery', 4)


VALUES = {
    'score limit text': (lambda m, r: score(m, r, 'bi', limit='5'), "limit is a whole number from 1 on, not '5'"),
    'score limit float': (lambda m, r: score(m, r, 'bi', limit=2.0), 'limit is a whole number from 1 on, not 2.0'),
    'score limit 0': (lambda m, r: score(m, r, 'bi', limit=0), 'choose 1 to 4'),
    'score limit 9': (lambda m, r: score(m, r, 'bi', limit=9), 'choose 1 to 4'),
    'score batch_size': (lambda m, r: score(m, r, 'bi', batch_size=0), 'batch_size is a whole number from 1 on, not 0'),
    'score batch_size text': (lambda m, r: score(m, r, 'bi', batch_size='4'), "not '4'"),
    'score data name': (lambda m, r: score(m, 'train.json', 'bi'), "with input_ids, not 'train.json'"),
    'score data number': (lambda m, r: score(m, 3, 'bi'), 'batches with input_ids, not'),
    'score data columns': (lambda m, r: score(m, r.remove_columns('images'), 'bi'), 'no images is there'),
    'score criteria number': (lambda m, r: score(m, r, 3), 'criteria are names, not 3'),
    'score criteria unknown': (lambda m, r: score(m, r, 'bj'), "unknown criterion 'bj'"),
    'score nothing': (lambda m, r: score(m, r, []), 'no criterion is named'),
    'evaluate limit': (lambda m, r: evaluate(m, 'small', limit='5'), "not '5'"),
    'evaluate suite': (lambda m, r: evaluate(m, 'popes'), 'popes'),
    'evaluate rows': (lambda m, r: evaluate(m, r), 'this data set has no'),
    'recover recipe': (lambda m, r: recover(m, r, 'prayer'), 'prayer'),
    'recover recipe number': (lambda m, r: recover(m, r, 5), '5'),
    'recover data': (lambda m, r: recover(m, 'train.json'), 'training data are a datasets.Dataset'),
    'recover fraction': (lambda m, r: recover(m, r, fraction='0.5'), 'fraction'),
    'recover teacher': (lambda m, r: recover(m, r, 'kl', teacher='tiny-llava'), 'a teacher is a model'),
    'recover setting': (lambda m, r: recover(m, r, learning_rate=1), 'learning_rate'),
    'recover seed': (lambda m, r: recover(m, r, seed='a'), "seed is a whole number, not 'a'"),
    'recover lr': (lambda m, r: recover(m, r, lr='fast'), 'lr'),
    'load dtype': (lambda m, r: load_lvlm('tiny-llava', dtype='float16'), "dtype is one of .* not 'float16'"),
    'load dtype int': (lambda m, r: load_lvlm('tiny-llava', dtype=torch.int8), 'dtype is one of'),
    'load device': (lambda m, r: load_lvlm('tiny-llava', device='gpu'), "such as 'cpu' or 'cuda', not 'gpu'"),
    'load nothing': (lambda m, r: load_lvlm(None), 'None is neither a study model'),
    'load number': (lambda m, r: load_lvlm(7), '7 is neither a study model'),
    'plan ratio text': (lambda m, r: layer_plan(scores_of(m), '0.3'), "not '0.3'"),
    'plan scores': (lambda m, r: layer_plan({'bi': [1]}, 0.3), 'scores'),
    'width scores': (lambda m, r: width_plan('scores', 0.3), 'scores'),
    'width how': (lambda m, r: width_plan(scores_of(m), 0.3, how='wild'), "uniform or global, not 'wild'"),
    'apply text': (lambda m, r: apply_plan(m, 'plan.json'), 'a plan is made by'),
    'prune text': (lambda m, r: prune_checkpoint(STUDY_MODELS_FOLDER / 'tiny-llava', 'x', 'p.json'), 'a plan is'),
    'doctor number': (lambda m, r: doctor(7), 'doctor examines a folder'),
    'export nothing': (lambda m, r: export(None), 'by its name, not None'),
    'export number': (lambda m, r: export(7, out='x.gguf'), 'by its name, not 7'),
    'score batch_size nothing': (lambda m, r: score(m, r, 'bi', batch_size=None), 'batch_size is a whole number'),
    'score path': (lambda m, r: score(m, r, 'bi', path=7), 'path is where scores are stored'),
    'plan how': (lambda m, r: layer_plan(scores_of(m), 0.3, {}), 'a way to choose layers is a name'),
    'plan order': (lambda m, r: layer_plan(scores_of(m), 0.3, order=7), 'an order is the numbers of layers'),
    'width within': (lambda m, r: width_plan(scores_of(m), 0.3, within='a'), "within is a plan, .* not 'a'"),
    'plan layers': (lambda m, r: Plan.of(m, layers=7), 'layers are the numbers of those that stay'),
    'plan heads': (lambda m, r: Plan.of(m, kv_heads=[1]), r'kv_heads are given by layer, .* not \[1\]'),
    'repair names': (lambda m, r: repair('a', 'b'), r"a student is loaded first: give load_lvlm\('a'\)"),
    'repair nothing': (lambda m, r: repair(m, m), 'calibration samples are'),
    'repair maps': (lambda m, r: repair(m, m, r, maps=7), 'the maps that can be repaired are o and down, not 7'),
    'repair rows': (lambda m, r: repair(m, m, r, rows='a'), "rows is a list .* not 'a'"),
    'repair batch_size': (lambda m, r: repair(m, m, r, batch_size=None), 'batch_size is a whole number from 1 on'),
    'recover trainable': (lambda m, r: recover(m, r, trainable=[]), 'trainable is one of'),
    'recover out': (lambda m, r: recover(m, r, out={}), 'out is a folder that keeps the result'),
    'recover steps': (lambda m, r: recover(m, r, max_steps='a'), 'max_steps'),
    'export engine': (lambda m, r: export('tiny-llava', {}, out='x.gguf'), 'an engine is one of'),
    'export out': (lambda m, r: export('tiny-llava', out=7), 'out is the file to write, not 7'),
    'export multiple': (lambda m, r: export('tiny-llava', out='x.gguf', multiple=0), 'multiple is a whole number'),
    'engine nothing': (lambda m, r: check_engine(None), 'an engine runs a checkpoint folder'),
    'engine words': (lambda m, r: check_engine('tiny-gqa', words='a'), "words is a whole number from 1 on, not 'a'"),
    'engine multiple': (lambda m, r: check_engine('tiny-gqa', multiple=0.5), 'multiple is a whole number from 1 on'),
    'engine original': (lambda m, r: check_engine('tiny-gqa', original=7), 'an engine runs .* not 7'),
    'quantize name': (lambda m, r: quantize('tiny-gqa'), 'a model is loaded first'),
    'quantize kind': (lambda m, r: quantize(m, {}), 'a quantizer is one of'),
    'prune nothing': (lambda m, r: prune_checkpoint(None, 'o', None), 'src is a checkpoint folder, not None'),
    'prune nowhere': (lambda m, r: prune_checkpoint('m', 7, None), 'dst is a checkpoint folder, not 7'),
    'save nowhere': (lambda m, r: save_lvlm(m, ''), 'a folder to write is named'),
    'run budget': (lambda m, r: Run('layer_pruning', budget='x'), "budget is epochs or steps, not 'x'"),
    'run method': (lambda m, r: Run('layer_pruning', method='depth'), 'method is none or layer or width'),
    'run ratio': (lambda m, r: Run('layer_pruning', ratio=30), 'ratio is a share from 0 to 1, not 30'),
    'run seed': (lambda m, r: Run('layer_pruning', seed='0'), "seed is a whole number from 0 on, not '0'"),
    'run images': (lambda m, r: Run('layer_pruning', use_images='no'), 'use_images is False or True'),
    'run trainable': (lambda m, r: Run('recovery', trainable='eyes'), 'trainable is made of'),
    'run name': (lambda m, r: Run('a/b'), 'experiment is the name of a results file'),
    'run nonsense': (lambda m, r: run_all([Run('nonsense')]), r"Run\(experiment='nonsense'\) is no run"),
    'run text': (lambda m, r: run_all(['nonsense']), "'nonsense' is no run"),
    'picture': (lambda m, r: rgb_image('cat.png'), 'a picture is a PIL image'),
    'picture empty': (lambda m, r: rgb_image(dict(bytes=None, path=None)), 'without bytes'),
}


@pytest.mark.parametrize('name', VALUES)
def test_bad_values_from_python(name, lvlm, rows, tmp_path, monkeypatch):
    call, says = VALUES[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e:
        call(lvlm, rows)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_stored_pictures_are_decoded(lvlm, rows):
    stored = rows.cast_column('images', datasets.List(datasets.Image(decode=False)))
    encoded = stored[0]['images'][0]
    assert isinstance(encoded, dict) and encoded['bytes']
    batch = Collator(lvlm)([rows[0] | dict(images=[encoded])])
    assert torch.equal(batch['pixel_values'], Collator(lvlm)([rows[0]])['pixel_values'])


def test_damaged_curves_are_named_before_anything_is_asked(run, place, monkeypatch):  # noqa: F811
    monkeypatch.chdir(place)
    monkeypatch.setattr(commands, '_load', lambda *a: pytest.fail('the model was loaded'))
    shutil.copytree('m', 'curved/model')
    for damage in ('{"step": 1, "sft"', '[1, 2]', '{"sft": 1.0}', '{"step": "first"}'):
        (place / 'curved' / 'curves.jsonl').write_text('{"step": 0, "sft": 2.0}\n' + damage + '\n')
        status, out, err = run('lvlm_evaluate', 'curved/model', '--limit', 1, '--records', 'curved.parquet')
        assert (status, out) == (2, '') and 'curves.jsonl is damaged in line 2' in err and err.count('\n') == 1
    shutil.rmtree('curved')
    assert not (place / 'curved.parquet').exists()


@pytest.mark.parametrize('damage', ['{"step": 1, "sft"', '[1, 2]', '{"sft": 1.0}', '{"step": "first"}', ''])
def test_damaged_curves_of_a_finished_recovery(damage, tmp_path):
    "One sentence that names the file or the folder, before the model is loaded: there is none here."
    folder = tmp_path / 'done'
    folder.mkdir()
    (folder / 'settings.json').write_text(json.dumps(dict(settings=dataclasses.asdict(Recovery()))))
    good = '{"step": 0, "sft": 2.0, "seconds": 1}\n' if damage else ''
    (folder / 'curves.jsonl').write_text(good + damage)
    with pytest.raises(ValueError, match='damaged in line 2' if damage else 'holds no curves') as e:
        load_recovery(folder)
    assert '\n' not in str(e.value)
