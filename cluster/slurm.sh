#!/usr/bin/env bash
# A Ray cluster within one Slurm job, and one command on it:   sbatch cluster/slurm.sh run -f photos.yaml
# Submit it again after any failure, time limit or pre-emption: it goes on where it was.
# Yours to change: the lines of #SBATCH and those down to the line of equal signs.
#SBATCH --job-name=hardmoe
#SBATCH --partition=gpu              # your site's
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0                      # all of each node's
#SBATCH --time=24:00:00
#SBATCH --requeue                    # after a pre-emption
#SBATCH --signal=B:TERM@120          # two minutes to make checkpoints before the time limit

ENVIRONMENT=${ENVIRONMENT:-$HOME/hardmoe/.venv}    # made by 'make' on a file system that all nodes see
PORT=${PORT:-6379}
SCRATCH=${SCRATCH:-/tmp/ray-$SLURM_JOB_ID}         # on each node's own disk

# ======================================================================================================================

set -euo pipefail
export PATH="$ENVIRONMENT/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
# A token of this job's own: other users of the site reach these ports as well.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address="$head:$PORT"
gpus=${SLURM_GPUS_ON_NODE:-0}
common=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --temp-dir "$SCRATCH" --block)

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port "$PORT" --include-dashboard=false "${common[@]}" &
until (exec 3<>"/dev/tcp/$head/$PORT") 2>/dev/null; do sleep 1; done
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$others" \
        ray start --address "$address" "${common[@]}" &
fi

# The driver, and Slurm's signal handed on to whatever runs in the root as a request to make checkpoints.
hardmoe "$@" --address "$address" &
driver=$!
trap 'hardmoe stop "${@:2}" --timeout 100 || true' TERM
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do wait "$driver" || status=$?; done
exit "$status"
