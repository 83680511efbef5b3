"Benchmarks of speed and memory: the command, stored rows, tiny shapes, and measurements in processes of their own."

import sys
import pytest
import torch
from fastcore.script import anno_parser
from lvlm_study.bench import BENCHMARKS, bench_command, main, measure_pruning_on_disk, run_child, select_benchmarks
from lvlm_study.core.store import read_rows, temporary_results
from lvlm_study.efficiency.peers import peer_python, prune_by_rule
from lvlm_study.models.architecture import LVLM, parameter_sizes
from lvlm_study.models.study_models import llava_config
from lvlm_study.pruning.plan import Plan, nearest_layers
from transformers import LlamaConfig, LlamaForCausalLM


def test_every_benchmark_has_a_stored_row_and_every_row_a_benchmark():
    keys = [b.run.key for name in BENCHMARKS for b in select_benchmarks(name)]
    assert len(keys) == len(set(keys)) and set(keys) == set(read_rows('benchmarks'))


@pytest.mark.parametrize('name', BENCHMARKS)
def test_stored_rows_are_shown_and_not_measured_again(name, capsys):
    before = read_rows('benchmarks')
    parts = ['exact'] if name == 'real_size' else []
    assert main(name, parts) == 0 and read_rows('benchmarks') == before
    assert len(capsys.readouterr().out.splitlines()) == len(select_benchmarks(name, parts))


def test_tiny_shapes_are_measured_and_not_stored(capsys):
    with temporary_results():
        assert main('real_size', ['exact', 'memory'], small=True) == 0 and read_rows('benchmarks') == {}
    out = capsys.readouterr().out
    assert out.count('width_error') == 3 and 'taylor_layers' in out


@pytest.mark.slow
def test_a_measurement_in_a_process_of_its_own():
    assert run_child('backward_growth', 'plain', 2) > 0
    with pytest.raises(RuntimeError, match='KeyError'):
        run_child('backward_growth', 'forward', 2)


@pytest.mark.slow
def test_pruning_on_disk_of_a_small_model(tmp_path):
    row = measure_pruning_on_disk(llava_config(512, 3, layers=4), tmp_path, rounds=1)
    assert 0 < row['kept_GB'] < row['source_GB'] and row['prune_seconds'] > 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'words,why', {'scores nothing': 'has no part', 'recovery step --folder x': None, 'surgery ratio': None}.items()
)
def test_the_command_line(words, why, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['bench', *words.split()])
    options = vars(anno_parser(bench_command).parse_args())
    options = {k: v for k, v in options.items() if k not in ('pdb', 'xtra')}
    with pytest.raises(SystemExit) as e:
        bench_command(**options)
    assert (why in str(e.value.code)) if why else e.value.code == 0


@pytest.mark.parametrize('way', ['ShortGPT', 'LLM-Pruner', 'channels', 'channels, repaired', 'layers, repaired'])
def test_every_rule_removes_as_much(way):
    "Restated rules and own plans leave models of one size, to one channel of each layer, that transformers can run."
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=256, num_hidden_layers=10, num_attention_heads=4, vocab_size=96)
    lvlm = LVLM(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), name='random')
    ids = torch.randint(8, 96, (4, 32))
    layers = nearest_layers(parameter_sizes(lvlm), range, 0.3)
    plan = Plan.of(lvlm, layers=layers)
    pruned = prune_by_rule(lvlm, [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)], plan, way)
    removed = 1 - sum(p.numel() for p in pruned.model.parameters()) / plan.sizes['total']
    assert abs(removed - plan.shares['lm']) < 0.01
    assert pruned.model(input_ids=ids).logits.isfinite().all()


def test_a_peer_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no environment has optipfair'):
        peer_python('optipfair', tmp_path)
    assert peer_python('', tmp_path) == sys.executable
