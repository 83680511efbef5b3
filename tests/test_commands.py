"""The commands as a shell calls them.

All of them on a checkpoint in LLaVA's original layout, exit status, and one sentence on bad input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import published
import pytest
from guards import ROOT
from originals import write_llava

from lvlm_study.importance.importance import CRITERION_NEEDS
from lvlm_study.recovery.losses import RECIPES, TRAINABLE
from lvlm_study.study import cli as commands
from lvlm_study.study.runner import PRESETS
from lvlm_study.models.loading import MissingProcessor, load_lvlm
from lvlm_study.data.toy_benchmarks import instructions

COMMANDS = ['lvlm_score', 'lvlm_prune', 'lvlm_recover', 'lvlm_evaluate', 'lvlm_doctor', 'lvlm_export']


@pytest.fixture(scope='module')
def d(tmp_path_factory):
    "A folder with a tiny checkpoint as LLaVA-v1.5 was published, and forty conversations in LLaVA's form"
    d = tmp_path_factory.mktemp('walk')
    write_llava(d / 'llava')
    (d / 'pictures').mkdir()
    rows = instructions('recovery', 40)
    for r in rows:
        r['images'][0].resize((40, 28)).save(d / 'pictures' / f'{r["id"]}.png')

    def talk(ms):
        return [{'from': 'human' if m['role'] == 'user' else 'gpt', 'value': m['content']} for m in ms[:2]]

    (d / 'train.json').write_text(
        json.dumps([dict(id=r['id'], image=f'{r["id"]}.png', conversations=talk(r['messages'])) for r in rows])
    )
    return d


def test_walk_through(d, run, monkeypatch):
    "Score, prune, recover on 5 %, evaluate, examine: each first as a dry run"
    monkeypatch.chdir(d)
    data = '--data', 'train.json', '--images', 'pictures'
    steps = [
        ('lvlm_score', 'llava', 'scores', *data, '--samples', 4, '--device', 'cpu'),
        ('lvlm_prune', 'llava', 'pruned', '--scores', 'scores', '--ratio', 0.3),
        (
            'lvlm_recover',
            'pruned',
            'recovered',
            *data,
            '--teacher',
            'llava',
            '--recipe',
            'sft+hidden',
            '--fraction',
            0.05,
        ),
        ('lvlm_evaluate', 'recovered/model', '--limit', 1, '--records', 'recovered.parquet', '--device', 'cpu'),
    ]
    results = {}
    for command, *words in steps:
        before = sorted(p.name for p in d.iterdir())
        status, out, err = run(command, *words, '--dry_run', '--json')
        assert status == 0 and sorted(p.name for p in d.iterdir()) == before, (command, err)
        dry = json.loads(out)
        assert command == 'lvlm_prune' or dry['seconds_at_least'] > 0 and dry['tokens'] > 0
        status, out, err = run(command, *words, '--json')
        assert status == 0, (command, err)
        results[command] = json.loads(out)
    assert results['lvlm_recover']['samples'] == 2 and len(results['lvlm_evaluate']['table']) == 9
    assert results['lvlm_prune']['parameters'] == sum(
        p.numel() for p in load_lvlm('recovered/model').model.parameters()
    )
    status, out, _ = run('lvlm_doctor', 'recovered/model', '--json')
    assert status == 0 and json.loads(out)['ok']
    assert run('lvlm_prune', 'llava', 'pruned', '--scores', 'scores')[::2] == (
        2,
        'lvlm_prune: pruned exists already: choose another place, or say --force\n',
    )
    assert run('lvlm_prune', 'llava', 'pruned', '--scores', 'scores', '--force')[0] == 0


def rights(path):
    "Who may read and write a file."
    return oct(path.stat().st_mode & 0o777)


@pytest.mark.parametrize('name', ['llava_15', 'gemma3', 'llava_next'])
def test_published_checkpoints_follow_the_hints(name, d, run, tmp_path, monkeypatch):
    "Score, prune with repair, recover, by the lines that commands ended with; then ask and examine."
    monkeypatch.chdir(tmp_path)
    folder = published.publish(name, tmp_path / 'a checkpoint')
    if isinstance(load_lvlm(folder).processor, MissingProcessor):
        pytest.skip('its processor needs torchvision')
    shutil.copytree(d / 'pictures', tmp_path / 'my pictures')
    shutil.copy(d / 'train.json', tmp_path)
    words = ['lvlm_score', 'a checkpoint', 'scores', '--data', 'train.json', '--images', 'my pictures']
    words += ['--samples', 4, '--device', 'cpu']
    recover = ['lvlm_recover', 'pruned', 'recovered', '--teacher', 'a checkpoint', '--recipe', 'sft+hidden']
    for command in ('lvlm_score', 'lvlm_prune', 'lvlm_recover'):
        assert words[0] == command
        status, out, err = run(*words, '--json')
        assert status == 0, (command, err)
        words = shlex.split(json.loads(out)['next'])
        repaired = json.loads(out).get('repaired_on')
        if command == 'lvlm_prune' and repaired:
            assert words[:2] == ['lvlm_evaluate', 'pruned']  # Worth asking before any training
            words = [*recover, '--data', 'train.json', '--images', 'my pictures']
    assert words[:2] == ['lvlm_evaluate', 'recovered/model'] and json.loads(out)['samples'] == 2
    status, out, err = run(*words, '--limit', 1, '--device', 'cpu', '--json')
    assert status == 0 and len(json.loads(out)['table']) == 9, err
    status, out, err = run('lvlm_doctor', 'recovered/model', '--json')
    assert status == 0, out
    mask = os.umask(0)
    os.umask(mask)
    files = [p for p in tmp_path.rglob('*.safetensors') if 'a checkpoint' not in p.parts]
    assert len(files) >= 3 and {rights(p) for p in files} == {oct(0o666 & ~mask)}


def test_a_dry_run_ends_with_the_same_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['lvlm_score', 'tiny-llava', 'my scores', '--samples', '2', '--criteria', 'bi', '--device', 'cpu']
    status, out, _ = run(*words, '--dry_run', '--json')
    line = json.loads(out)['next']
    assert status == 0 and shlex.split(line)[:3] == words[:3] and 'dry_run' not in line and '...' not in line
    status, out, err = run(*shlex.split(line), '--json')
    assert status == 0 and json.loads(out)['written'] == 'my scores.safetensors', err


def test_doctor_knows_study_models_by_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run('lvlm_doctor', 'tiny-llava', '--json')
    assert status == 0 and json.loads(out)['ok'] and json.loads(out)['next'].startswith('lvlm_evaluate tiny-llava')


BAD = [
    (('lvlm_score', 'nothing-here', 's', '--samples', '2'), 'neither a study model'),
    (('lvlm_score', 'tiny-llava', 's', '--data', 'gone.json'), 'is no data'),
    (('lvlm_score', 'tiny-llava', 's', '--criteria', 'fame'), 'unknown criterion'),
    (('lvlm_score', 'tiny-llava', 's', '--samples', '-3'), 'a whole number of samples'),
    (('lvlm_prune', 'tiny-llava', 'p'), 'either --scores'),
    (('lvlm_prune', 'tiny-llava', 'p', '--scores', 'gone'), 'gone.safetensors is not there'),
    (('lvlm_prune', 'tiny-llava', 'p', '--plan', 'gone.json'), 'gone.json'),
    (('lvlm_recover', 'tiny-llava', 'r', '--recipe', 'prayer'), 'there is no recipe'),
    (('lvlm_recover', 'tiny-llava', 'r', '--recipe', 'hidden'), 'name it with --teacher'),
    (('lvlm_recover', 'tiny-llava', 'r', '--fraction', '5', '--dry_run'), 'fraction'),
    (('lvlm_evaluate', 'tiny-llava', '--suite', 'popes', '--device', 'cpu'), 'there is no suite'),
    (('lvlm_evaluate', 'tiny-llava', '--limit', '-1'), 'limit is a number'),
    (('lvlm_evaluate', 'tiny-llava', '--dtype', 'int4'), 'dtype is float32'),
]


@pytest.mark.parametrize('words,why', BAD, ids=lambda o: ' '.join(o) if isinstance(o, tuple) else '')
def test_bad_input(words, why, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*words)
    assert status == 2 and out == '' and why in err and err.startswith(words[0] + ': ') and err.count('\n') == 1, err
    assert not list(tmp_path.iterdir()), 'something was written'


@pytest.mark.parametrize('command', COMMANDS)
def test_help(command, run, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    status, out, _ = run(command, '--help')
    assert status == 0 and 'Example: ' + command in ' '.join(out.split()) and '--json' in out
    assert '--force' in out and '--dry_run' in out or command in ('lvlm_doctor', 'lvlm_export')


def help_of(option, text):
    "The words behind an option in a help text"
    return ' '.join(re.search(rf'\n  --{option} \S+ +(.*?)(?=\n  --|\Z)', text, re.S)[1].split())


def test_help_names_what_is_accepted(run, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    recover, score, evaluate = (run(c, '--help')[1] for c in ('lvlm_recover', 'lvlm_score', 'lvlm_evaluate'))
    trainable = help_of('trainable', recover).partition(':')[2].partition('(')[0]
    assert set(re.split(r', | or ', trainable.strip())) == set(TRAINABLE)
    recipes = help_of('recipe', recover).partition(' (')[0].split(', ')
    assert recipes[-1] == '...' and set(recipes[:-1]) <= set(RECIPES)
    criteria = help_of('criteria', score).partition(':')[2].partition('(')[0].strip().split(', ')
    assert set(criteria) == set(CRITERION_NEEDS)
    suites = help_of('suite', evaluate).partition('(')[0].strip()
    assert set(re.findall(r'[a-z0-9-]{3,}', suites)) - {'benchmark', 'all'} == set(commands.SUITES) - {'mme-c', 'mme-p'}
    presets = help_of('preset', run('study_command', '--help')[1]).partition('(')[0].strip()
    assert set(re.split(r', | or ', presets)) == set(PRESETS)


RENAMED = [
    ('lvlm_recover', ('tiny-llava', 'r', '--trains', 'projector'), '--trains', '--trainable'),
    ('lvlm_recover', ('tiny-llava', 'r', '--trains=projector'), '--trains', '--trainable'),
    ('lvlm_recover', ('--trains', 'projector', 'tiny-llava', 'r'), '--trains', '--trainable'),
    ('lvlm_evaluate', ('tiny-llava', '--blind'), '--blind', '--no_images'),
]


@pytest.mark.parametrize('command,words,old,new', RENAMED)
def test_old_option_is_refused_with_the_new_name(command, words, old, new, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command, *words) == (2, '', f'{command}: {old} is called {new} now\n')
    assert not list(tmp_path.iterdir())


def test_every_renamed_option_is_tested_and_new_names_exist(run, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    assert {old for _, _, old, _ in RENAMED} == {f'--{o}' for o in commands.RENAMED_OPTIONS}
    for command, _, old, new in RENAMED:
        text = run(command, '--help')[1]
        assert f'{new} ' in text and f'{old} ' not in text


@pytest.mark.parametrize(
    'words', [('lvlm_doctor', 'x', '--color'), ('lvlm_doctor', 'x', 'y'), ('study_command', 'show', 'y')]
)
def test_unknown_words_are_refused(words, run):
    status, out, err = run(*words)
    name = 'lvlm_study' if words[0] == 'study_command' else words[0]
    assert (status, out) == (2, '') and err == f'{name}: {words[-1]} is not known here: --help lists the options\n'


def test_real_suites_have_names():
    assert {'pope', 'gqa', 'mme', 'nine'} <= set(commands.SUITES)


def test_scripts_are_installed():
    scripts = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['scripts']
    assert scripts == {c: f'lvlm_study.study.cli:{c}' for c in COMMANDS} | dict(
        lvlm_study='lvlm_study.study.cli:study_command'
    )


def test_a_script_ends_with_the_status(tmp_path):
    "A real process, with the lines that pip writes"
    (tmp_path / 'lvlm_doctor').write_text(
        "import sys\nfrom lvlm_study.study.cli import lvlm_doctor\nif __name__=='__main__': sys.exit(lvlm_doctor())\n"
    )
    res = subprocess.run(
        [sys.executable, tmp_path / 'lvlm_doctor', tmp_path / 'nowhere', '--json'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert res.returncode == 1 and json.loads(res.stdout)['ok'] is False, res.stderr
