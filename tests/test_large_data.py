"""Conversations of any number are converted in a stream, and nothing that cannot be used slips in."""

import json
import subprocess
import sys
import pytest
from PIL import Image
from lvlm_study.data.instruction_data import read_llava_json
from lvlm_study.data.large_data import convert_llava_json, iterate_json_list, open_converted

GROWTH = """
import json, sys, time
from pathlib import Path
from lvlm_study.data.large_data import convert_llava_json
def status(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1]) / 1024
folder, n = Path(sys.argv[1]), int(sys.argv[2])
turns = [{'from': 'human', 'value': '<image>\\nWhat is it?' + ' word' * 100}, {'from': 'gpt', 'value': 'A cat.' * 60}]
with open(folder / 'big.json', 'w') as f:
    f.write('[')
    for i in range(n):
        f.write((',' if i else '') + json.dumps(dict(id=i, image='a.png', conversations=turns)))
    f.write(']')
before, t = status('VmHWM'), time.process_time()
data = convert_llava_json(folder / 'big.json', folder, folder / 'out', pictures='later', progress=False)
row = data.ds.select(range(0, n, 7)).with_format('arrow')[0]
print(json.dumps(dict(n=len(data.ds), growth=status('VmHWM') - before, total=status('VmHWM'),
                      seconds=time.process_time() - t, size=(folder / 'big.json').stat().st_size / 2**20)))
"""


def sample(i, answer='Four.', image='a.png', question='<image>\nHow many?'):
    return dict(
        id=f's{i}',
        image=image,
        conversations=[{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}],
    )


@pytest.fixture
def folder(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    (tmp_path / 'broken.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])
    return tmp_path


def write(folder, samples):
    path = folder / 'train.json'
    path.write_text(json.dumps(samples))
    return path


@pytest.mark.parametrize('size', [1, 3, 64, 2**20])
def test_values_do_not_depend_on_pieces(tmp_path, size):
    values = [1.5, -2, 'a]b,"\\u00fc', {'x': [1, {'y': ']'}]}, [], None, True, 'ü€']
    path = tmp_path / 'list.json'
    path.write_text(json.dumps(values, ensure_ascii=False), encoding='utf-8-sig')
    assert list(iterate_json_list(path, size)) == values


@pytest.mark.parametrize('text', ['{"a": 1}', '[{"a": 1}, {"a"', '[{"a": 1} x]', '', 'words'])
def test_what_is_no_list_is_refused(tmp_path, text):
    path = tmp_path / 'list.json'
    path.write_text(text)
    with pytest.raises(ValueError, match='list.json'):
        list(iterate_json_list(path))


def test_same_rows_as_the_small_reader(folder):
    samples = [sample(0), sample(1, ' '), sample(2, image='none.png'), sample(3, question='How many?'), sample(4)]
    path = write(folder, samples)
    rows, skipped = read_llava_json(path, folder)
    data = convert_llava_json(path, folder, folder / 'out', policy='skip', progress=False)
    assert list(data.ds['id']) == [r['id'] for r in rows] == ['s0', 's4']
    assert [list(m) for m in data.ds['messages']] == [r['messages'] for r in rows]
    assert data.skipped == {k: len(v) for k, v in skipped.items()} and sum(data.skipped.values()) == 3
    assert data.ds[0]['images'][0].size == (8, 8)


def test_pictures_are_checked_as_chosen(folder):
    path = write(folder, [sample(0), sample(1, image='broken.png'), sample(2, image='none.png')])
    kept = {}
    for pictures in ('later', 'exists', 'decode'):
        data = convert_llava_json(path, folder, folder / pictures, 'skip', pictures, progress=False)
        kept[pictures] = list(data.ds['id'])
    assert kept == dict(later=['s0', 's1', 's2'], exists=['s0', 's1'], decode=['s0'])
    with pytest.raises(ValueError, match="sample 's1' has an image that does not decode: broken.png"):
        convert_llava_json(path, folder, folder / 'stop', 'stop', 'decode', progress=False)


def test_a_folder_is_used_again_and_never_mixed(folder):
    path = write(folder, [sample(0)])
    first = convert_llava_json(path, folder, folder / 'out', progress=False)
    time = (folder / 'out' / 'data.arrow').stat().st_mtime_ns
    assert list(convert_llava_json(path, folder, folder / 'out', progress=False).ds['id']) == list(first.ds['id'])
    assert (folder / 'out' / 'data.arrow').stat().st_mtime_ns == time
    write(folder, [sample(0), sample(1)])
    with pytest.raises(ValueError, match='out is in use'):
        convert_llava_json(path, folder, folder / 'out', progress=False)
    with pytest.raises(ValueError, match='holds no converted data'):
        open_converted(folder)
    with pytest.raises(ValueError, match='policy is one of'):
        convert_llava_json(path, folder, folder / 'x', policy='hope', progress=False)


def test_nothing_usable_leaves_nothing(folder):
    with pytest.raises(ValueError, match='no usable sample'):
        convert_llava_json(write(folder, [sample(0, ' ')]), folder, folder / 'out', 'skip', progress=False)
    assert not (folder / 'out' / 'data.arrow').exists()


def test_memory_does_not_grow_with_the_file(tmp_path):
    "A fresh process converts 20,000 conversations of a kilobyte each."
    done = subprocess.run([sys.executable, '-c', GROWTH, tmp_path, '20000'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['n'] == 20000 and found['size'] > 15
    assert found['growth'] < 60, found
