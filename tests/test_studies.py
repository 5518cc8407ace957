"Searches and studies: killed they go on, what is compared answers the same questions, every name and number is checked before anything runs."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from imecd.baselines import read_config
from imecd.cli import main
from imecd.core import ImecdError
from imecd.metrics import ndcg
from imecd.model import PRESETS
from imecd.runs import load_run
from imecd.running import NETWORKS, train_run
from imecd.shop import make_shop
from imecd.studies import Job, ablations, command, compare_runs, find_runs, group_runs, per_user, plan, run_jobs, seed_table, slice_table
from imecd.tuning import SPACE, default_trial, space_of, tune

SMALL = {'dim': 16, 'inner': 32, 'layers': 1, 'train.epochs': 6, 'train.targets': 256}
SET = [x for k, v in SMALL.items() for x in ('--set', f'{k}={v}')]
ENV = {**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'}


def begin(*args): return subprocess.Popen([str(Path(sys.executable).with_name('imecd')), *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)


def until(true, child, seconds=120):
    end = time.time()+seconds
    while not true() and child.poll() is None and time.time() < end: time.sleep(.005)
    assert true() and child.poll() is None


@pytest.fixture(scope='module')
def study(shop, tmp_path_factory):
    "SASRec with two seeds and popularity, on one shop."
    out = tmp_path_factory.mktemp('study'); return run_jobs(shop, out, plan(['sasrec', 'popularity'], 2), 2, SMALL, ('--length', '20'), tell=print)


def test_a_search_that_is_killed_ends_with_the_same_trials(shop, tmp_path, imecd):
    "SIGKILL in the middle of the second trial; the same command goes on, and finds what an undisturbed search finds."
    tell = tune(shop, tmp_path/'whole', 'sasrec', 3, SMALL, length=20, tell=lambda text: None)
    args = ('tune', shop, '--out', tmp_path/'cut', '--model', 'sasrec', '--trials', 3, '--length', 20, *SET)
    child = begin(*args); until(lambda: (tmp_path/'cut'/'trials.csv').exists() and any(len(f.read_text().splitlines()) >= 2 for f in tmp_path.glob('cut/*.training/history.jsonl')), child)
    child.send_signal(signal.SIGKILL); child.wait(); code, out, err = imecd(*args, '--json'); assert code == 0, err
    found = pl.read_csv(tmp_path/'cut'/'trials.csv', infer_schema_length=None); same = ['state', 'value', 'epochs', 'train.lr', 'dropout', 'temperature']
    assert found.select(same).equals(pl.read_csv(tmp_path/'whole'/'trials.csv', infer_schema_length=None).select(same)) and len(tell) == 3
    assert not [*tmp_path.glob('cut/*.training')] and json.loads(out)['valid ndcg@20'] == found.filter(state='complete')['value'].max()
    told = read_config(tmp_path/'cut'/'best.toml'); assert told['model'] == 'sasrec' and told['settings']['train.epochs'] == 6


def test_a_study_that_is_ended_ends_its_trainings(shop, tmp_path):
    "SIGTERM to the study alone: the training under way is ended too and says how to go on, the next one is not begun."
    child = begin('ablate', shop, '--out', tmp_path/'cut', '--model', 'sasrec', '--seeds', 2, '--jobs', 1, *SET, '--set', 'train.epochs=100000', '--set', 'train.patience=100000')
    until(lambda: any(len(f.read_text().splitlines()) >= 2 for f in tmp_path.glob('cut/*.training/history.jsonl')), child)
    child.send_signal(signal.SIGTERM); assert child.wait(timeout=60) == 130
    assert '--resume goes on' in (tmp_path/'cut'/'sasrec-0.log').read_text() and not (tmp_path/'cut'/'sasrec-1.log').exists()


def test_the_winner_can_be_trained(shop, tmp_path, imecd):
    tune(shop, tmp_path/'s', 'fpmc', 1, SMALL, length=20, tell=lambda text: None); code, _, err = imecd('train', shop, '--config', tmp_path/'s'/'best.toml', '--out', tmp_path/'run', '--length', 20)
    assert code == 0, err; run = load_run(tmp_path/'run'); assert run.config['model'] == 'fpmc'
    assert run.metrics['valid']['ndcg@20'] == pytest.approx(pl.read_csv(tmp_path/'s'/'trials.csv')['value'][0], abs=1e-9)


def test_a_trial_that_diverges_ends_alone(shop, tmp_path, monkeypatch):
    "Later trials go on; the first one that fails is a mistake of the caller, and is raised."
    import imecd.tuning as t
    whole, calls = t.fit_preset, []
    def fails(at):
        def train(*args, **kw):
            calls.append(1)
            if len(calls) == at: raise ImecdError('epoch 0, batch 3: loss is nan; lower lr')
            return whole(*args, **kw)
        return train
    monkeypatch.setattr(t, 'fit_preset', fails(2)); found = tune(shop, tmp_path/'a', 'sasrec', 3, SMALL, length=20, tell=lambda text: None)
    assert found['state'].to_list()[1] == 'fail' and 'loss is nan' in found['error'][1] and len(found) == 3
    calls.clear(); monkeypatch.setattr(t, 'fit_preset', fails(1))
    with pytest.raises(ImecdError, match='loss is nan'): tune(shop, tmp_path/'b', 'sasrec', 3, SMALL, length=20, tell=lambda text: None)


def test_two_processes_do_not_search_in_one_folder(shop, tmp_path):
    from filelock import FileLock
    (tmp_path/'s').mkdir()
    with FileLock(tmp_path/'s'/'.lock'), pytest.raises(ImecdError, match='another process is searching'): tune(shop, tmp_path/'s', 'sasrec', 1, SMALL, length=20)


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_has_a_space_with_its_defaults(name):
    space, first = space_of(name, {}), default_trial(name, {}, space_of(name, {})); assert 'train.lr' in space and set(first) <= set(space) and len(space) <= len(SPACE)+3


def test_a_study_that_is_killed_goes_on(shop, tmp_path, imecd):
    "SIGKILL for the study alone: its process ends by itself, and the same command makes what is missing."
    args = ('ablate', shop, '--out', tmp_path/'s', '--model', 'popularity', '--model', 'sasrec', '--seeds', 1, '--length', 20, *SET, '--set', 'train.epochs=40', '--set', 'train.patience=40')
    child = begin(*args); log = tmp_path/'s'/'sasrec-0.training'/'history.jsonl'; until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, child)
    child.send_signal(signal.SIGKILL); child.wait(); done = (tmp_path/'s'/'popularity'/'config.json').stat().st_mtime_ns; time.sleep(3)
    rows = log.read_text(); time.sleep(1); assert rows == log.read_text() and not (tmp_path/'s'/'sasrec-0').exists()
    code, out, err = imecd(*args); assert code == 0, err; assert '| sasrec' in out and (tmp_path/'s'/'popularity'/'config.json').stat().st_mtime_ns == done
    alone = train_run(shop, tmp_path/'alone', 'sasrec', {**SMALL, 'train.epochs': 40, 'train.patience': 40}, length=20); assert alone.ranks.equals(load_run(tmp_path/'s'/'sasrec-0').ranks)


def test_a_plan_is_checked_before_anything_runs():
    assert [j.name for j in plan(['imecd', 'transition_knn'], 2, {'codes': [8]})] == ['imecd-0', 'transition_knn', 'imecd-codes=8-0', 'imecd-1', 'imecd-codes=8-1']
    for bad, words in (((['imedc'],), "did you mean 'imecd'"), ((['imecd'], 1, {'codse': [1]}), "did you mean 'codes'"), ((['imecd'], 1, {'codes': ['many']}), 'must be int'), ((['imecd'], 1, None, {'train.lr': 0}), 'lr=0')):
        with pytest.raises(ImecdError, match=words): plan(*bad)


def test_ablations_are_those_that_the_data_allows(shop, capsys):
    found = ablations(shop); assert set(found) < set(PRESETS) and not {'image_only', 'id+image', 'wo_id_stream_keep_gate'} & set(found) and 'offers no image;' in capsys.readouterr().err


def test_the_table_is_what_the_runs_say(study):
    groups = group_runs(find_runs([study[0].parent]), 'sasrec'); table = seed_table(groups); x = [r.metrics['test']['ndcg@10'] for r in groups[0].runs]
    assert table['model'].to_list() == ['sasrec', 'popularity'] and table['seeds'].to_list() == [2, 1] and table['ndcg@10'][0] == pytest.approx(np.mean(x)) and table['ndcg@10 sd'][0] == pytest.approx(np.std(x, ddof=1)) and table['ndcg@10 sd'][1] is None
    tests = compare_runs(groups); a = np.mean([ndcg(r.ranks.filter(split='test').sort('user')['rank'].to_numpy(), 10) for r in groups[0].runs], 0); b = ndcg(groups[1].runs[0].ranks.filter(split='test').sort('user')['rank'].to_numpy(), 10)
    assert tests['difference'][0] == pytest.approx((a-b).mean()) and tests['low'][0] < tests['difference'][0] < tests['high'][0] and tests['relative'][0] == pytest.approx((a-b).mean()/b.mean())
    assert per_user(groups[0], 'ndcg@10', False)['n'].unique().to_list() == [2] and compare_runs(groups, 'hr@5', True)['metric'][0] == 'hr@5 masked'
    assert slice_table(groups).filter(model='sasrec', slice='all')['ndcg@10'][0] == pytest.approx(np.mean(x))


def test_a_report_from_the_shell(study, tmp_path, capsys):
    main(['compare', *map(str, study), '--first', 'sasrec', '--out', str(tmp_path/'r')]); out = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path/'r').iterdir()) == ['compare.png', 'report.md', 'seeds.png', 'slices.csv', 'table.csv', 'tests.csv'] and out.strip() == (tmp_path/'r'/'report.md').read_text().strip()
    for more, column in (([], 'hr@5'), (['--masked'], 'hr@5 masked'), (['--metric', 'hr@7'], 'ndcg@10')):  # what is tested stands in the table, where runs know it
        main(['compare', *map(str, study), '--first', 'sasrec', '--metric', 'hr@5', *more, '--out', str(tmp_path/'m')]); capsys.readouterr(); t = pl.read_csv(tmp_path/'m'/'table.csv')
        own = [r.metrics['test_masked' if more[:1] == ['--masked'] else 'test'][column.split()[0]] for r in group_runs(find_runs([study[0].parent]), 'sasrec')[0].runs]; assert t[column][0] == pytest.approx(np.mean(own)) and 'hr@7' not in t.columns
    for args, words in ((('compare', tmp_path), 'is no run folder and holds none'), (('compare', study[0].parent, '--first', 'imecd'), 'they are'), (('compare', study[0].parent/'popularity'), 'give runs of at least two'),
                        (('compare', study[0].parent, '--metric', 'auc'), 'not one of hr@K'), (('tune', 'nowhere', '--out', tmp_path/'t', '--model', 'popularity'), 'is no network'), (('ablate', study[0], '--out', tmp_path/'x', '--sweep', 'codes'), 'name=value')):
        with pytest.raises(SystemExit) as stop: main([*map(str, args), *(['--out', str(tmp_path/'z')] if args[0] == 'compare' else [])])
        assert stop.value.code == 2 and words in (err := capsys.readouterr().err) and err.count('\n') <= 2, (args, err)


def test_answers_to_other_questions_are_refused(study, shop, tmp_path):
    from imecd.shop import make_shop
    make_shop(tmp_path/'other', n_users=100, n_items=60, seed=9, pictures=False); other = run_jobs(tmp_path/'other', tmp_path/'o', [Job('popularity', {}, 0)], tell=print)
    with pytest.raises(ImecdError, match='data is .* compare answers to the same questions'): group_runs(find_runs([study[0].parent, *other]))
    late = run_jobs(shop, tmp_path/'late', [Job('popularity', {}, 0)], more=('--split', 'time'), tell=print)
    with pytest.raises(ImecdError, match='split is time'): group_runs(find_runs([study[0].parent, *late]))


def test_groups_of_one_model_are_told_apart(study, shop, tmp_path):
    wide = run_jobs(shop, tmp_path/'w', [Job('sasrec', {'dropout': .1}, 0)], 1, SMALL, ('--length', '20'), tell=print)
    assert [g.name for g in group_runs(find_runs([*study, *wide]))] == ['sasrec, dropout=0.5', 'popularity', 'sasrec, dropout=0.1']


def test_a_child_outlives_nobody(tmp_path):
    inner = f'import os, time, pathlib; pathlib.Path("{tmp_path}/pid").write_text(str(os.getpid())); from imecd.studies import end_with_parent; end_with_parent(every=.1); pathlib.Path("{tmp_path}/on").touch(); time.sleep(60)'
    child = subprocess.Popen([sys.executable, '-c', f'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", {inner!r}]); time.sleep(60)']); until(lambda: (tmp_path/'on').exists(), child); pid = int((tmp_path/'pid').read_text()); child.kill(); child.wait(); end = time.time()+5
    while Path(f'/proc/{pid}/stat').exists() and Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z' and time.time() < end: time.sleep(.05)
    assert not Path(f'/proc/{pid}/stat').exists() or Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z'


def test_a_training_whose_parent_ended_while_it_began_ends_too(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', '']); dead.wait()
    ended = subprocess.run([sys.executable, '-c', f'import time; from imecd.studies import end_with_parent; end_with_parent({dead.pid}, .1); time.sleep(60)'], timeout=50, capture_output=True, text=True); assert ended.returncode == 1 and 'has ended' in ended.stderr
    told = command(tmp_path, tmp_path/'run', Job('sasrec', {}, 0), {}); assert f'end_with_parent({os.getpid()})' in told[2]


def test_a_study_of_something_else_is_refused(shop, tmp_path, imecd):
    ask = lambda *more: imecd('ablate', shop, '--out', tmp_path/'s', '--model', 'popularity', '--seeds', 1, *more); code, out, err = ask(); assert code == 0 and '| popularity' in out and '1 of 1 runs are to be made, 1 at one time' in err, err
    for more, words in ((('--length', 10), 'options was'), (('--set', 'train.epochs=1'), 'settings was {} and is')): code, out, err = ask(*more); assert code and words in err and not out
    other = make_shop(tmp_path/'other', n_users=60, n_items=50, pictures=False); code, out, err = imecd('ablate', other, '--out', tmp_path/'s', '--model', 'popularity', '--seeds', 1); assert code and 'holds another study: data was' in err and not out
    (tmp_path/'s'/'study.json').unlink(); code, out, err = imecd('ablate', other, '--out', tmp_path/'s', '--model', 'popularity', '--seeds', 1); assert code and 'data was' in err  # the runs themselves say so too


def test_long_names_leave_room_for_the_figure(tmp_path):
    import matplotlib.pyplot as plt

    from imecd.significance import plot_compare
    ax = plot_compare(pl.DataFrame([{'model': 'a'*60, 'against': 'transition_knn, decay=0.35, direction=both, pop_norm=0.5, shrinkage=1', 'metric': 'ndcg@10', 'difference': .1, 'low': 0., 'high': .2, 'p_holm': 1.}])); ax.figure.canvas.draw()
    assert ax.get_position().width > .45; plt.close(ax.figure)
