#!/bin/bash
# One experiment on the nodes of a job, on the ranks that torchrun starts. Started by:
#   sbatch deploy/slurm-torchrun.sh FILE [key=value ...]
# gossamer, FILE, GOSSAMER_DATA and the folder of submission lie on a file system that all nodes share.
# A job that is requeued, and a rank that dies, go on from the last commit.
#SBATCH --job-name=gossamer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# --signal: 120 seconds before the time is up the ranks are asked to stop, and rank 0 commits.
# On a machine with several networks set GLOO_SOCKET_IFNAME to the interface of a private one: what ranks send each other
# is neither authenticated nor encrypted.
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch deploy/slurm-torchrun.sh FILE [key=value ...]" >&2
  exit 2
fi
file=$1
shift
out="runs/slurm-$SLURM_JOB_ID"
head=$(hostname)  # this script runs on the first node
port=$((20000 + SLURM_JOB_ID % 20000))  # jobs that share a node do not meet

if [ -e "$out/config.yaml" ] || [ -e "$out/experiment.yaml" ]; then
  command=(resume "$out")
else
  command=(run "$file" "$@" --engine collective --out "$out")
fi
exec srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_CPUS_PER_TASK" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" -m gossamer "${command[@]}"
