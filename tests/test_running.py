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

from imecd.core import ImecdError
from imecd.running import kept_training, may_begin, training_folder

SMALL = [x for pair in ('dim=16', 'heads=2', 'inner=32', 'layers=1', 'codes=8', 'train.epochs=6', 'train.warmup=1', 'train.targets=256') for x in ('--set', pair)]


def files(run): return {p.name: p.read_bytes() for p in run.iterdir() if p.suffix in ('.safetensors', '.parquet') or p.name in ('metrics.json', 'config.json')}


def test_a_training_killed_from_the_shell_goes_on(imecd, shop, tmp_path):
    "SIGKILL after some epochs; the same command refuses to begin anew, and with --resume ends in the run that was never killed."
    command = ['train', shop, *SMALL, '--length', 20]; code, _, err = imecd(*command, '--out', tmp_path/'whole'); assert code == 0, err
    assert [json.loads(x)['epoch'] for x in (tmp_path/'whole/history.jsonl').read_text().splitlines()] == pl.read_csv(tmp_path/'whole/history.csv')['epoch'].to_list()
    argv = [str(Path(sys.executable).with_name('imecd')), *map(str, command), '--out', str(tmp_path/'run')]; last = training_folder(tmp_path/'run')/'last.safetensors'
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
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


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path/'run').mkdir(); (tmp_path/'run/precious').touch()
    for resume in (False, True):
        with pytest.raises(ImecdError, match='exists and is not empty'): may_begin(tmp_path/'run', resume)
    may_begin(tmp_path/'new', True); assert 'nothing to resume' in capsys.readouterr().err


def test_a_run_can_be_followed(imecd, shop, tmp_path):
    code, _, err = imecd('train', shop, *SMALL, '--epochs', 1, '--out', tmp_path/'run', '--track', 'tensorbored'); assert code == 2 and "no tracker 'tensorbored'" in err
    assert list(tmp_path.iterdir()) == []
