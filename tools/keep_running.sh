#!/usr/bin/env bash
# Keep a run going on a machine without a queue: start it again until it is completed.
#
#     tools/keep_running.sh RUN COMMAND ...
#     tools/keep_running.sh runs/mine torchrun --standalone --nproc-per-node=8 tools/train.py \
#         --config-file configs/digits.yaml
#
# COMMAND gets `OUTPUT_DIR RUN --resume` at its end, and from the second attempt on `--allow CODE`:
# only the first stops where the task's files have changed. It is not started again after bad usage
# (exit code 2), where a person left a file RUN/STOP, or when two attempts in a row made no
# progress. Ctrl-C, or SIGTERM, stops the run and the loop.

set -u
if [ $# -lt 2 ]; then
    echo "usage: tools/keep_running.sh RUN COMMAND ..." >&2
    exit 2
fi
run=$1
shift
python=${PYTHON:-python}
folder=$(mktemp -d)
child='' asked='' edited=''

again() { "$python" -m launcher runs status "$run" --again "$folder/attempts"; }

stop() {
    asked=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop INT TERM
trap 'rm -rf "$folder"' EXIT

again
code=$?
while [ "$code" -eq 75 ] && [ -z "$asked" ]; do
    # In the background, since a shell's traps wait for what is in front.
    "$@" OUTPUT_DIR "$run" --resume ${edited:+--allow CODE} &
    child=$!
    [ -z "$asked" ] || stop # it came just before
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    child=''
    edited=allowed # nobody is there to say so: an author who edits ends no run at night
    [ "$code" -ne 2 ] || exit 2
    [ -n "$asked" ] && break
    again
    code=$?
done
if [ -n "$asked" ]; then
    "$python" -m launcher runs status "$run" # torchrun ends with 1 when it is asked to stop
    code=$?
fi
exit "$code"
