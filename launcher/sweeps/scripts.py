"""The scripts that run a sweep's points. They stand alone: an installed package has no tools/."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def filled(script: str, path: Path, count: int) -> str:
    """A script for the sweep in this directory, to be run from where that was made."""
    known = {
        "@DIR@": shlex.quote(str(path)),
        "@CWD@": shlex.quote(os.getcwd()),
        "@LAST@": str(count - 1),
        "@LOG@": f"{path}/slurm-%A_%a.out",
    }
    for name, value in known.items():
        script = script.replace(name, value)
    return script


ARRAY = """\
#!/usr/bin/env bash
# The points of a sweep as an array job of Slurm's. Made by `launcher sweep`; change it as you like.
#
#     sbatch sweep.sbatch [OPTIONS of launcher train]
#
# Submit it as often as you like: a completed point is left alone, any other goes on, until it is
# completed, a person left a file STOP, or two attempts in a row made no progress.
# Lines of #SBATCH can be overridden on sbatch's command line; --array=0-@LAST@%4 runs 4 at a time.
#
#SBATCH --array=0-@LAST@
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# A warning 5 minutes before the end: to the ranks, which save and leave.
#SBATCH --signal=USR1@300
# Slurm itself starts a point again after a preemption or a node's failure.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@LOG@

set -u
cd @CWD@ || exit 1
dir=@DIR@
python=${PYTHON:-python}
configs=("$dir"/configs/*.yaml)
config=${configs[$SLURM_ARRAY_TASK_ID]}
run=$dir/runs/$(basename "$config" .yaml)
# Of this point alone: the job id of an array's last point stands for all of them.
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
notes=$dir/slurm-$job.attempts

again() { "$python" -m launcher runs status "$run" --again "$notes"; }

"$python" -m launcher runs status "$run" 2>/dev/null
case $? in
    0) rm -f "$notes"; exit 0 ;;  # completed
    3) exit 3 ;;  # another job runs it
esac
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$run/STOP" ]; then
    echo "sweep: not started again: there is $run/STOP"
    exit 1
fi
[ -e "$notes" ] || again

# As in the launcher's own job file: a rank that leaves ends no other, for rank 0 may still save.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun --kill-on-bad-exit=0 --wait=0 \\
    "$python" -m launcher train --config-file "$config" "$@" OUTPUT_DIR "$run" --resume
if [ $? -eq 2 ]; then
    echo "sweep: not requeued: this would only repeat itself"
    exit 2
fi
again
code=$?
if [ "$code" -eq 75 ]; then
    echo "sweep: back to the queue"
    exec scontrol requeue "$job"
fi
rm -f "$notes"
exit "$code"
"""

LOOP = """\
#!/usr/bin/env bash
# The points of a sweep on this machine, one after the other. Made by `launcher sweep`; change it as
# you like.
#
#     sweep.sh                          each as one process
#     sweep.sh torchrun --standalone --nproc-per-node=8 -m launcher train
#
# Start it as often as you like, also beside another one, with a GPU of its own: a completed point
# is left alone, one that runs is passed over, any other goes on, until it is completed, a person
# left a file STOP, or two attempts in a row made no progress; then the next one follows. Exits 0
# where all are completed, 1 where one failed, else 75. Ctrl-C, or SIGTERM, stops the run and the
# loop.

set -u
cd @CWD@ || exit 1
dir=@DIR@
python=${PYTHON:-python}
[ $# -gt 0 ] || set -- "$python" -m launcher train
folder=$(mktemp -d)
child='' asked='' failed='' left=''

status() { "$python" -m launcher runs status "$run"; }
again() { "$python" -m launcher runs status "$run" --again "$notes"; }

stop() {
    asked=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop INT TERM
trap 'rm -rf "$folder"' EXIT

for config in "$dir"/configs/*.yaml; do
    [ -z "$asked" ] || break
    point=$(basename "$config" .yaml)
    run=$dir/runs/$point notes=$folder/$point
    echo "sweep: point $point"
    status 2>/dev/null
    code=$?
    if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then
        again
        code=$?
    fi
    while [ "$code" -eq 75 ] && [ -z "$asked" ]; do
        # In the background, since a shell's traps wait for what is in front.
        "$@" --config-file "$config" OUTPUT_DIR "$run" --resume &
        child=$!
        [ -z "$asked" ] || stop # it came just before
        while kill -0 "$child" 2>/dev/null; do
            wait "$child"
            code=$?
        done
        child=''
        [ -z "$asked" ] || break
        if [ "$code" -eq 2 ]; then # this would only repeat itself, but where another runs it by now
            status
            [ $? -eq 3 ] && code=3
            break
        fi
        again
        code=$?
    done
    if [ -n "$asked" ]; then
        status
        code=$?
    fi
    case $code in
        0) ;;
        3 | 75) left="$left $point" ;;
        *) failed="$failed $point" ;;
    esac
done
[ -z "$left" ] || echo "sweep: left to go on with, or running elsewhere:$left" >&2
if [ -n "$failed" ]; then
    echo "sweep: failed:$failed (see $dir/runs)" >&2
    exit 1
fi
[ -z "$left$asked" ] || exit 75
"""
