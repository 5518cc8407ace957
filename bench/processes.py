"""One process with all cores against two processes with half of them each: the same steps of the full model on one processor.

    python bench/processes.py [DATA]           default $IMECD_DATA/amazon18_instruments; one JSON line
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = Path(sys.executable).with_name('imecd')


def training(folder, out, world):
    "Targets per second of the last epoch, the first in which every term counts."
    cores = os.cpu_count(); launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(world), '--no-python'] if world > 1 else []
    call = [*launcher, str(COMMAND), 'train', str(folder), '--out', str(out), '--epochs', '3', '--device', 'cpu']
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': str(max(1, cores//world)), 'IMECD_PROGRESS': 'off'})
    return json.loads((out/'history.jsonl').read_text().splitlines()[-1])['targets/s']


def main(folder):
    with tempfile.TemporaryDirectory() as tmp: found = {world: [training(folder, Path(tmp)/f'{world}.{i}', world) for i in range(2)] for world in (1, 2)}
    best = {world: max(speeds) for world, speeds in found.items()}
    print(json.dumps({'data': folder.name, 'one_process_targets_per_second': best[1], 'two_processes_targets_per_second': best[2], 'two_over_one': best[2]/best[1]}))


if __name__ == '__main__': main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ.get('IMECD_DATA', 'data'))/'amazon18_instruments')
