#!/usr/bin/env bash
# Trains on several nodes, for as many jobs as it takes; as train_one_node.sh, with one torchrun on each node:
#
#   CONFIG=my.yaml RUN=runs/my sbatch --nodes=2 train_nodes.sh
#
# CONFIG, RUN, the environment and the cache must be on a file system that all nodes share.
#
#SBATCH --job-name=umbrella-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 to this script (B: without it, to the steps of `srun` only) five minutes before the time limit.
#SBATCH --signal=B:USR1@300
set -euo pipefail

config=${CONFIG:?is not set: give the YAML file of the run, CONFIG=my.yaml}
run=${RUN:?is not set: give the folder of the run, RUN=runs/my}
# The virtual environment with umbrella-train; or, in front of each command, a container:
#   export LAUNCH="apptainer exec --nv umbrella.sif"
export PATH="${UMBRELLA_ENV:-$PWD/.venv}/bin:$PATH" PYTHONUNBUFFERED=1
read -ra launch <<<"${LAUNCH:-}"

# The ranks find each other at the first node. The port depends on the job, since two jobs may share a node.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

is_ended=false
pid=
# srun forwards USR1 to the torchrun of every node, and torchrun to its ranks.
trap 'kill -USR1 "$pid" || true' USR1
# SLURM sends TERM to all processes of a job that is preempted, requeued or cancelled. This shell waits for the run, since
# SLURM kills what remains when the script ends.
trap 'is_ended=true' TERM
# In a job array, each job trains one fold: sbatch --array=1-5 train_nodes.sh --folds 5
mark=$run/REQUEUE
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  set -- "$@" --fold "$SLURM_ARRAY_TASK_ID"
  mark=$run/fold-$SLURM_ARRAY_TASK_ID/REQUEUE
  # One job of an array has the number of the whole array.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
rm -f "$mark"
# srun does not take --cpus-per-task from sbatch (since SLURM 22.05). In the background: bash runs a trap only when the
# command in the foreground has ended.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${launch[@]}" torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_node:$port" \
  --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 280 \
  -m umbrella_train --config "$config" --resume auto \
  --output-dir "$(dirname "$run")" --name "$(basename "$run")" "$@" &
pid=$!
# A trap ends `wait` before the command has ended.
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
status=0
wait "$pid" || status=$?

# The run has stopped for the time limit: it leaves a file, since the exit code of torchrun is 1 for any reason. Not after
# TERM: SLURM requeues after a preemption, and a job that was cancelled must not come back.
if ! $is_ended && [[ -e $mark ]]; then
  scontrol requeue "$job"
fi
exit "$status"
