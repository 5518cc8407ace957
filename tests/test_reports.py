"What a training tells: lines, a bar, a block, trackers; and that none of it changes the training."
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from imecd.core import ImecdError
from imecd.reports import Report, block, line, stage, start_trackers, terms
from imecd.train import TrainConfig, lr_share, schedule_lr

ROW = {'epoch': 3, 'loss': 4.25, 'condition': 3., 'generated': None, 'mse': .5, 'gradient': 1., 'valid ndcg@10': .12, 'trust text': .9, 'load text': .4,
       'perplexity id': 7.6, 'usage id': .5, 'dead id': 2., 'lost id': .25, 'targets/s': 1234.5, 'seconds': 2.}


def test_a_line_says_all_that_there_is():
    assert line(ROW) == ('epoch 3, 2.0 s, 1,234 targets/s, loss 4.25 (condition 3, mse 0.5), ndcg@10 0.1200, trust text 0.90 (busiest expert 40%), '
                         'codes id 8 (50% used, 2 dead, 25% lost)')
    assert terms(ROW) == ['condition', 'mse']


@pytest.mark.parametrize('stages', ['none', 'lines', 'terminal'])
def test_every_batch_passes_and_every_question_is_counted(stages):
    said = io.StringIO()
    with redirect_stderr(said), Report(4, 10, [ROW], stages) as report:
        for epoch in range(3): assert list(report.read('abcd', 3)) == list('abcd'); report.tell(ROW | {'epoch': epoch}, 0); assert report.asked == 10*(epoch+1)
    lines = [x for x in said.getvalue().replace('\r', '\n').splitlines() if x.startswith('epoch ')]
    assert len(lines) == (0 if stages == 'none' else 3)
    assert ('targets' in said.getvalue() and '%' in said.getvalue()) or stages != 'terminal'


def test_a_block_shows_untrusted_names_as_text():
    html = block([{'epoch': 0, 'loss': 1., 'valid <img src=x onerror=alert(1)>': None}], .5, '"><script>alert(1)</script>')
    assert '<script' not in html and '<img' not in html and '&lt;script' in html
    assert 'nan' not in block([], 0., 'training')


def test_nobody_is_looking_at_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO()); assert stage() == 'none'
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False); assert stage() == 'terminal'
    monkeypatch.setenv('IMECD_PROGRESS', 'off'); assert stage() == 'none'


def test_an_unknown_or_missing_tracker_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ImecdError, match="there is no tracker 'tensorbored'"): start_trackers(['tensorboard', 'tensorbored'], 'run', tmp_path)
    with pytest.raises(ImecdError, match='pip install wandb'): start_trackers(['tensorboard', 'wandb'], 'run', tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with Report(2, 10, trackers=start_trackers(['tensorboard'], 'run', tmp_path, {'dim': 8, 'streams': 'id'})) as report:
        for epoch in range(2): report.tell(ROW | {'epoch': epoch, 'loss': 4.-epoch}, 0)
    folder, = {p.parent for p in Path(tmp_path).rglob('events*') if p.parent.name == 'run'}
    found = EventAccumulator(str(folder)); found.Reload(); assert [(e.step, e.value) for e in found.Scalars('loss')] == [(0, 4.), (1, 3.)]
    assert 'valid ndcg@10' in found.Tags()['scalars'] and 'generated' not in found.Tags()['scalars']


def test_the_learning_rate_rises_and_falls():
    c = TrainConfig(epochs=10, lr_warmup=2., lr_end=.2)
    assert [lr_share(x, c) for x in (0., 1., 2., 10., 99.)] == [0., .5, 1., .2, .2] and lr_share(6., c) == pytest.approx(.6)
    assert {lr_share(x, TrainConfig()) for x in (0., .5, 99., 1e6)} == {1.}
    with pytest.raises(ImecdError, match='lr_end=1.5'): TrainConfig(lr_end=1.5)
    with pytest.raises(ImecdError, match='lr_warmup=-1'): TrainConfig(lr_warmup=-1)


def test_the_rate_is_set_before_the_step_that_uses_it():
    x = torch.nn.Parameter(torch.zeros(1)); optimiser = torch.optim.SGD([x], 1.); schedule_lr(optimiser, TrainConfig(epochs=4, lr=.5, lr_warmup=2.), 2, done=1); moved = []
    for _ in range(4): before = float(x.detach()); x.grad = torch.ones(1); optimiser.step(); moved.append(before-float(x.detach()))
    assert moved == pytest.approx([.25, .375, .5, .5])  # steps 2, 3, 4 and 5 of two an epoch
