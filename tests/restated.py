"""The rules of the nine benchmarks, told a second time: what test_grading.py and compare_lmms_eval.py compare with.

Nothing here is shared with the package. Each rule is written as a reader of the scripts would tell it, step by step,
not as the package does it."""

import random
import re
import string
from functools import lru_cache

CAPITALS = string.ascii_uppercase


@lru_cache(None)
def edits(a, b):
    "Fewest insertions, deletions and replacements between two texts, by a table."
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if not i or not j:
                table[i][j] = i + j
            else:
                same = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                table[i][j] = min(same, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def bare(text):
    "lmms-eval's answer: without its reasoning, without blanks around it."
    for tag in ('think', 'analysis'):
        open_, close = f'<{tag}>', f'</{tag}>'
        while re.search(f'{open_}.*?{close}', text, re.S):
            text = re.sub(f'{open_}.*?{close}', '', text, count=1, flags=re.S)
        if close in text and open_ not in text:
            text = text[text.rindex(close) + len(close) :]
    return text.strip()


def mmmu_letters(text, options, harness):
    "Every letter that may be the answer; all of them where the script guesses."
    for mark in ',', '.', '!', '?', ';', ':', "'":
        while text.startswith(mark):
            text = text[1:]
        while text.endswith(mark):
            text = text[:-1]
    text = ' ' + text + ' '
    letters = list(CAPITALS[: len(options)])

    def last(found, written):
        best = None
        for letter in found:
            at = text.rfind(written(letter))
            if best is None or at > best[0]:
                best = (at, letter)
        return {best[1]}

    bracketed = [x for x in letters if '(' + x + ')' in text]
    if bracketed:
        return last(bracketed, lambda x: '(' + x + ')')
    spaced = [x for x in letters if (x + ' ' if harness else ' ' + x + ' ') in text]
    dotted = [x for x in letters if x + '.' in text] if harness else []
    if spaced or dotted:
        return last(spaced or dotted, lambda x: ' ' + x + ' ')
    small = text.lower()
    told = [x for x, o in zip(letters, options) if o.lower() in small] if len(text.split()) > 5 else []
    if told:
        ends = {x: small.rfind(options[letters.index(x)].lower()) for x in told}
        return {next(x for x in told if ends[x] == max(ends.values()))}
    return set(letters)


def as_number(text):
    try:
        return round(float(text.strip().replace(',', '')), 2)
    except ValueError:
        return None


def mmmu_open(text, references):
    "Does an open answer hold one of the references?"
    text = text.strip()
    while text.startswith('.'):
        text = text[1:]
    while text.endswith('.'):
        text = text[:-1]
    text, parts = text.lower(), []
    lines = text.split('\n')
    for i, line in enumerate(lines):
        cues = ['could be ', 'so ', 'is ', 'thus ', 'therefore ', 'final ', 'answer ', 'result ']
        cues += ['='] if i == len(lines) - 1 else []
        kept = None
        for cue in cues:
            if cue in line:
                tail = line[line.rindex(cue) + len(cue) :].strip()
                kept = tail if not kept or len(tail) < len(kept) else kept
        if kept and kept not in {':', ',', '.', '!', '?', ';', "'"}:
            parts.append(kept)
    parts = parts or [text]
    words, numbers = [], set()
    for part in parts:
        found = re.findall(r'-?\b[0-9]{1,3}(?:,[0-9]{3})+\b', part)
        found += re.findall(r'-?[0-9]+(?:\.[0-9]+)?[eE][+-]?[0-9]+', part)
        plain = r'-?(?:[0-9]+\.[0-9]+|\.[0-9]+|[0-9]+\b)(?![eE][+-]?[0-9]+)(?![,0-9])'
        found += re.findall(plain, part)
        for piece in [part, *found]:
            number = as_number(piece)
            if number is None:
                piece = piece.strip().lower()
                words += [' ' + piece, piece + ' '] if len(piece) == 1 else [piece]
            else:
                numbers.add(number)
    for reference in references:
        number, plain = as_number(reference), reference.strip().lower()
        if number is not None:
            if number in numbers:
                return True
        else:
            forms = [' ' + plain, plain + ' '] if len(plain) == 1 else [plain]
            if any(form in word for form in forms for word in words):
                return True
    return False


def mmmu(r, harness):
    text = bare(r['prediction']) if harness else r['prediction']
    if r['options']:
        letters = mmmu_letters(text, r['options'], harness)
        return {float(letter == r['answer'][0]) for letter in letters}
    references = r['answer']
    if harness and len(references) > 1:
        references = [repr(references)]
    return {float(mmmu_open(text, references))}


def sqa(r, harness):
    text, right = r['prediction'], r['answer'][0]
    if harness:
        text = bare(text)
        if text.lower() == right.lower():
            return {1.0}
        return {float(len(text) > 1 and text[0].isupper() and text[1] == '.' and text[0].lower() == right.lower())}
    if text in ('A', 'B', 'C', 'D', 'E'):
        letter = text
    elif re.match(r'[A-E]\. ', text):
        letter = text[0]
    else:
        said = [m.group(1) for m in re.finditer(r'The answer is ([A-Z])[^\n]', text)]
        letter = said[0] if len(said) == 1 else None
    return {float(letter == right and letter in CAPITALS[: len(r['options'])])}


def unpunctuated(text):
    return ''.join(c for c in text.lower() if c not in string.punctuation).rstrip('\x00')


def ai2d(r, harness):
    beginning = re.match(r'^\s*([A-Z])\.', r['prediction'])
    text = beginning.group(1) if beginning else bare(r['prediction'])
    return {float(unpunctuated(text) == r['answer'][0].lower())}


def mathvista(r, harness, judge):
    "`judge` is the first step: (text, options, kind) -> what is meant; it is asked only where the scripts ask one."
    text = bare(r['prediction']) if harness else r['prediction']
    options, right = r['options'], r['answer'][0]
    kind = 'text' if options else r['answer_type']
    if not text:
        meant = ''
    elif options and text in options:
        meant = text
    else:
        meant = None
        for wanted, number in (('integer', int), ('float', float)):
            if kind == wanted:
                try:
                    meant = str(number(text))
                except ValueError:
                    pass
        meant = judge(text, options, kind) if meant is None else meant
    if options:
        meant = meant.strip()
        letters = re.findall(r'\(([a-zA-Z])\)', meant)
        meant = letters[0].upper() if letters else meant
        if meant in list(CAPITALS[: len(options)]):
            chosen = options[CAPITALS.index(meant)]
        else:
            far = [edits(meant, o) for o in options]
            chosen = options[far.index(min(far))]
        return {float(chosen == options[CAPITALS.index(right)])}
    try:
        if kind == 'integer':
            meant = str(int(float(meant)))
        if kind == 'float':
            meant = str(round(float(meant), r['precision']))
    except (ValueError, OverflowError):
        meant = None
    return {float(meant == right)}


def mme(r, harness):
    text = r['prediction']
    if harness:
        text = bare(text).lower().replace('.', '')
        said = {'y': 'yes', 'n': 'no'}.get(text)
    else:
        text, said = text.lower(), None
    first = text[:4]
    said = said or ('yes' if 'yes' in first else 'no' if 'no' in first else 'other')
    return {float(said == r['answer'][0].lower())}


def pope_says(text, harness):
    if harness:
        return bare(text).lower()
    sentence = text if '.' not in text else text[: text.index('.')]
    words = re.split(' ', sentence.replace(',', ''))
    return 'no' if any(word in ('No', 'not', 'no') for word in words) else 'yes'


def pope(r, harness):
    return {float(pope_says(r['prediction'], harness) == r['answer'][0])}


def docvqa(r, harness):
    text = bare(r['prediction']) if harness else r['prediction']
    worst = []
    for right in r['answer']:
        a, b = (re.sub(r'\s+', ' ', t.strip().lower()).strip() for t in (right, text))
        length = max(len(right.upper()), len(text.upper()))
        worst.append(edits(a, b) / length if length else 0.0)
    value = 1 - min(worst)
    return {value if value >= 0.5 else 0.0}


def gqa(r, harness):
    if not harness:
        return {float(r['prediction'] == r['answer'][0])}
    return {float(unpunctuated(bare(r['prediction'])) == unpunctuated(r['answer'][0]))}


RESTATED = {
    'MMMU': mmmu,
    'SQA': sqa,
    'MathVista': mathvista,
    'AI2D': ai2d,
    'MME-C': mme,
    'MME-P': mme,
    'POPE': pope,
    'DocVQA': docvqa,
    'GQA': gqa,
}

WORDS = ['emerald', 'topaz', 'dark red', '3', '-3', '1.5', '60°', 'A', 'no', 'Main St', 'Straße', '12,500', '0.05']
FORMS = [
    '{}', '{}', '{}. ', '{}.', '{},',
    '{}!', ' {} ', '({})', '[{}]', '**{}**', '"{}"', '{}:', '- {}', 'The answer is {}.',
    'The answer is {}', 'the answer is {} because it is', 'Answer: {}', 'Answer:{}', '{}. topaz', '{}) topaz', '{}\n',
    'It is {}, not {}', '{} or {}', '{}\n\n{}', 'so {} = {}', 'P = {} W.\nThat is all', 'thus {}V', '{}%', '${}',
    'I think that the right one here is {}', '<think>{}</think>{}', '{}</think> {}', '<think>{}',
    '答案是{}', '选{}。',
    '（{}）', '{}  {}', '\t{}', 'x{}y', '{}\u2028{}', 'No, {}', 'not {}', 'There is no {}', 'Yes, {}', '.{}', '−{}',
    '{}{}', '[{}, {}]', '{}/{}', '{}e3', "'{}'", '{}\x00', '{};', 'result {}: {}.', 'Final answer {}\nso is {}',
]  # fmt: skip


def odd_word(rng, r):
    "Something that an answer may be made of: what is right, an option, a letter, a word, a number."
    pools = [r['answer'], r['answer'], r['options'] or WORDS, list('ABCDEabcde'), WORDS]
    pools += [['Yes', 'No', 'yes', 'NO', 'y', 'N', 'Y']]
    word = rng.choice(rng.choice(pools))
    number = rng.choice([str(rng.randint(-20, 2000)), f'{rng.uniform(-9, 9):.3f}', '1' * rng.choice([2, 309, 400])])
    word = number if rng.random() < 0.15 else word
    return rng.choice([word, word, word.upper(), word.lower(), word[::-1]]) if rng.random() < 0.3 else word


def odd_answer(rng, r):
    if rng.random() < 0.03:
        return rng.choice(['', ' ', '.', '\n', '?', '...', 'nan', 'inf', '１２', 'Ｂ', '<think></think>'])
    text = rng.choice(FORMS)
    while '{}' in text:
        text = text.replace('{}', odd_word(rng, r), 1)
    return text if rng.random() < 0.9 else text + ' ' + rng.choice(FORMS).replace('{}', odd_word(rng, r))


def question(rng, benchmark):
    "A question of a benchmark, as a record without an answer."
    r = dict(benchmark=benchmark, options=[], precision=0, answer_type='text')
    choice = benchmark in ('SQA', 'AI2D') or benchmark in ('MMMU', 'MathVista') and rng.random() < 0.55
    if choice:
        r['options'] = rng.sample(WORDS, rng.randint(2, 5))
        return r | dict(answer=[CAPITALS[rng.randrange(len(r['options']))]])
    if benchmark in ('MME-C', 'MME-P', 'POPE'):
        right = rng.choice(['yes', 'no'])
        return r | dict(answer=[right if benchmark == 'POPE' else right.capitalize()])
    if benchmark == 'MathVista':
        kind, places = rng.choice(['integer', 'float', 'list']), rng.choice([1, 2])
        answer = str(rng.randint(-20, 300))
        answer = f'{rng.uniform(0, 9):.{places}f}' if kind == 'float' else answer
        answer = f'[{rng.randint(0, 9)}, {rng.randint(0, 9)}]' if kind == 'list' else answer
        return r | dict(answer=[answer], answer_type=kind, precision=places if kind == 'float' else 0)
    many = benchmark in ('MMMU', 'DocVQA') and rng.random() < 0.4
    return r | dict(answer=rng.sample(WORDS + ['x^2', '.5', '$MgS$', '6.33'], 2 if many else 1))


def odd_records(benchmark, n, seed=0):
    "Questions with odd answers, the same for one seed."
    rng, rows = random.Random(f'{benchmark} {seed}'), []
    for i in range(n):
        r = question(rng, benchmark)
        rows.append(r | dict(id=f'{benchmark}-{i}', prediction=odd_answer(rng, r)))
    return rows


def expected_scores(r, harness, judge):
    "The scores that a rule allows: one, or two where the script guesses."
    if r['benchmark'] == 'MathVista':
        return mathvista(r, harness, judge)
    return RESTATED[r['benchmark']](r, harness)
