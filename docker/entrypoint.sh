#!/usr/bin/env bash
# The one way in, for docker run, Slurm and Kubernetes alike; every node of a job runs the same command:
#
#   entrypoint.sh train|score|pipeline|quickstart [KEY=VALUE ...]   a tool of many processes, under torchrun
#   entrypoint.sh NAME [ARGUMENT ...]                               any other tools/NAME.py, in one process
#   entrypoint.sh COMMAND [ARGUMENT ...]                            anything else, as it is
#
#   NNODES          nodes of the job; Slurm's step, else 1
#   NODE_RANK       number of this node, from 0; Slurm's, or with one node 0
#   NPROC_PER_NODE  processes of this node; else one for each GPU that it sees
#   MASTER_ADDR     name or address of node 0; with Slurm the first of the step
#   MASTER_PORT     a free port of node 0; else one by Slurm's job number, or 29500
set -euo pipefail

# How long a node waits for the others: pulling a large image takes one node longer than another. Where one was lost,
# the ranks of the others may wait for parallel.timeout_minutes=30 and a minute more before they end and join again.
readonly rendezvous_seconds=2700

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { # place, found, expected
    echo "error: $1: found $2; expected $3" >&2
    exit 2
}

# A number of an environment variable, or an error that names it.
number() { # name, value, least, expected
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        refuse "$1" "${2:-nothing}" "$4"
    fi
}

# The first host of a list as Slurm writes it: rack[1-2]node[03-05,09],x1 -> rack1node03
first_host() {
    local list=$1 host=
    while [[ $list =~ ^([^][,]*)\[([^],-]+)[^]]*\](.*)$ ]]; do
        host+=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
        list=${BASH_REMATCH[3]}
    done
    echo "$host${list%%,*}"
}

visible_gpus() {
    local listed
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        # CUDA sees those before the first that is none: -1, NoDevFiles.
        local count=0 device
        IFS=', ' read -ra listed <<<"$CUDA_VISIBLE_DEVICES"
        for device in "${listed[@]}"; do
            [[ $device =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
            count=$((count + 1))
        done
        echo "$count"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

# Leave this shell for the command, so that signals reach it. NVIDIA's images set up libraries for older drivers in an
# entry point of their own, which ends in its arguments.
become() {
    local nvidia=/opt/nvidia/nvidia_entrypoint.sh
    if [[ -x $nvidia ]]; then
        exec "$nvidia" "$@"
    fi
    exec "$@"
}

launch() { # tool, arguments
    local nnodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
    local tasks=${SLURM_STEP_NUM_TASKS:-$nnodes}
    local nproc=${NPROC_PER_NODE:-$(visible_gpus)}
    number NNODES "$nnodes" 1 "the number of nodes"
    [[ $tasks == "$nnodes" ]] ||
        refuse SLURM_STEP_NUM_TASKS "$tasks tasks on $nnodes nodes" "one a node (srun --ntasks-per-node=1)"
    [[ $nproc != 0 ]] || refuse NPROC_PER_NODE "nothing, and no GPU" "the number of processes of a node"
    number NPROC_PER_NODE "$nproc" 1 "the number of processes of a node"
    local options=("--nnodes=$nnodes" "--nproc-per-node=$nproc")
    if ((nnodes == 1)); then
        options+=(--standalone)
    else
        local rank=${NODE_RANK:-${SLURM_NODEID:-}}
        local address=${MASTER_ADDR:-$(first_host "${SLURM_STEP_NODELIST:-}")}
        local job=${SLURM_JOB_ID:-9500}
        number SLURM_JOB_ID "$job" 0 "the number of a job"
        local port=${MASTER_PORT:-$((job % 10000 + 20000))}
        local ranks="0 to $((nnodes - 1)), another on each of NNODES=$nnodes"
        number NODE_RANK "$rank" 0 "$ranks"
        ((rank < nnodes)) || refuse NODE_RANK "$rank" "$ranks"
        [[ $address ]] || refuse MASTER_ADDR nothing "the name of node 0, the same on each of NNODES=$nnodes"
        number MASTER_PORT "$port" 1 "a port of node 0, 1 to 65535"
        ((port <= 65535)) || refuse MASTER_PORT "$port" "a port of node 0, 1 to 65535"
        options+=("--node-rank=$rank" "--master-addr=$address" "--master-port=$port")
        options+=("--rdzv-conf=timeout=$rendezvous_seconds")
    fi
    # Node 0's torchrun holds two connections a rank: a soft limit of 1,024 files would end at some 500 ranks.
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
    become torchrun "${options[@]}" "$@"
}

(($#)) || refuse "command line" nothing "train, score, pipeline, another tool, or a command"
# Outside a container, the environment that make has made.
command -v torchrun >/dev/null || PATH=$root/.venv/bin:$PATH
command=$1
shift
case $command in
    train | score | pipeline | quickstart) launch "$root/tools/$command.py" "$@" ;;
    *[!a-z_]*) become "$command" "$@" ;;
    *)
        if [[ -f $root/tools/$command.py ]]; then
            become python "$root/tools/$command.py" "$@"
        fi
        become "$command" "$@"
        ;;
esac
