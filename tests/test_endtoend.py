"The whole loop on a few questions, the saved model in a process without this package, and bad input."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import datasets
import pytest
import torch
from guards import ROOT
from PIL import Image

from lvlm_study.core.store import Run, cache_dir, read_rows, temporary_results
from lvlm_study.data.instruction_data import (
    CONVERSATION_FEATURES,
    Collator,
    load_llava_json,
    nested_subset,
    prompt_and_answer,
)
from lvlm_study.evaluation.evaluate import evaluate
from lvlm_study.importance.importance import score
from lvlm_study.pruning.layer_pruning import LAYER_CHOICES, layer_plan
from lvlm_study.models.loading import load_lvlm, save_lvlm
from lvlm_study.recovery.recovery import recover
from lvlm_study.study import runner
from lvlm_study.study.report import compare_results, draw_study, study_figures_dir, summary_table
from lvlm_study.study.runner import PRESETS, run_all, run_grid, run_importance, run_model
from lvlm_study.data.toy_benchmarks import instructions, small_suite
from lvlm_study.pruning.doctor import doctor
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-llava')


@pytest.fixture(scope='module')
def rows():
    return instructions('recovery', 8)


@pytest.fixture(scope='module')
def scores(lvlm, rows):
    return score(lvlm, rows)


def test_smoke_study(tmp_path, monkeypatch):
    monkeypatch.setenv('LVLM_FIGURES', str(tmp_path))
    with temporary_results():
        runs = run_grid('smoke')
        lines = []
        first, second = run_all(runs, log=lines.append), run_all(runs, log=lines.append)
        assert first == dict(computed=len(runs), stored=0, failed=0, left=0)
        assert second == dict(computed=0, stored=len(runs), failed=0, left=0)
        assert len(lines) == len(runs)
        table = summary_table('smoke')
        assert len(table) == len(runs) - 1 and table.retention.iloc[0] == 100
        assert (table.low <= table.retention).all() and (table.retention <= table.high).all()
        assert table.actual_ratio.gt(0).equals(table.target_ratio.gt(0))
        trained = table.model.str.contains('sft')
        assert trained.sum() == 2 and (table.training_seconds > 0).equals(trained)
        assert table.megabytes_16bit.tolist() == pytest.approx(list(2 * table.parameters / 1e6), rel=1e-5)
        drawn = draw_study('smoke')
        assert compare_results('smoke', folder='nowhere').empty
        recovered = next(run for run in runs if run.experiment == 'recovery')
        once = read_rows('recovery')[recovered.key]['metrics']
    assert sorted(drawn) == sorted(tmp_path.glob('*.png')) and len(drawn) == 3
    again = run_model(recovered)['metrics']
    assert again['training_seconds'] > 0 and not list(cache_dir('recoveries').glob(f'{recovered.key}*'))
    assert again['retention'] == pytest.approx(once['retention'])


def test_shards_share_the_runs(monkeypatch):
    monkeypatch.setattr(runner, 'EXPERIMENTS', dict.fromkeys(runner.EXPERIMENTS, lambda run: dict(metrics={})))
    runs = run_grid('quick')
    with temporary_results():
        counts = [run_all(runs, log=lambda s: None, shard=(i, 3))['computed'] for i in (1, 2, 3)]
        assert counts == [4, 4, 3] and run_all(runs, log=lambda s: None)['stored'] == len(runs)


def checkout_state():
    "What git says about the checkout, and the bytes of its figures."
    status = subprocess.run(['git', 'status', '--porcelain'], cwd=ROOT, capture_output=True, text=True).stdout
    return status, {p.name: p.read_bytes() for p in (ROOT / 'figures').glob('*.png')}


def test_drawing_leaves_the_checkout_clean(tmp_path, monkeypatch):
    "As `make study` does: rows elsewhere, so figures go beside them and nothing tracked changes."
    rows = tmp_path / 'rows'
    shutil.copytree(ROOT / 'nbs' / 'results', rows)
    env = {k: v for k, v in os.environ.items() if k != 'LVLM_FIGURES'} | dict(LVLM_RESULTS=str(rows))
    before = checkout_state()
    res = subprocess.run(
        [sys.executable, '-m', 'lvlm_study.study.cli', 'draw'], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert res.returncode == 0, res.stderr[-500:]
    assert len(list((rows / 'figures').glob('*.png'))) == 3 and res.stdout.count('drawn: ') == 3
    assert checkout_state() == before


def test_figures_go_where_they_are_told_to(tmp_path, monkeypatch):
    monkeypatch.delenv('LVLM_FIGURES', raising=False)
    monkeypatch.delenv('LVLM_RESULTS', raising=False)
    assert study_figures_dir() == ROOT / 'figures'
    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    assert study_figures_dir() == tmp_path / 'figures'
    monkeypatch.setenv('LVLM_FIGURES', str(tmp_path / 'drawn'))
    assert study_figures_dir() == tmp_path / 'drawn'
    shutil.copy(ROOT / 'nbs' / 'results' / 'importance.jsonl', tmp_path)
    assert draw_study('quick', tmp_path / 'here') == [tmp_path / 'here' / 'study-layer-influence.png']
    assert not (tmp_path / 'drawn' / 'study-layer-influence.png').exists()


def test_the_models_that_are_named_are_drawn_and_compared(tmp_path):
    drawn = draw_study('quick', tmp_path, ['smol-llava'])
    assert [p.stem for p in drawn] == ['study-layer-influence', 'retention', 'study-abilities']
    keys = {name: set(compare_results('quick', models=[name]).run) for name in ('smol-llava', 'tiny-llava')}
    assert all(map(len, keys.values())) and not keys['smol-llava'] & keys['tiny-llava']


@pytest.mark.parametrize('preset', PRESETS)
def test_stored_rows_belong_to_the_grid(preset):
    "The key of every run of a preset that is stored names a row of the very same run."
    for run in run_grid(preset):
        row = read_rows(run.experiment).get(run.key)
        assert row is None or row['run'] == asdict(run)


def test_out_of_time_computes_nothing():
    with temporary_results():
        assert run_all(run_grid('smoke'), minutes=1e-9, log=lambda s: None)['left'] == len(run_grid('smoke'))


@pytest.mark.parametrize('how', LAYER_CHOICES)
@pytest.mark.parametrize('ratio', [0.05, 0.15, 0.3, 0.45, 0.6, 0.8])
def test_actual_ratio_is_the_nearest(scores, how, ratio):
    s = scores.meta['sizes']
    plan = layer_plan(scores, ratio, how)
    others = [sum(s['layers'][i] for i in LAYER_CHOICES[how](scores, k)) / s['lm'] for k in range(plan.num_layers)]
    assert abs(plan.shares['lm'] - ratio) <= min(abs(o - ratio) for o in others) + 1e-12


def test_pruned_equals_zeroed_layers(lvlm, rows, scores):
    "A layer whose two output projections are zero adds nothing: removing it must give the same logits."
    import copy

    plan, batch = layer_plan(scores, 0.3), Collator(lvlm)(rows)
    zeroed = copy.deepcopy(lvlm.model)
    for i in plan.removed:
        b = zeroed.model.language_model.layers[i]
        b.self_attn.o_proj.weight.data.zero_()
        b.mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        assert torch.allclose(zeroed(**batch).logits, apply_plan(lvlm, plan).model(**batch).logits, atol=1e-5)


STOCK = """import sys, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
m = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
AutoProcessor.from_pretrained(sys.argv[1])
b,p = torch.load(sys.argv[2], weights_only=True)
say = lambda cache: m.generate(**p, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=cache)
with torch.no_grad(): logits = m(**b).logits
torch.save([logits, say(True), say(False)], sys.argv[3])
assert not [n for n in sys.modules if n.startswith('lvlm_study')]"""


def test_stock_transformers_loads_it(lvlm, rows, scores, tmp_path):
    student = apply_plan(lvlm, layer_plan(scores, 0.3))
    batch, prompt = Collator(lvlm)(rows), Collator(lvlm, prompt=True)(rows)
    torch.save([batch, prompt], tmp_path / 'in.pt')
    folder = save_lvlm(student, tmp_path / 'student')
    run = subprocess.run(
        [sys.executable, '-c', STOCK, folder, tmp_path / 'in.pt', tmp_path / 'out.pt'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-500:]
    logits, cached, plain = torch.load(tmp_path / 'out.pt', weights_only=True)
    with torch.no_grad():
        assert torch.equal(logits, student.model(**batch).logits)
    assert torch.equal(cached, plain)
    assert doctor(folder).ok.all()
    assert load_lvlm(folder).plan['layers'] == list(layer_plan(scores, 0.3).layers)


def test_half_written_folder_is_not_a_checkpoint(lvlm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(lvlm.tokenizer), 'save_pretrained', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        save_lvlm(lvlm, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_doctor_finds_a_pickle(lvlm, tmp_path):
    folder = save_lvlm(lvlm, tmp_path / 'm')
    torch.save({}, folder / 'extra.bin')
    report = doctor(folder)
    assert report[~report.ok].detail.tolist() == ['extra.bin']


def truncated(lvlm, folder):
    w = save_lvlm(lvlm, folder) / 'model.safetensors'
    w.write_bytes(w.read_bytes()[:-100])
    return load_lvlm(folder)


def missing_key(lvlm, folder):
    from safetensors.torch import load_file, save_file

    w = save_lvlm(lvlm, folder) / 'model.safetensors'
    t = load_file(w)
    t.pop(sorted(t)[5])
    save_file(t, w, metadata=dict(format='pt'))
    return load_lvlm(folder)


def wrong_size(lvlm, folder):
    c = save_lvlm(lvlm, folder) / 'config.json'
    d = json.loads(c.read_text())
    d['text_config']['intermediate_size'] = 400
    c.write_text(json.dumps(d))
    return load_lvlm(folder)


def unknown_type(lvlm, folder):
    c = save_lvlm(lvlm, folder) / 'config.json'
    c.write_text(json.dumps(json.loads(c.read_text()) | dict(model_type='lava')))
    return load_lvlm(folder)


def broken_image(lvlm, folder):
    folder.mkdir()
    (folder / 'a.png').write_bytes(b'no picture')
    (folder / 't.json').write_text(
        json.dumps(
            [
                dict(
                    id='x7',
                    image='a.png',
                    conversations=[{'from': 'human', 'value': '<image>\nHow?'}, {'from': 'gpt', 'value': 'So'}],
                )
            ]
        )
    )
    return recover(lvlm, load_llava_json(folder / 't.json', folder), 'sft', progress=False)


def no_answers(lvlm, folder):
    return recover(
        lvlm,
        datasets.Dataset.from_list(
            [dict(id='c', images=[Image.new('RGB', (80, 80))], messages=prompt_and_answer('<image>\nRed?'))],
            features=CONVERSATION_FEATURES,
        ),
        'sft',
        progress=False,
    )


BAD = dict(
    ratio_above_one=(lambda m, s, d: layer_plan(s, 1.2), '1.2'),
    ratio_in_percent=(lambda m, s, d: layer_plan(s, 30), '30'),
    ratio_as_text=(lambda m, s, d: layer_plan(s, '30%'), "'30%'"),
    no_layer_left=(lambda m, s, d: Plan.of(m, layers=[]), 'no layer left'),
    unknown_layer=(lambda m, s, d: Plan.of(m, layers=[0, 12]), '12'),
    plan_of_another_model=(
        lambda m, s, d: apply_plan(apply_plan(m, layer_plan(s, 0.3)), layer_plan(s, 0.3)),
        '12 layers',
    ),
    no_checkpoint=(lambda m, s, d: load_lvlm(d), 'config.json'),
    no_such_model=(lambda m, s, d: load_lvlm('tiny-lava'), 'tiny-lava'),
    truncated=(lambda m, s, d: truncated(m, d / 'm'), 'truncated'),
    missing_key=(lambda m, s, d: missing_key(m, d / 'm'), 'missing'),
    wrong_size=(lambda m, s, d: wrong_size(m, d / 'm'), 'config'),
    unknown_type=(lambda m, s, d: unknown_type(m, d / 'm'), 'lava'),
    folder_in_use=(lambda m, s, d: save_lvlm(m, d), 'exists'),
    broken_image=(lambda m, s, d: broken_image(m, d / 'm'), 'x7'),
    no_answers=(lambda m, s, d: no_answers(m, d), "'c'"),
    unknown_suite=(lambda m, s, d: evaluate(m, 'smal', progress=False), 'smal'),
    unknown_criterion=(lambda m, s, d: score(m, [1], criteria=('taylr',)), 'taylr'),
    no_calibration=(lambda m, s, d: score(m, []), 'at least one'),
    fraction_zero=(lambda m, s, d: nested_subset(10, 0), '0'),
    unknown_preset=(lambda m, s, d: run_grid('quik'), 'quik'),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence(lvlm, scores, tmp_path, name):
    call, says = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as e:
        call(lvlm, scores, tmp_path)
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400, str(e.value)


def test_command_line(tmp_path):
    command = [sys.executable, '-m', 'lvlm_study.study.cli', 'show', '--preset', 'quik']
    bad = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode != 0 and 'take one of quick' in bad.stderr and 'Traceback' not in bad.stderr


def test_test_pictures_were_never_trained_on():
    "No picture of the suite is in the training or the recovery set, seen as pixels."
    import hashlib

    def h(im):
        return hashlib.sha256(im.tobytes()).hexdigest()

    test = {h(r[0]) for r in small_suite()['images']}
    assert not test & {h(r[0]) for r in instructions('recovery')['images']}


STORED = [r for r in read_rows('importance').values() if r['run']['purpose'] == '' and 'metrics' in r]
CANARY = 'tiny-gqa'  # The model whose scores are made again each time; the others with --slow


@pytest.mark.parametrize(
    'row',
    [pytest.param(r, marks=() if r['run']['model'] == CANARY else pytest.mark.slow) for r in STORED],
    ids=[f'{r["run"]["model"]}-{r["run"]["criterion"] or "all"}' for r in STORED],
)
def test_stored_scores_can_be_made_again(row):
    "The canary: what is stored for the scores comes out again on this machine."
    assert run_importance(Run(**row['run']))['curves']['bi'] == pytest.approx(row['curves']['bi'], rel=1e-3)


@pytest.mark.parametrize('bench', ['MMMU', 'SQA', 'AI2D'])
def test_letters_are_balanced(bench):
    "In each subtask no letter is right more than one time too often."
    rows = [r for r in small_suite().remove_columns(['images', 'messages']) if r['benchmark'] == bench]
    for sub in {r['subtask'] for r in rows}:
        part = [r for r in rows if r['subtask'] == sub]
        n = len(part[0]['options'])
        counts = [sum(r['answer'] == l for r in part) for l in 'ABCD'[:n]]
        assert max(counts) - min(counts) <= 1, (sub, counts)
