#!/usr/bin/env bash
# Trains on the GPUs of one node, for as many jobs as it takes:
#
#   CONFIG=my.yaml RUN=runs/my sbatch train_one_node.sh
#
# Before the time limit, the run saves a checkpoint, and the job is queued again; so it is after a preemption and the
# failure of a node. Options of sbatch go in front of the script (sbatch --time=02:00:00 train_one_node.sh), keys of the
# configuration after it (--trainer.learning-rate 5e-4).
#
#SBATCH --job-name=umbrella-train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 to this script (B: without it, to the steps of `srun` only) five minutes before the time limit: time enough to end
# a step and save a checkpoint.
#SBATCH --signal=B:USR1@300
set -euo pipefail

config=${CONFIG:?is not set: give the YAML file of the run, CONFIG=my.yaml}
run=${RUN:?is not set: give the folder of the run, RUN=runs/my}
# The virtual environment with umbrella-train; or, in front of each command, a container:
#   export LAUNCH="apptainer exec --nv umbrella.sif"
export PATH="${UMBRELLA_ENV:-$PWD/.venv}/bin:$PATH" PYTHONUNBUFFERED=1
read -ra launch <<<"${LAUNCH:-}"

command=(umbrella-train)
num_gpus=${SLURM_GPUS_ON_NODE:-1}
if ((num_gpus > 1)); then
  command=(torchrun --standalone --nproc-per-node "$num_gpus")
  # torchrun forwards signals to its ranks, but USR1 only if told, and kills them 30 s later unless given more time.
  command+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 280 -m umbrella_train)
fi

is_ended=false
pid=
trap 'kill -USR1 "$pid" || true' USR1
# SLURM sends TERM to all processes of a job that is preempted, requeued or cancelled. This shell waits for the run, since
# SLURM kills what remains when the script ends.
trap 'is_ended=true' TERM
# In a job array, each job trains one fold: sbatch --array=1-5 train_one_node.sh --folds 5
mark=$run/REQUEUE
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  set -- "$@" --fold "$SLURM_ARRAY_TASK_ID"
  mark=$run/fold-$SLURM_ARRAY_TASK_ID/REQUEUE
  # One job of an array has the number of the whole array.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
rm -f "$mark"
# --resume auto starts the run, and resumes it in later jobs. In the background: bash runs a trap only when the command in
# the foreground has ended.
"${launch[@]}" "${command[@]}" --config "$config" --resume auto \
  --output-dir "$(dirname "$run")" --name "$(basename "$run")" "$@" &
pid=$!
# A trap ends `wait` before the command has ended.
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
status=0
wait "$pid" || status=$?

# 138 is 128 + USR1: the run has stopped for the time limit. Under torchrun, the exit code is 1, and there is a file. Not
# after TERM: SLURM requeues after a preemption, and a job that was cancelled must not come back.
if ! $is_ended && { ((status == 138)) || [[ -e $mark ]]; }; then
  scontrol requeue "$job"
fi
exit "$status"
