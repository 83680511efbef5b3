"""The rule `lmms-eval` against the functions of lmms-eval 0.7.3 itself: `python tests/compare_lmms_eval.py [N]`.

lmms-eval brings its own versions of much, so it is no dependency: install it without its own (`pip install --no-deps
lmms_eval==0.7.3 loguru levenshtein`) in an environment of its own. Where it is not there, this says so and ends with 0.
MathVista's judge is a language model behind a key; here both sides get the extraction of `extract_math_answer`."""

import importlib
import random
import sys
import types

from restated import RESTATED, odd_records

VERSION = '0.7.3'


def task(name):
    return importlib.import_module(f'lmms_eval.tasks.{name}.utils')


def no_judge(extract):
    "MathVista's module without a server; its judge is the package's reading."
    judge = types.ModuleType('lmms_eval.llm_judge')
    judge.Request = judge.ServerConfig = lambda **settings: None
    judge.get_server = lambda **settings: None
    sys.modules['lmms_eval.llm_judge'] = judge
    module = task('mathvista')
    evaluator = module.mathvista_evaluator

    def score(r):
        kind = 'text' if r['options'] else r['answer_type']
        evaluator.get_chat_response = lambda prompt, **settings: extract(r['prediction'].strip(), r['options'], kind)
        right = r['options'][ord(r['answer'][0]) - ord('A')] if r['options'] else r['answer'][0]
        doc = dict(
            question_type='multi_choice' if r['options'] else 'free_form',
            answer_type=kind, query='', choices=r['options'] or None, answer=right, precision=r['precision'],
            pid='0', metadata={},
        )  # fmt: skip
        return float(module.mathvista_process_results(doc, [r['prediction']])['llm_as_judge_eval']['true_false'])

    return score


def mmmu_score(r):
    module = task('mmmu')
    right = r['answer'][0] if r['options'] or len(r['answer']) == 1 else repr(r['answer'])
    kind = 'multiple-choice' if r['options'] else 'open'
    doc = dict(id='validation_Art_1', question_type=kind, options=repr(r['options']), answer=right)
    random.seed(0)
    result = module.mmmu_process_results(doc, [r['prediction'].strip()])['mmmu_acc']
    return module.evaluate_mmmu([result])[1]['acc']


def other_scores():
    "Benchmark -> function from a record to lmms-eval's score."
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate

    def exact(text, right):
        plain = dict(ignore_case=True, ignore_punctuation=True)
        return float(exact_match_hf_evaluate(predictions=[text.strip()], references=[right], **plain)['exact_match'])

    letter = task('ai2d').MultiChoiceRegexFilter(ignore_case=True, ignore_punctuation=True, regex_pattern=r'([A-Z])\.')
    sqa, mme, pope = task('scienceqa'), task('mme'), task('pope')

    def mme_score(r):
        doc = dict(answer=r['answer'][0], category='existence', question_id='0')
        return mme.mme_process_results(doc, [r['prediction'].strip()])['mme_perception_score']['score']

    def sqa_score(r):
        doc = dict(choices=r['options'], answer=ord(r['answer'][0]) - ord('A'))
        return sqa.sqa_process_results(doc, [r['prediction'].strip()])['exact_match']

    def pope_score(r):
        doc = dict(answer=r['answer'][0], question_id='0')
        return pope.pope_process_results(doc, [r['prediction'].strip()])['pope_accuracy']['score']

    return {
        'SQA': sqa_score,
        'AI2D': lambda r: exact(letter.apply([[r['prediction']]], [{}])[0], r['answer'][0]),
        'MME-C': mme_score,
        'MME-P': mme_score,
        'POPE': pope_score,
        'DocVQA': lambda r: anls(r['answer'], [r['prediction'].strip()])['anls'],
        'GQA': lambda r: exact(r['prediction'], r['answer'][0]),
    }


def guessed(r):
    "Does MMMU's script pick a letter at random here?"
    return len(RESTATED['MMMU'](r, True)) > 1 if r['benchmark'] == 'MMMU' else False


def main(n=3000):
    try:
        import lmms_eval.tasks.pope.utils
    except ImportError as e:
        print(f'lmms_eval {VERSION} is not installed ({e}): nothing is compared')
        return 0
    from lvlm_study import grade
    from lvlm_study.evaluation.grading import extract_math_answer

    theirs = other_scores() | dict(MMMU=mmmu_score, MathVista=no_judge(extract_math_answer))
    bad = 0
    for benchmark in RESTATED:
        rows = [r for r in odd_records(benchmark, n, seed=7) if '<' not in r['prediction'] and not guessed(r)]
        ours = grade(rows, 'lmms-eval').score
        differ = [(r, s, t) for r, s in zip(rows, ours) if abs(s - (t := theirs[benchmark](r))) > 1e-9]
        print(f'{benchmark:10} {len(rows):5} answers, {len(differ)} scored otherwise by lmms-eval {VERSION}')
        for r, score, wanted in differ[:3]:
            print(f'    {r["prediction"]!r} for {r["answer"]} of {r["options"]}: {score} here, {wanted} there')
        bad += len(differ)
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:])))
