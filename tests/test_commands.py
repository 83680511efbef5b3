"The commands as a shell calls them: a rehearsal of all verbs on a checkpoint in LLaVA's original layout, exit status, one sentence on bad input."
import json, subprocess, sys, tomllib
import pytest
from fastcore.script import _run_cli
from guards import ROOT
from originals import write_llava
from lvlm_study import commands
from lvlm_study.models import load_lvlm
from lvlm_study.suite import instructions

VERBS = ['lvlm_score', 'lvlm_prune', 'lvlm_recover', 'lvlm_evaluate', 'lvlm_doctor']

@pytest.fixture
def run(monkeypatch, capsys):
    "Call a verb as its script does: (status, standard output, standard error)"
    def f(verb, *words):
        monkeypatch.setattr(sys, 'argv', [verb, *map(str, words)])
        capsys.readouterr()
        try: status = _run_cli(getattr(commands, verb).__wrapped__, False)
        except SystemExit as e: status = e.code
        got = capsys.readouterr()
        return status, got.out, got.err
    return f

@pytest.fixture(scope='module')
def d(tmp_path_factory):
    "A folder with a tiny checkpoint as LLaVA-v1.5 was published, and forty conversations in LLaVA's form"
    d = tmp_path_factory.mktemp('walk'); write_llava(d/'llava')
    (d/'pictures').mkdir(); rows = instructions('recovery', 40)
    for r in rows: r['images'][0].resize((40, 28)).save(d/'pictures'/f"{r['id']}.png")
    talk = lambda ms: [{'from': 'human' if m['role']=='user' else 'gpt', 'value': m['content']} for m in ms[:2]]
    (d/'train.json').write_text(json.dumps([dict(id=r['id'], image=f"{r['id']}.png", conversations=talk(r['messages'])) for r in rows]))
    return d

def test_walk_through(d, run, monkeypatch):
    "Score, prune, recover on 5 %, evaluate, examine: each first as a dry run"
    monkeypatch.chdir(d)
    data = '--data', 'train.json', '--images', 'pictures'
    steps = [('lvlm_score', 'llava', 'scores', *data, '--samples', 4, '--device', 'cpu'),
        ('lvlm_prune', 'llava', 'pruned', '--scores', 'scores', '--ratio', .3),
        ('lvlm_recover', 'pruned', 'healed', *data, '--teacher', 'llava', '--recipe', 'sft+hidden', '--fraction', .05),
        ('lvlm_evaluate', 'healed/model', '--limit', 1, '--records', 'healed.parquet', '--device', 'cpu')]
    said = {}
    for verb,*words in steps:
        before = sorted(p.name for p in d.iterdir())
        status,out,err = run(verb, *words, '--dry_run', '--json')
        assert status==0 and sorted(p.name for p in d.iterdir())==before, (verb, err)
        dry = json.loads(out); assert verb=='lvlm_prune' or dry['seconds_at_least']>0 and dry['tokens']>0
        status,out,err = run(verb, *words, '--json')
        assert status==0, (verb, err)
        said[verb] = json.loads(out)
    assert said['lvlm_recover']['samples']==2 and len(said['lvlm_evaluate']['table'])==9
    assert said['lvlm_prune']['parameters'] == sum(p.numel() for p in load_lvlm('healed/model').model.parameters())
    status,out,_ = run('lvlm_doctor', 'healed/model', '--json')
    assert status==0 and json.loads(out)['ok']
    assert run('lvlm_prune', 'llava', 'pruned', '--scores', 'scores')[::2] == (2, 'lvlm_prune: pruned exists already: choose another place, or say --force\n')
    assert run('lvlm_prune', 'llava', 'pruned', '--scores', 'scores', '--force')[0]==0

BAD = [(('lvlm_score', 'nothing-here', 's', '--samples', '2'), 'neither a study model'), (('lvlm_score', 'tiny-llava', 's', '--data', 'gone.json'), 'is no data'),
    (('lvlm_score', 'tiny-llava', 's', '--criteria', 'fame'), 'unknown criterion'), (('lvlm_score', 'tiny-llava', 's', '--samples', '-3'), 'a number of samples'),
    (('lvlm_prune', 'tiny-llava', 'p'), 'either --scores'), (('lvlm_prune', 'tiny-llava', 'p', '--scores', 'gone'), 'gone.safetensors is not there'),
    (('lvlm_prune', 'tiny-llava', 'p', '--plan', 'gone.json'), 'gone.json'), (('lvlm_recover', 'tiny-llava', 'r', '--recipe', 'prayer'), 'there is no recipe'),
    (('lvlm_recover', 'tiny-llava', 'r', '--recipe', 'hidden'), 'name it with --teacher'), (('lvlm_recover', 'tiny-llava', 'r', '--fraction', '5', '--dry_run'), 'fraction'),
    (('lvlm_evaluate', 'tiny-llava', '--suite', 'popes', '--device', 'cpu'), 'there is no suite'), (('lvlm_evaluate', 'tiny-llava', '--limit', '-1'), 'limit is a number'),
    (('lvlm_evaluate', 'tiny-llava', '--dtype', 'int4'), 'dtype is float32')]

@pytest.mark.parametrize('words,why', BAD, ids=lambda o: ' '.join(o) if isinstance(o, tuple) else '')
def test_bad_input(words, why, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status,out,err = run(*words)
    assert status==2 and out=='' and why in err and err.startswith(words[0]+': ') and err.count('\n')==1, err
    assert not list(tmp_path.iterdir()), 'something was written'

@pytest.mark.parametrize('verb', VERBS)
def test_help(verb, run, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    status,out,_ = run(verb, '--help')
    assert status==0 and 'Example: '+verb in ' '.join(out.split()) and '--json' in out
    assert '--force' in out and '--dry_run' in out or verb=='lvlm_doctor'

def test_real_suites_have_names(): assert {'pope', 'gqa', 'mme', 'nine'} <= set(commands.SUITES)

def test_scripts_are_installed():
    made = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts']
    assert {v: f'lvlm_study.commands:{v}' for v in VERBS}.items() <= made.items()

def test_a_script_ends_with_the_status(tmp_path):
    "A real process, with the lines that pip writes"
    (tmp_path/'lvlm_doctor').write_text("import sys\nfrom lvlm_study.commands import lvlm_doctor\nif __name__=='__main__': sys.exit(lvlm_doctor())\n")
    res = subprocess.run([sys.executable, tmp_path/'lvlm_doctor', tmp_path/'nowhere', '--json'], capture_output=True, text=True, cwd=ROOT)
    assert res.returncode==1 and json.loads(res.stdout)['ok'] is False, res.stderr
