#!/usr/bin/env bash
# A batch script on the first of SLURM_NNODES nodes of one machine: nodes.bash SCRIPT WORD...
#
# Each node is a network and a process namespace, so that `ray stop` on one of them stops no Ray of
# another, nor one of the machine's. Itself run under
# `unshare --net --mount --pid --fork --kill-child --mount-proc`, which takes all of it away again.
set -euo pipefail

mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link add fabric type bridge
ip link set fabric up
ip link add to0 type veth peer name eth0
ip link set to0 master fabric up
ip addr add 10.214.0.1/24 dev eth0
ip link set eth0 up
ip link set lo up

# What srun asks of node $1, one task after another.
serve() {
    local task code
    while sleep 0.2; do
        for task in "$NODES/$1".*.task; do
            [[ -e $task ]] || continue
            mv "$task" "$task.taken"
            # shellcheck disable=SC2016  # for the node's shell
            ip netns exec "node$1" unshare --mount --pid --fork --kill-child --mount-proc bash -c '
                mkdir -p "$2" && mount -t tmpfs none "$2" && exec bash "$1"' \
                bash "$task.taken" "$disk" >>"$NODES/node$1.log" 2>&1 &
            while kill -0 $! 2>/dev/null; do
                [[ ! -e ${task%.task}.kill ]] || kill -KILL $! 2>/dev/null || true
                sleep 0.2
            done
            code=0
            wait $! || code=$?
            echo "$code" >"${task%.task}.code"
        done
    done
}

disk=/tmp/ray-$SLURM_JOB_ID # what nodes do not share
for ((i = 1; i < SLURM_NNODES; i++)); do
    ip netns add "node$i"
    ip link add "to$i" type veth peer name eth0 netns "node$i"
    ip link set "to$i" master fabric up
    ip -n "node$i" addr add "10.214.0.$((i + 1))/24" dev eth0
    ip -n "node$i" link set eth0 up
    ip -n "node$i" link set lo up
    # Ray asks which of its addresses leads outside, and waits for a name server where none does.
    ip -n "node$i" route add default via 10.214.0.1
    serve "$i" &
done
exec unshare --pid --fork --kill-child --mount-proc bash "$@"
