"The whole loop on a few questions, the saved model in a process that never heard of us, and ten bad inputs."
import json
import subprocess
import sys
import datasets
import pytest
import torch
from PIL import Image
from lvlm_study.core import Run, read_rows, temporary_results
from lvlm_study.data import FEATURES, Collator, ask, load_llava_json, subset
from lvlm_study.evaluation import evaluate
from lvlm_study.importance import score
from lvlm_study.layer_pruning import CHOICES, layer_plan
from lvlm_study.models import load_lvlm, save_lvlm
from lvlm_study.recovery import recover
from lvlm_study.study import differences, draw_all, grid, run_all, summary
from lvlm_study.suite import instructions, small_suite
from lvlm_study.surgery import Plan, apply_plan, doctor

@pytest.fixture(scope='module')
def lvlm(): return load_lvlm('tiny-llava')

@pytest.fixture(scope='module')
def rows(): return instructions('recovery', 8)

@pytest.fixture(scope='module')
def scores(lvlm, rows): return score(lvlm, rows)

def test_smoke_study(tmp_path, monkeypatch):
    monkeypatch.setenv('LVLM_FIGURES', str(tmp_path))
    with temporary_results():
        runs = grid('smoke')
        first,second = run_all(runs, say=lambda s: None), run_all(runs, say=lambda s: None)
        assert first==dict(computed=len(runs), stored=0, failed=0, left=0) and second==dict(computed=0, stored=len(runs), failed=0, left=0)
        table = summary('smoke')
        assert len(table)==len(runs)-1 and table.retention.iloc[0]==100 and (table.low<=table.retention).all() and (table.retention<=table.high).all()
        drawn = draw_all('smoke')
        assert differences('smoke', other='nowhere').empty
    assert sorted(drawn)==sorted(p.stem for p in tmp_path.glob('*.png')) and len(drawn)==3

def test_out_of_time_computes_nothing():
    with temporary_results(): assert run_all(grid('smoke'), minutes=1e-9, say=lambda s: None)['left'] == len(grid('smoke'))

@pytest.mark.parametrize('how', CHOICES)
@pytest.mark.parametrize('ratio', [.05, .15, .3, .45, .6, .8])
def test_realised_ratio_is_the_nearest(scores, how, ratio):
    s = scores.meta['sizes']
    plan = layer_plan(scores, ratio, how)
    others = [sum(s['blocks'][i] for i in CHOICES[how](scores, k))/s['lm'] for k in range(plan.depth)]
    assert abs(plan.realised['lm']-ratio) <= min(abs(o-ratio) for o in others)+1e-12

def test_pruned_equals_zeroed_blocks(lvlm, rows, scores):
    "A block whose two output projections are zero adds nothing: removing it must give the same logits."
    import copy
    plan,batch = layer_plan(scores, .3), Collator(lvlm)(rows)
    zeroed = copy.deepcopy(lvlm.model)
    for i in plan.removed:
        b = zeroed.model.language_model.layers[i]
        b.self_attn.o_proj.weight.data.zero_(); b.mlp.down_proj.weight.data.zero_()
    with torch.no_grad(): assert torch.allclose(zeroed(**batch).logits, apply_plan(lvlm, plan).model(**batch).logits, atol=1e-5)

STOCK = '''import sys, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
m = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
AutoProcessor.from_pretrained(sys.argv[1])
b,p = torch.load(sys.argv[2], weights_only=True)
say = lambda cache: m.generate(**p, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=cache)
with torch.no_grad(): logits = m(**b).logits
torch.save([logits, say(True), say(False)], sys.argv[3])
assert not [n for n in sys.modules if n.startswith('lvlm_study')]'''

def test_stock_transformers_loads_it(lvlm, rows, scores, tmp_path):
    student = apply_plan(lvlm, layer_plan(scores, .3))
    batch,prompt = Collator(lvlm)(rows), Collator(lvlm, prompt=True)(rows)
    torch.save([batch, prompt], tmp_path/'in.pt'); folder = save_lvlm(student, tmp_path/'student')
    run = subprocess.run([sys.executable, '-c', STOCK, folder, tmp_path/'in.pt', tmp_path/'out.pt'], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode==0, run.stderr[-500:]
    logits,cached,plain = torch.load(tmp_path/'out.pt', weights_only=True)
    with torch.no_grad(): assert torch.equal(logits, student.model(**batch).logits)
    assert torch.equal(cached, plain)
    assert doctor(folder).attrs['ok']
    assert load_lvlm(folder).plan['blocks']==list(layer_plan(scores, .3).blocks)

def test_half_written_folder_is_not_a_checkpoint(lvlm, tmp_path, monkeypatch):
    monkeypatch.setattr(type(lvlm.tokenizer), 'save_pretrained', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): save_lvlm(lvlm, tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_doctor_finds_a_pickle(lvlm, tmp_path):
    folder = save_lvlm(lvlm, tmp_path/'m'); torch.save({}, folder/'extra.bin')
    report = doctor(folder)
    assert not report.attrs['ok'] and report[~report.ok].detail.tolist()==['extra.bin']

def truncated(lvlm, folder):
    w = save_lvlm(lvlm, folder)/'model.safetensors'; w.write_bytes(w.read_bytes()[:-100])
    return load_lvlm(folder)

def missing_key(lvlm, folder):
    from safetensors.torch import load_file, save_file
    w = save_lvlm(lvlm, folder)/'model.safetensors'; t = load_file(w); t.pop(sorted(t)[5]); save_file(t, w, metadata=dict(format='pt'))
    return load_lvlm(folder)

def wrong_size(lvlm, folder):
    c = save_lvlm(lvlm, folder)/'config.json'; d = json.loads(c.read_text()); d['text_config']['intermediate_size'] = 400; c.write_text(json.dumps(d))
    return load_lvlm(folder)

def unknown_type(lvlm, folder):
    c = save_lvlm(lvlm, folder)/'config.json'; c.write_text(json.dumps(json.loads(c.read_text()) | dict(model_type='lava')))
    return load_lvlm(folder)

def broken_image(lvlm, folder):
    folder.mkdir(); (folder/'a.png').write_bytes(b'no picture'); (folder/'t.json').write_text(json.dumps([dict(id='x7', image='a.png', conversations=[{'from':'human', 'value':'<image>\nHow?'}, {'from':'gpt', 'value':'So'}])]))
    return recover(lvlm, load_llava_json(folder/'t.json', folder), 'sft', progress=False)

def no_answers(lvlm, folder): return recover(lvlm, datasets.Dataset.from_list([dict(id='c', images=[Image.new('RGB', (80,80))], messages=ask('<image>\nRed?'))], features=FEATURES), 'sft', progress=False)

BAD = dict(
    ratio_above_one=(lambda m, s, d: layer_plan(s, 1.2), '1.2'), ratio_in_percent=(lambda m, s, d: layer_plan(s, 30), '30'), ratio_as_text=(lambda m, s, d: layer_plan(s, '30%'), "'30%'"),
    no_block_left=(lambda m, s, d: Plan.of(m, blocks=[]), 'no block left'), unknown_block=(lambda m, s, d: Plan.of(m, blocks=[0, 12]), '12'),
    plan_of_another_model=(lambda m, s, d: apply_plan(apply_plan(m, layer_plan(s, .3)), layer_plan(s, .3)), '12 blocks'),
    no_checkpoint=(lambda m, s, d: load_lvlm(d), 'config.json'), no_such_model=(lambda m, s, d: load_lvlm('tiny-lava'), 'tiny-lava'), truncated=(lambda m, s, d: truncated(m, d/'m'), 'truncated'),
    missing_key=(lambda m, s, d: missing_key(m, d/'m'), 'missing'), wrong_size=(lambda m, s, d: wrong_size(m, d/'m'), 'config'), unknown_type=(lambda m, s, d: unknown_type(m, d/'m'), 'lava'),
    folder_in_use=(lambda m, s, d: save_lvlm(m, d), 'exists'), broken_image=(lambda m, s, d: broken_image(m, d/'m'), 'x7'), no_answers=(lambda m, s, d: no_answers(m, d), "'c'"),
    unknown_suite=(lambda m, s, d: evaluate(m, 'smal', progress=False), 'smal'), unknown_criterion=(lambda m, s, d: score(m, [1], criteria=('taylr',)), 'taylr'),
    no_calibration=(lambda m, s, d: score(m, []), 'at least one'), fraction_zero=(lambda m, s, d: subset(10, 0), '0'), unknown_preset=(lambda m, s, d: grid('quik'), 'quik'))

@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_clear_sentence(lvlm, scores, tmp_path, name):
    call,says = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as e: call(lvlm, scores, tmp_path)
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value))<400, str(e.value)

def test_command_line(tmp_path):
    run = lambda *a: subprocess.run([sys.executable, '-m', 'lvlm_study.study', *a], capture_output=True, text=True, cwd=tmp_path)
    bad,help = run('show', '--preset', 'quik'), run('--help')
    assert bad.returncode!=0 and 'take one of quick' in bad.stderr and 'Traceback' not in bad.stderr
    assert help.returncode==0 and 'run, draw, show or check' in help.stdout

def test_test_pictures_were_never_trained_on():
    "No picture of the suite is in the training or the recovery set, seen as pixels."
    import hashlib
    h = lambda im: hashlib.sha256(im.tobytes()).hexdigest()
    test = {h(r[0]) for r in small_suite()['images']}
    assert not test & {h(r[0]) for r in instructions('recovery')['images']}

def test_stored_scores_can_be_made_again():
    "The canary: what is stored for the scores comes out again on this machine."
    from lvlm_study.study import run_importance
    stored = [r for r in read_rows('importance').values() if r['run']['note']=='' and 'metrics' in r]
    if not stored: pytest.skip('no stored scores yet')
    for r in stored: assert run_importance(Run(**r['run']))['curves']['bi']==pytest.approx(r['curves']['bi'], rel=1e-3)

@pytest.mark.parametrize('bench', ['MMMU', 'SQA', 'AI2D'])
def test_letters_are_balanced(bench):
    "In each subtask no letter is right more than one time too often."
    rows = [r for r in small_suite().remove_columns(['images', 'messages']) if r['benchmark']==bench]
    for sub in {r['subtask'] for r in rows}:
        part = [r for r in rows if r['subtask']==sub]; n = len(part[0]['options'])
        counts = [sum(r['answer']==l for r in part) for l in 'ABCD'[:n]]
        assert max(counts)-min(counts) <= 1, (sub, counts)
