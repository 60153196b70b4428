#!/bin/bash
# One array task, started by array.sbatch or preemptible.sbatch.
#   GRISTMILL_RUN           the command that runs a worker, such as "apptainer exec --nv image.sif python -m pipeline.run"
#   GRISTMILL_MAX_RESTARTS  how often a task that ran out of time may be requeued (default: 20)
set -u

# Caches and ports of this task alone: two compilers that share a cache at start corrupt it, two servers cannot share a port.
scratch=${TMPDIR:-/tmp}/gristmill-$SLURM_JOB_ID
mkdir -p "$scratch"
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

read -r -a run <<<"${GRISTMILL_RUN:-python -m pipeline.run}"
srun --kill-on-bad-exit=1 "${run[@]}" cluster=slurm "$@"
code=$?

# 3: this task's shards are done and other tasks' are not, which is for finalize.sbatch to judge.
[[ $code == 3 ]] && exit 0

# 75: drained. Requeue where time ran out (the limit is near, or preemption has moved it near), and never after scancel or at a
# budget of the user's own: the state is no longer RUNNING there, or the end is far.
if [[ $code == 75 && ${SLURM_RESTART_COUNT:-0} -lt ${GRISTMILL_MAX_RESTARTS:-20} ]]; then
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    end=$(date -d "$(sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' <<<"$job")" +%s)
    if [[ $job == *" JobState=RUNNING "* && $((end - $(date +%s))) -lt 300 ]]; then
        echo "out of time: requeued, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60      # Slurm ends this script; were it to end by itself, the task would count as failed
    fi
fi
exit "$code"
