"What one test changes in the process, the next one does not see. The two run in this order."

import os, random
import matplotlib as mpl
import torch

START = os.getcwd()


def test_a_test_may_change_everything(tmp_path):
    os.chdir(tmp_path)
    os.environ['LEFT_BEHIND'] = '1'
    random.seed(1234567)
    torch.manual_seed(1234567)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    mpl.rcParams['font.size'] = 99
    assert torch.zeros(1).dtype == torch.float64


def test_the_next_one_sees_nothing_of_it():
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert mpl.rcParams['font.size'] != 99 and 'LEFT_BEHIND' not in os.environ
    assert random.random() != random.Random(1234567).random()
    assert torch.rand(1) != torch.rand(1, generator=torch.Generator().manual_seed(1234567))
    assert os.getcwd() == START
    assert os.environ['HF_HUB_OFFLINE'] == os.environ['HF_DATASETS_OFFLINE'] == '1' and os.environ['LVLM_FIGURES']
