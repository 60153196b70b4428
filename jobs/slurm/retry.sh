#!/bin/bash
# Prints which workers, of WORKERS, have shards left, as an array expression; without WORKERS, which shards are missing.
#
#   sbatch --array=$(jobs/slurm/retry.sh /shared/labels 64) jobs/slurm/array.sbatch <the same arguments> cluster.workers=64
#
# cluster.workers must be said again: an array with gaps has fewer tasks than the run has workers. Exits 1 if nothing is missing.
set -u
missing=$(${GRISTMILL_PYTHON:-python} -m pipeline.status --missing "${2:-0}" -- "$1")
case $? in
    3) echo "$missing" ;;
    0) echo "nothing is missing in $1" >&2; exit 1 ;;
    *) exit 2 ;;
esac
