#!/usr/bin/env bash
# umbrella-data from-bids, check or cache as a job array: each job reads a shard, then one job merges the results.
#
#   NUM_SHARDS=8 bash data_array.sh check train.jsonl test.jsonl --out checked
#
# Run with bash, it submits itself twice: the array, and the merge that starts when the whole array has succeeded. To run
# shards 3 and 5 again, and merge by hand:
#
#   NUM_SHARDS=8 sbatch --array=3,5 data_array.sh check train.jsonl test.jsonl --out checked
#   sbatch data_array.sh check train.jsonl test.jsonl --out checked
#
#SBATCH --job-name=umbrella-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
# After a preemption or the failure of a node, SLURM starts the job again, and appends to its output.
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 to this script (B: without it, to the steps of `srun` only) two minutes before the time limit.
#SBATCH --signal=B:USR1@120
set -euo pipefail

# The virtual environment with umbrella-data; or, in front of each command, a container:
#   export LAUNCH="apptainer exec umbrella.sif"
export PATH="${UMBRELLA_ENV:-$PWD/.venv}/bin:$PATH"
read -ra launch <<<"${LAUNCH:-}"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  export NUM_SHARDS=${NUM_SHARDS:-8}
  array=$(sbatch --parsable --array="1-$NUM_SHARDS" "$0" "$@")
  echo "array: $array, shards 1 to $NUM_SHARDS"
  # The shards of a cache need no merge.
  [[ $1 == cache ]] || echo "merge: $(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes "$0" "$@")"
  exit
fi

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  # One job of an array has the number of the whole array.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  # Without NUM_SHARDS, all shards are in this array. That is not so if a part of them is run again.
  part=(--shard "$SLURM_ARRAY_TASK_ID/${NUM_SHARDS:-$SLURM_ARRAY_TASK_COUNT}")
else
  part=(--merge)
fi

is_time_up=false
pid=
trap 'is_time_up=true; kill -TERM "$pid" || true' USR1
# SLURM sends TERM to all processes of a job that is preempted, requeued or cancelled.
trap : TERM
# In the background: bash runs a trap only when the command in the foreground has ended.
"${launch[@]}" umbrella-data "$@" "${part[@]}" --workers "${SLURM_CPUS_PER_TASK:-1}" &
pid=$!
# A trap ends `wait` before the command has ended.
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
status=0
wait "$pid" || status=$?

if $is_time_up && ((status != 0)); then
  if [[ $1 == cache ]]; then
    # What is in the cache stays there: the job continues where it was stopped.
    scontrol requeue "$job"
  else
    echo "error: the time limit is too short for ${part[*]}: raise --time, or NUM_SHARDS and run all shards again" >&2
  fi
fi
exit "$status"
