"Memory of this process. Not `ru_maxrss`: a child inherits that of its parent."
import resource
from pathlib import Path

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


def status(field):
    "A field of /proc/self/status in MB, where there is one."
    lines = [line.split() for line in STATUS.read_text().splitlines()] if STATUS.exists() else []
    return next((int(words[1])/1024 for words in lines if words and words[0] == field+':'), None)


def held():
    "What the process holds now, in MB; from here on the peak is counted."
    if CLEAR.exists(): CLEAR.write_text('5')
    return status('VmRSS') or peak()


def peak():
    "The most that the process held since `held`, in MB; since its start where the system cannot forget."
    return status('VmHWM') or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
