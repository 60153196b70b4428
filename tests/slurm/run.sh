#!/bin/bash
# jobs/slurm on a real Slurm: slurmctld and slurmd on this machine, an array of four tasks that labels 400 rows with the scripted engine.
# One task is preempted and requeued, one runs out of time, one is cancelled; then what is missing is submitted again.
#
#   tests/slurm/run.sh [PYTHON]      needs root, and Debian's slurmctld, slurmd, slurm-client and munge (installed if apt-get can)
#
# Exit code 77: not possible on this machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "${1:-python3}")
say() { printf '[%4d s] %s\n' $SECONDS "$*"; }

if [[ $(id -u) != 0 ]]; then echo "needs root, to start slurmd" >&2; exit 77; fi
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    say "installing Slurm"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; } ||
        { echo "Slurm cannot be installed here" >&2; exit 77; }
fi

# --- a cluster of one node that believes it has eight CPUs and four GPUs ---

base=$(mktemp -d /tmp/gristmill-slurm.XXXXXX)
export SLURM_CONF=$base/slurm.conf
pids=()
cleanup() {
    code=$?
    scancel --full --signal=KILL --user=root 2>/dev/null || true
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if ((code)); then
        say "failed: logs are in $base"
        tail -n 15 "$base"/*.log
    else
        rm -rf "$base"
    fi
}
trap cleanup EXIT

host=$(hostname -s)
mkdir -p "$base"/{state,spool,munge}
chmod 755 "$base" "$base/munge"
dd if=/dev/urandom of="$base/munge.key" bs=1024 count=1 status=none
chmod 600 "$base/munge.key"
cat >"$base/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket,cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/slurmctld.log
SlurmdLogFile=$base/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=15
MessageTimeout=30
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:4 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 GraceTime=12 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$host PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
EOF
for i in 0 1 2 3; do echo "NodeName=$host Name=gpu File=$base/gpu$i"; : >"$base/gpu$i"; done >"$base/gres.conf"

munged --foreground --force --key-file="$base/munge.key" --socket="$base/munge/socket" --pid-file="$base/munge.pid" \
    --log-file="$base/munged.log" --seed-file="$base/munge.seed" 2>"$base/munged.out" &
pids+=($!)
while [[ ! -S $base/munge/socket ]]; do sleep 0.1; done
slurmctld -D -f "$SLURM_CONF" >"$base/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D -f "$SLURM_CONF" -N "$host" >"$base/slurmd.out" 2>&1 &
pids+=($!)
for ((i = 0; i < 100; i++)); do
    [[ $(sinfo -h -p low -o %t 2>/dev/null) == idle ]] && break
    sleep 0.3
done
[[ $(sinfo -h -p low -o %t) == idle ]] || { sinfo -N -l; exit 1; }
say "Slurm $(slurmctld -V | cut -d' ' -f2) is up"

# --- helpers ---

state() { scontrol --oneliner show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -1; }
field() { scontrol --oneliner show job "$1" 2>/dev/null | sed -n "s/.* $2=\([^ ]*\).*/\1/p" | head -1; }
await() {      # seconds, what, command...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        if ((SECONDS > deadline)); then say "waited in vain: $what"; squeue; return 1; fi
        sleep 0.5
    done
    say "$what"
}
is() { [[ $(state "$1") == "$2" ]]; }
gone() { [[ -z $(squeue -h -j "$1" 2>/dev/null) ]]; }
labelling() { compgen -G "$base/out/_work/0000$1.*.journal" >/dev/null; }
restarted() { [[ $(field "$1" Restarts) -ge 1 ]]; }

# --- the run ---

"$python" - "$base" <<'EOF'
import sys
import pyarrow as pa, pyarrow.parquet as pq
pq.write_table(pa.table({"message": [f"row {i}" for i in range(400)]}), f"{sys.argv[1]}/in.parquet", row_group_size=100)
EOF
cat >"$base/worker" <<EOF
#!/bin/bash
SCRIPTED_DELAY=\$(<"$base/delay") exec "$python" -m tests.pipeline.scripted_run "\$@"
EOF
chmod +x "$base/worker"
export GRISTMILL_RUN=$base/worker GRISTMILL_PYTHON=$python SCRIPTED_TURNS=2 OMP_NUM_THREADS=1
echo 2.5 >"$base/delay"      # a task takes a minute and a half: Slurm looks at time limits twice a minute
run=(data="$base/in.parquet" output.dir="$base/out" task=generate "task.prompt={{ message }}" plan.rows_per_shard=25 engine.max_rows=6
     limits.grace_seconds=3)
options=(--output="$base/task-%a.log" --cpus-per-task=2)

array=$(sbatch --parsable --array=0-3 "${options[@]}" jobs/slurm/array.sbatch "${run[@]}")
finalize=$(sbatch --parsable --dependency=afterany:"$array" --output="$base/finalize.log" jobs/slurm/finalize.sbatch "$base/out")
say "array $array, finalize $finalize"
for task in 0 1 2 3; do await 90 "task $task is labelling" labelling $task; done
echo 0.1 >"$base/delay"      # for those that are started again

scancel "${array}_3"
say "cancelled task 3"
await 40 "task 3 has drained" gone "${array}_3"
grep -q "stopped by signal SIGTERM" "$base/task-3.log"
[[ $(state "${array}_3") == CANCELLED ]]

sbatch --partition=high --gpus=2 --cpus-per-task=4 --output="$base/other.log" --wrap "sleep 5" >/dev/null
preempted() { for t in 0 1 2; do restarted "${array}_$t" && return 0; done; return 1; }
await 60 "a task was preempted and requeued" preempted
for t in 0 1 2; do restarted "${array}_$t" && taken=$t; done
grep -q "stopped by signal SIGTERM" "$base/task-$taken.log"

short=$(((taken + 1) % 3))
scontrol update JobId="${array}_$short" TimeLimit=1
say "task $short has a minute in all"
await 100 "task $short ran out of time and was requeued" restarted "${array}_$short"
grep -q "signal SIGUSR2\|the end of the Slurm allocation" "$base/task-$short.log"
grep -q "out of time: requeued, restart 1" "$base/task-$short.log"
scontrol update JobId="${array}_$short" TimeLimit=60

await 200 "the array has ended" gone "$array"
await 60 "finalize has run" gone "$finalize"
[[ $(state "$finalize") == FAILED && ! -e $base/out/_SUCCESS ]]
grep -q "[1-4] of 16 shards" "$base/finalize.log"
say "finalize: $(grep -o '[0-9]* of 16 shards .* missing' "$base/finalize.log")"

missing=$(jobs/slurm/retry.sh "$base/out" 4)
[[ $missing == 3 ]]
again=$(sbatch --parsable --array="$missing" "${options[@]}" jobs/slurm/preemptible.sbatch "${run[@]}" cluster.workers=4)
finalize=$(sbatch --parsable --dependency=afterany:"$again" --output="$base/finalize-again.log" jobs/slurm/finalize.sbatch "$base/out")
await 60 "what was missing is done" gone "$again"
await 60 "finalize has run" gone "$finalize"
[[ $(state "$finalize") == COMPLETED && -e $base/out/_SUCCESS ]]
! jobs/slurm/retry.sh "$base/out" 4 2>/dev/null

"$python" - "$base" <<'EOF'
import sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(sys.argv[1], "out").glob("part-*.parquet")))
assert table.column("message").to_pylist() == [f"row {i}" for i in range(400)], "rows are lost, doubled or out of order"
assert set(table.column("status").to_pylist()) == {"ok"}
EOF
say "400 rows, each once, _SUCCESS"
