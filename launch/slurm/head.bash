#!/usr/bin/env bash
# The command of the cluster's head: PRIVATE ADDRESS COMMAND WORD...
#
# ray.bash needs the command's process id, since symmetric-run does not forward signals, and its
# exit code, since srun returns the highest one of all nodes, and nodes that it ends count as
# killed.
private=$1 RAY_ADDRESS=$2
export RAY_ADDRESS
shift 2
# shellcheck disable=SC2016  # for the inner shell
bash -c 'echo $$ >"$0"; exec "$@"' "$private/pid" "$@"
code=$?
echo "$code" >"$private/code"
exit "$code"
