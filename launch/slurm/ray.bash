# shellcheck shell=bash
# The common part of train.sbatch and tune.sbatch, which source it in the submission folder.

gpus=${SLURM_GPUS_ON_NODE:-0}

# Print the value of a flag in a command line: FLAG DEFAULT WORD...
value_of() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
        "$flag") value=${2-} ;;
        "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# Ask the command to save and exit. It runs on this node: Slurm starts batch scripts on a job's
# first node, whose address is the head's.
stop() {
    signals=$((signals + 1))
    if [[ -s $private/pid ]]; then
        kill -TERM "$(<"$private/pid")" 2>/dev/null || true # it may have ended just now
    else
        kill -TERM "$step" # Ray is still starting: there is nothing to save
    fi
}

# Run a module on a Ray cluster of the job's nodes, and exit with its exit code:
# MODULE WORD...
on_ray() {
    local module=$1 name storage
    shift
    name=$(value_of --name "slurm-$SLURM_JOB_ID" "$@") # a requeued job keeps its id
    storage=$(value_of --storage-path runs "$@")
    if ((${SLURM_RESTART_COUNT:-0})) && [[ -e $storage/$name/config.yaml ]]; then
        set -- --resume # with the settings that are saved there
    fi
    set -- "$@" --name "$name" --storage-path "$storage"

    # A token for this job keeps the node's other users out of its cluster. It is passed in a file
    # that only this user can read, since all users can read command lines.
    private=$(mktemp -d "$PWD/.ray-$SLURM_JOB_ID.XXXXXX")
    trap 'rm -rf -- "$private"' EXIT
    (
        umask 077
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$private/token"
    )
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token

    # /tmp/ray belongs to the first user who ran Ray on the node.
    export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
    # All workers of a node map one file: keep it out of a home that is mounted over the network.
    export CIFAR_DIST_CACHE=${CIFAR_DIST_CACHE:-/tmp/cifar_dist-$(id -u)}
    # Seconds for all nodes to join. The first import from a shared folder is slow.
    export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
    # Seconds after which Ray on the other nodes stops waiting for the head, which does not return
    # at the end of the run; otherwise they hold the job for another minute. Not less than
    # `ray stop` takes on the head, about 8: symmetric-run itself is connected, and would fail.
    export RAY_gcs_rpc_server_reconnect_timeout_s=20
    # Since Slurm 22.05 srun no longer inherits this from sbatch.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    # Unbuffered, so that the job's output file shows each epoch as it ends.
    export PYTHONUNBUFFERED=1
    export PATH=$PWD/.venv/bin:$PATH

    local head address
    # An address, not a name: if a node's name resolves to 127.0.1.1 on the node itself, no node
    # would be the head. HEAD_IP selects one of several networks.
    head=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
    # Below the ephemeral ports of outgoing connections, above those of Ray's workers.
    address=$head:$((20000 + SLURM_JOB_ID % 10000))

    signals=0
    local requeue=0 code seen
    trap 'requeue=1; stop' USR1
    trap 'requeue=0; stop' TERM INT
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" \
        "--num-cpus=$SRUN_CPUS_PER_TASK" "--num-gpus=$gpus" --disable-usage-stats \
        -- bash launch/slurm/head.bash "$private" "$address" python -m "$module" "$@" &
    step=$!
    while :; do # a signal interrupts wait
        seen=$signals code=0
        wait "$step" || code=$?
        ((seen == signals)) && break
    done
    if [[ -s $private/code ]]; then
        code=$(<"$private/code")
    elif ((signals)); then
        code=130 # stopped before the command began
    fi

    case $requeue,$code in
    1,130) scontrol requeue "$SLURM_JOB_ID" ;;
    # After a failure the folder is kept, for Ray's logs.
    *,0) srun --ntasks-per-node=1 rm -rf -- "$RAY_TMPDIR" || true ;;
    esac
    exit "$code"
}
