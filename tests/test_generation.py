"""The engine that shares what prompts have in common answers as the plain way does."""

import pytest
import torch
from lvlm_study.data.instruction_data import Collator
from lvlm_study.data.toy_benchmarks import instructions, small_suite
from lvlm_study.evaluation.evaluate import evaluate, iterate_answers
from lvlm_study.evaluation.generation import clear_features, common_prefix, engine_blocker, picture_keys
from lvlm_study.models.linear_speed import best_precision, fast_linear, linear_speeds
from lvlm_study.models.loading import load_lvlm, model_inputs
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan


def answers(lvlm, rows, **options):
    found = {}
    for indices, texts in iterate_answers(lvlm, rows, **options):
        found |= zip(map(int, indices), texts)
    return found


@pytest.fixture(scope='module')
def rows():
    "Questions of all nine tests, with two pairs about one picture each."
    suite = small_suite()
    first = suite['benchmark'].index('MME-P')
    return suite.select([*range(0, len(suite), 200), *range(first, first + 4)])


@pytest.mark.parametrize('name', ['tiny-llava', 'tiny-bunny', 'tiny-internvl', 'tiny-gqa'])
def test_same_answers_as_the_plain_way(name, rows):
    lvlm = load_lvlm(name)
    assert engine_blocker(lvlm, rows, picture_keys(rows)) is None
    clear_features()
    plain = answers(lvlm, rows, share=False)
    assert answers(lvlm, rows, batch_size=5) == plain
    assert len(set(plain.values())) > 3


def test_text_only_and_own_limits(rows):
    lvlm = load_lvlm('tiny-llava')
    limits = [1 + i % 3 for i in range(len(rows))]
    for options in (dict(use_images=False), dict(max_new_tokens=limits)):
        assert answers(lvlm, rows, **options) == answers(lvlm, rows, share=False, **options)


def test_prompts_read_once_whatever_they_share(rows):
    "Five questions about one picture, of different lengths."
    lvlm = load_lvlm('tiny-llava')
    row = rows[0]
    texts = ['What is in row 1, column 1?', 'How many stars are there?', 'Is there a star in the image?']
    texts += ['What color is the star?', 'How many?']
    asked = [row | dict(id=t, messages=[dict(role='user', content=f'<image>\n{t}')]) for t in texts]
    assert len(set(picture_keys(asked))) == 1
    assert answers(lvlm, asked) == answers(lvlm, asked, share=False)


def test_unusual_settings_take_the_plain_way(rows):
    lvlm = load_lvlm('tiny-llava')
    lvlm.model.generation_config.repetition_penalty = 1.3
    assert 'repetition_penalty' in engine_blocker(lvlm, rows, picture_keys(rows))
    assert answers(lvlm, rows) == answers(lvlm, rows, share=False)


def test_a_model_that_reads_otherwise_is_found_out(rows, monkeypatch):
    lvlm = load_lvlm('tiny-llava')
    plain = type(lvlm.model).forward

    monkeypatch.setattr(type(lvlm.model), 'forward', lambda s, *a, attention_mask=None, **k: plain(s, *a, **k))
    assert 'differ' in engine_blocker(lvlm, rows, picture_keys(rows))


def test_evaluate_keeps_precisions_apart(tmp_path):
    lvlm, path = load_lvlm('tiny-llava'), tmp_path / 'records.parquet'
    table = evaluate(lvlm, limit=2, records=path, progress=False)
    assert evaluate(lvlm, limit=2, records=path, progress=False).value.equals(table.value)
    with pytest.raises(ValueError, match='another precision'):
        evaluate(lvlm, limit=2, records=path, progress=False, precision='bfloat16')


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == 2
    assert common_prefix([[7], [7, 8]]) == 0


def test_a_draft_is_given_no_picture():
    "The sentence in `timing`: right words, and a vision encoder of the draft that is never run."
    lvlm, looked = load_lvlm('tiny-llava'), []
    draft = apply_plan(lvlm, Plan.of(lvlm, range(6)))
    draft.part('vision').register_forward_pre_hook(lambda module, args: looked.append(1))
    batch = model_inputs(lvlm, Collator(lvlm)([instructions('recovery', 1)[0]]))
    assert 'pixel_values' in batch
    with torch.inference_mode():
        plain = lvlm.model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        words = lvlm.model.generate(**batch, max_new_tokens=6, eos_token_id=-1, assistant_model=draft.model)
    assert torch.equal(plain, words) and not looked


def test_fast_linear_gradients_and_restoration():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 8, bias=False))
    model[0].weight.requires_grad_(False)
    x = torch.randn(3, 4, 32)

    def gradients(**options):
        model.zero_grad()
        with fast_linear(model, **options):
            model(x).square().sum().backward()
        return [model[0].bias.grad.clone(), model[2].weight.grad.clone()]

    plain = torch.autograd.grad(model(x).square().sum(), [model[0].bias, model[2].weight])
    for precision, most in (('float32', 1e-5), ('bfloat16', 2e-2)):
        for a, b in zip(plain, gradients(precision=precision)):
            assert float((a - b).norm() / a.norm()) < most
    assert model[0].weight.grad is None and not any('forward' in m.__dict__ for m in model)
    with pytest.raises(ValueError, match='precision is one of'), fast_linear(model, precision='half'):
        pass


def test_precision_is_found_out():
    speeds = linear_speeds()
    assert best_precision() == ('bfloat16' if speeds['bfloat16'] > 1.3 * max(speeds['plain'], speeds.get('onednn', 0))
                                else 'float32') or abs(speeds['bfloat16'] / speeds['plain'] - 1.3) < 0.3
