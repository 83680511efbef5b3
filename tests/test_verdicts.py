"Verdicts: one rule for claims and recipes, and every sentence that states one agrees with the stored rows."

import json
from dataclasses import asdict
import numpy as np
import pytest
from guards import NBS, ROOT
from lvlm_study.evaluation.verdicts import DRAWS, OPEN_VERDICTS, draw_seeds, effect_of, interval_noise
from lvlm_study.evaluation.verdicts import mean_with_draws, pack_correct, question_noise, unpack_correct

FINDINGS = {'holds', 'reversed', 'undecided'}


def made_up(rng, seeds, spread=2.0, cells=2):
    "Means with draws of some cells at one ratio, and the noise they were made with"
    values = rng.normal(80, spread, (cells, seeds))
    noise = rng.normal(0, 1, (cells, seeds, DRAWS))
    return values, noise


def difference(values, noise, times=1.0):
    a, b = (mean_with_draws(v, times * n) for v, n in zip(values, noise))
    return effect_of(a - b, values.shape[1])


# --- properties -------------------------------------------------------------------------------------------------


def test_wider_noise_never_makes_a_finding():
    rng, undecided = np.random.default_rng(0), 0
    for _ in range(150):
        case = made_up(rng, 3, spread=rng.choice([0.3, 1.0, 3.0]))
        if difference(*case).verdict == 'undecided':
            undecided += 1
            assert {difference(*case, times).verdict for times in (1.5, 3, 10)} == {'undecided'}
    assert undecided > 50, 'too few cases to say anything'


def test_the_other_sign_has_the_other_verdict():
    rng, other = np.random.default_rng(1), dict(holds='reversed', reversed='holds', undecided='undecided')
    seen = set()
    for shift in (0, 0, 0, 5, 9, -5, -9, 20, -20):
        values, noise = made_up(rng, 3, 0.5)
        gap = shift + mean_with_draws(values[0], noise[0]) - mean_with_draws(values[1], noise[1])
        e, flipped = effect_of(gap, 3), effect_of(-gap, 3)
        assert flipped.verdict == other[e.verdict]
        assert np.allclose((flipped.low, flipped.high), (-e.high, -e.low))
        seen.add(e.verdict)
    assert seen == FINDINGS


@pytest.mark.parametrize('seeds, word', [(0, 'incomplete'), (1, 'one seed'), (2, 'two seeds')])
def test_few_seeds_are_never_a_finding(seeds, word):
    for gap in (-1000.0, -1.0, 0.0, 1.0, 1000.0):
        assert effect_of(np.full(DRAWS + 1, gap), seeds).verdict == word
    assert word in OPEN_VERDICTS.values() and word not in FINDINGS
    assert effect_of(np.full(DRAWS + 1, 1.0), 3).verdict == effect_of(np.full(DRAWS + 1, 1.0)).verdict == 'holds'


def test_equal_runs_are_undecided():
    values, noise = made_up(np.random.default_rng(2), 3)
    e = difference(values[[0, 0]], noise[[0, 0]])
    assert (e.value, e.low, e.high, e.verdict) == (0, 0, 0, 'undecided')
    assert effect_of(np.empty((0, DRAWS + 1)), None).verdict == ''


@pytest.mark.parametrize('seeds', [3, 5])
def test_the_interval_holds_the_truth(seeds):
    rng = np.random.default_rng(seeds)
    held = []
    for _ in range(500):
        gaps = rng.normal(1.5, 1, seeds)
        e = effect_of(mean_with_draws(gaps, np.zeros((seeds, DRAWS))), seeds)
        held.append(e.low <= 1.5 <= e.high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_the_interval_holds_the_truth_over_questions_and_seeds():
    "Models that forget each question with a chance of their own, on one set of questions; differences of two cells."
    rng, n, held = np.random.default_rng(5), 300, []
    for _ in range(80):
        right = rng.random(n) < 0.8
        cells = []
        for _ in range(2):
            share = rng.normal(0.85, 0.02, 3)
            runs = [right & (rng.random(n) < s) for s in share]
            values = [100 * r.sum() / right.sum() for r in runs]
            noise = [question_noise(v, r, right) for v, r in zip(values, runs)]
            cells.append(mean_with_draws(values, np.array(noise)))
        e = effect_of(cells[0] - cells[1], 3)
        held.append(e.low <= 0 <= e.high)
    assert np.mean(held) >= 0.93


def test_the_best_of_equals_is_no_finding():
    rng, found = np.random.default_rng(3), []
    for _ in range(100):
        values, noise = rng.normal(80, 1, (6, 4, 3)), rng.normal(0, 1, (6, 4, 3, DRAWS))
        x = np.array([[mean_with_draws(v, n) for v, n in zip(*both)] for both in zip(values, noise)])
        found.append(effect_of(x[0] - x[1:].max(axis=0), 3).verdict)
    assert np.mean([v != 'undecided' for v in found]) <= 0.06


def test_seeds_are_drawn_for_all_alike():
    assert np.array_equal(draw_seeds(3), draw_seeds(3))
    assert np.allclose(draw_seeds(3).sum(axis=1), 0) and not draw_seeds(1).any()


# --- answers by question ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 7, 8, 9, 2163])
def test_bits_come_back(n):
    right = np.random.default_rng(n).random(n) < 0.5
    text = pack_correct(right)
    assert unpack_correct(text, n).tolist() == right.tolist() and len(text) == 2 * -(-n // 8)
    assert int(text, 16) >> (-n % 8) == int(''.join('01'[int(b)] for b in right), 2), 'first question, highest bit'


def test_partial_credit_counts_from_a_half():
    assert pack_correct([0, 0.49, 0.5, 1]) == f'{0b00110000:02x}'


def stored(model, method, seed, retention, **fields):
    from lvlm_study.core.store import Run

    experiment = 'layer_pruning' if method != 'width' else 'width_pruning'
    run = Run(experiment, model=model, suite='plain', method=method, seed=seed, **fields)
    metrics = dict(retention=retention, retention_low=retention - 4, retention_high=retention + 4, questions=800)
    return dict(key=run.key, run=asdict(run), metrics=metrics, seconds=1.0, env={}, curves={})


def test_any_model_with_rows_is_judged_and_answers_sharpen_it():
    from lvlm_study.core.store import temporary_results
    from lvlm_study.study.claims import CLAIMS, MeasuredResults, judge_claim, measured_models

    rng = np.random.default_rng(0)
    original = rng.random(800) < 0.9
    widths = {}
    for bits in (False, True):
        with temporary_results() as folder:
            rows = [(stored('smol-llava', 'none', 0, 100.0), original)]
            for ratio in (0.15, 0.3, 0.45, 0.6):
                for seed in range(3):
                    layer = original & (rng.random(800) < 0.8)
                    width = layer | (original & (rng.random(800) < 0.2))
                    for method, criterion, right in (('layer', 'bi', layer), ('width', 'taylor', width)):
                        given = dict(criterion=criterion, calibration=50, ratio=ratio, size_match=method == 'width')
                        value = round(100 * right.sum() / original.sum(), 3)
                        rows.append((stored('smol-llava', method, seed, value, **given), right))
            for row, right in rows:
                row = row | dict(curves=dict(correct=pack_correct(right)) if bits else {})
                with open(folder / f'{row["run"]["experiment"]}.jsonl', 'a') as f:
                    f.write(json.dumps(row) + '\n')
            assert measured_models() == ['smol-llava']
            e = judge_claim(CLAIMS[0], MeasuredResults('smol-llava'))
            assert e['verdict'] == 'holds' and e['seeds'] == 3 and list(e['gaps']) == ['15%', '30%', '45%', '60%']
            assert judge_claim(CLAIMS[1], MeasuredResults('smol-llava'))['verdict'] == ''
            widths[bits] = e['high'] - e['low']
    assert widths[True] < widths[False], 'shared luck cancels'


# --- the same by other means ------------------------------------------------------------------------------------


def by_hand(rows, pick, ratios, draws=4000):
    "Effect and interval of `first less second`, from rows of a file, with loops and other random numbers"
    import random
    import statistics

    random.seed(0)
    cells = [
        {(r, s): next(x['metrics'] for x in rows if pick(x['run'], side, r, s)) for r in ratios for s in range(3)}
        for side in (0, 1)
    ]
    value = statistics.mean(cells[0][k]['retention'] - cells[1][k]['retention'] for k in cells[0])
    widened = (3 / 2) ** 0.5 * 4.303 / 1.96
    drawn = []
    for _ in range(draws):
        seeds = [random.randrange(3) for _ in range(3)]
        total = 0.0
        for r in ratios:
            for sign, cell in zip((1, -1), cells):
                mean = statistics.mean(cell[r, s]['retention'] for s in range(3))
                total += sign * (mean + widened * (statistics.mean(cell[r, s]['retention'] for s in seeds) - mean))
                sds = [(cell[r, s]['retention_high'] - cell[r, s]['retention_low']) / 3.92 for s in range(3)]
                total += sign * statistics.mean(random.gauss(0, sd) for sd in sds)
        drawn.append(total / len(ratios))
    drawn.sort()
    return value, 2 * value - drawn[int(0.975 * draws)], 2 * value - drawn[int(0.025 * draws)]


def test_a_claim_agrees_with_a_restatement():
    from lvlm_study.study.claims import CLAIMS, MeasuredResults, judge_claim

    claim = next(c for c in CLAIMS if c.text.startswith('At 45 and 60 %, the language model'))
    e = judge_claim(claim, MeasuredResults('tiny-llava'))
    rows = [json.loads(line) for line in (NBS / 'results' / 'recovery.jsonl').read_text().splitlines()]
    fixed = dict(model='tiny-llava', method='width', recipe='sft', fraction=0.1, budget='epochs', criterion='taylor')

    def pick(run, side, ratio, seed):
        trains = ('projector+lora', 'projector')[side]
        wanted = fixed | dict(trainable=trains, ratio=ratio, seed=seed, calibration=50, use_images=True)
        return all(run[k] == v for k, v in wanted.items())

    value, low, high = by_hand(rows, pick, (0.45, 0.6))
    assert e['value'] == pytest.approx(value, abs=1e-6)
    assert (e['low'], e['high']) == pytest.approx((low, high), abs=0.8)
    assert e['verdict'] == ('holds' if low > 0 else 'reversed' if high < 0 else 'undecided')


def test_published_numbers_move_by_their_reading_error_only():
    from lvlm_study.study.claims import CLAIMS, PublishedResults, judge_claim

    e = judge_claim(CLAIMS[0], PublishedResults('llava-v1.5-7b'))
    assert e['value'] == pytest.approx(np.mean([90.9 - 72.2, 79.9 - 69.2, 32.4 - 34.4, 6.8 - 5.3]), abs=0.06)
    assert e['seeds'] is None and (e['high'] - e['low']) / 2 == pytest.approx(0.5 * 2**0.5 / 4**0.5, rel=0.15)


def test_recipes_are_judged_by_the_same_rule():
    import pandas as pd
    from lvlm_study.evaluation.results import gain_over, gain_verdicts

    runs = [(r, s, 80.0 + g) for r, g in (('sft+hidden', 0), ('sft', 6), ('kl', 0.5)) for s in range(3)]
    d = pd.DataFrame(runs, columns=['recipe', 'seed', 'retention']).assign(ratio=0.3, trainable='projector+lora')
    d = d.assign(low=d.retention - 2, high=d.retention + 2)
    v = gain_verdicts(gain_over(d)).loc[0.3]
    assert v.verdict.to_dict() == dict(sft='holds', kl='undecided')
    half = 1.96 * np.hypot(2, 2) / 1.96 / 3**0.5
    assert (v.high - v.low).sft / 2 == pytest.approx(half, rel=0.1)
    assert set(gain_verdicts(gain_over(d[d.seed < 2])).verdict) == {'two seeds'}


def test_noise_has_the_spread_of_its_interval():
    low, high = np.quantile(interval_noise(70, 80, draws=20000), [0.025, 0.975])
    assert (low, high) == pytest.approx((-5, 5), abs=0.2)


# --- sentences --------------------------------------------------------------------------------------------------


def test_the_readme_says_what_the_rows_say():
    from lvlm_study.study.claims import MeasuredResults, claims_table, judge_claims, measured_models

    judged = judge_claims({m: MeasuredResults(m) for m in measured_models()})
    assert set(judged.verdict) <= {*FINDINGS, *OPEN_VERDICTS.values(), ''}
    readme = (ROOT / 'README.md').read_text()
    shown = judged[judged.source.isin(['tiny-llava', 'smol-llava'])]
    assert set(shown.source) == {'tiny-llava', 'smol-llava'}
    assert set(claims_table(shown).splitlines()) <= set(readme.splitlines())
    few = judged.seeds.astype(float) < 3
    assert not set(judged.verdict[few]) & FINDINGS, 'fewer than three seeds are shown as open'


def test_there_is_no_second_rule():
    words = ("'better'", "'worse'", "'no difference'", "'mixed'", 'def noise(', 'tie: float')
    for module in (ROOT / 'lvlm_study').rglob('*.py'):
        text = module.read_text()
        assert not [w for w in words if w in text and 'erdict' in text], module.name
