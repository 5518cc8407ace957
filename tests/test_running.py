"One run, from folder to folder: killed and gone on with from the shell, never over what is there."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from imecd.core import ImecdError
from imecd.running import kept_training, may_begin, train_run, training_folder

SMALL = [x for pair in ('dim=16', 'heads=2', 'inner=32', 'layers=1', 'codes=8', 'train.epochs=6', 'train.warmup=1', 'train.targets=256') for x in ('--set', pair)]


def files(run): return {p.name: p.read_bytes() for p in run.iterdir() if p.suffix in ('.safetensors', '.parquet') or p.name in ('metrics.json', 'config.json')}


def test_a_training_killed_from_the_shell_goes_on(imecd, shop, tmp_path):
    "SIGKILL after some epochs; the same command refuses to begin anew, and with --resume ends in the run that was never killed."
    command = ['train', shop, *SMALL, '--length', 20]; code, _, err = imecd(*command, '--out', tmp_path/'whole'); assert code == 0, err
    assert [json.loads(x)['epoch'] for x in (tmp_path/'whole/history.jsonl').read_text().splitlines()] == pl.read_csv(tmp_path/'whole/history.csv')['epoch'].to_list()
    argv = [str(Path(sys.executable).with_name('imecd')), *map(str, command), '--out', str(tmp_path/'run')]; last = training_folder(tmp_path/'run')/'last.safetensors'
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())})
    while not last.exists() and child.poll() is None: time.sleep(.005)
    child.send_signal(signal.SIGKILL); child.wait(); assert child.returncode == -signal.SIGKILL and not (tmp_path/'run').exists()
    code, _, err = imecd(*command, '--out', tmp_path/'run'); assert code == 2 and 'add --resume' in err and last.exists()
    code, _, err = imecd(*command, '--out', tmp_path/'run', '--set', 'train.lr=.1', '--resume'); assert code == 2 and 'training, lr was 0.001 and is 0.1' in err and last.exists()
    code, _, err = imecd(*command, '--out', tmp_path/'run', '--resume'); assert code == 0, err
    assert files(tmp_path/'run') == files(tmp_path/'whole') and not training_folder(tmp_path/'run').exists()


def test_an_interrupt_names_what_is_kept(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), kept_training(tmp_path/'run') as folder: folder.mkdir(); (folder/'last.safetensors').touch(); raise KeyboardInterrupt
    assert f'note: {tmp_path}/run.training keeps what was trained; the same command with --resume goes on' in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), kept_training(tmp_path/'other'): raise KeyboardInterrupt
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('name, told', [('imecdd', "did you mean 'imecd'"), ('SASRec', "did you mean 'sasrec'"), ('knn', "'transition_knn' or 'content_knn'"), ('', 'there are'), ('a', 'there are'), (None, 'there is no model None')])
def test_a_model_that_is_none_is_named(name, told, shop, tmp_path):
    with pytest.raises(ImecdError, match=told): train_run(shop, tmp_path/'run', name, {})
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path/'run').mkdir(); (tmp_path/'run/precious').touch()
    for resume in (False, True):
        with pytest.raises(ImecdError, match='exists and is not empty'): may_begin(tmp_path/'run', resume)
    may_begin(tmp_path/'new', True); assert 'nothing to resume' in capsys.readouterr().err


def test_a_run_can_be_followed(imecd, shop, tmp_path):
    code, _, err = imecd('train', shop, *SMALL, '--epochs', 1, '--out', tmp_path/'run', '--track', 'tensorbored'); assert code == 2 and "no tracker 'tensorbored'" in err
    assert list(tmp_path.iterdir()) == []


def test_logs_of_trackers_outlive_the_training(imecd, shop, tmp_path):
    pytest.importorskip('tensorboard')
    assert imecd('train', shop, '--out', tmp_path/'run', '--length', 20, '--epochs', 2, '--track', 'tensorboard', *(x for s in ('dim=16', 'layers=1', 'inner=32', 'codes=4', 'streams=id+text') for x in ('--set', s)))[0] == 0
    assert [*(tmp_path/'run').rglob('*tfevents*')] and not training_folder(tmp_path/'run').exists()


def test_what_is_no_checkpoint_is_kept(tmp_path):
    out, folder = tmp_path/'run', training_folder(tmp_path/'run'); out.mkdir(); (out/'metrics.json').write_text('{}')
    with kept_training(out) as there:
        assert there == folder; (folder/'last.a').mkdir(parents=True); (folder/'last.a'/'x.safetensors').touch()
        for name in ('last.safetensors', 'best.safetensors', '.best.safetensors.x', 'notes', 'history.jsonl', 'metrics.json'): (folder/name).touch()
    assert {p.name for p in out.iterdir()} == {'metrics.json', 'notes', 'history.jsonl'} and (out/'metrics.json').read_text() == '{}' and [p.name for p in folder.iterdir()] == ['metrics.json']


def test_a_model_that_only_counts_does_not_touch_a_training(shop, tmp_path):
    folder = training_folder(tmp_path/'run'); folder.mkdir(); (folder/'last.safetensors').touch()
    for resume in (False, True):
        with pytest.raises(ImecdError, match='popularity is counted in one go'): train_run(shop, tmp_path/'run', 'popularity', {}, resume=resume)
    assert (folder/'last.safetensors').exists()


def test_a_finished_run_that_is_resumed_is_finished(shop, tmp_path, imecd):
    "A queued job that runs again ends well; another one is refused, and so are fewer epochs than were trained."
    train = lambda *more: imecd('train', shop, '--out', tmp_path/'run', '--set', 'dim=16', '--resume', *more)
    code, _, err = train('--epochs', 1); assert code == 0 and 'is all warm-up (train.warmup=2)' in err and not (tmp_path/'run/figures/path.png').exists() and (tmp_path/'run/figures/gates.png').exists()
    before = (tmp_path/'run/model.safetensors').stat().st_mtime_ns; code, out, err = train('--epochs', 1); assert code == 0 and 'is finished already' in err and 'ndcg@10' in out and before == (tmp_path/'run/model.safetensors').stat().st_mtime_ns
    for more, words in ((('--epochs', 2), 'train.epochs was 1 and is 2'), (('--model', 'sasrec', '--epochs', 1), "model was 'imecd' and is 'sasrec'")): code, _, err = train(*more); assert code and words in err


def test_a_place_that_cannot_be_written_is_found_before_training(shop, tmp_path, imecd):
    (tmp_path/'file').write_text(''); code, _, err = imecd('train', shop, '--out', tmp_path/'file'/'run', '--epochs', 1); assert code and 'no folder that may be written to' in err and 'epoch' not in err.split('written to')[0]


def test_a_field_of_the_training_is_named(shop, tmp_path, imecd):
    code, _, err = imecd('train', shop, '--out', tmp_path/'run', '--set', 'epochs=1'); assert code and 'did you mean train.epochs?' in err
