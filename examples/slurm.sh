#!/usr/bin/env bash
# Train on several nodes under SLURM:  sbatch examples/slurm.sh
# Change the lines of #SBATCH and the settings below them, or set these outside:
#   RUN=runs/second sbatch --nodes=4 examples/slurm.sh --optim.lr 5e-5
# What follows the script's name is more of the recipe's fields. The run directory must be on a disk that all nodes share.
#
# Five minutes before the time is up every process is asked to stop: it finishes its step and writes a checkpoint. Then
# the job goes back into the queue, and goes on from there. So it does after a node has failed (--requeue), and after a
# process has, up to MAX_RESTARTS times, without leaving its nodes.
#SBATCH --job-name=mutoscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

RECIPE=${RECIPE:-cogvideox.t2v_full}
DATA=${DATA:-data/clips}
LATENTS=${LATENTS-runs/latents} # empty: encode while training
RUN=${RUN:-runs/t2v_full}
PYTHON=${PYTHON:-.venv/bin/python}
STRATEGY=${STRATEGY:-fsdp2}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
MAX_RESTARTS=${MAX_RESTARTS:-3}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0 # where nodes do not find each other: the network that they share

# 1. Encode the clips, once, on the first node. It goes on where it stopped, and is soon done where there is nothing new.
fields=(--data.root "$DATA")
if [[ -n $LATENTS ]]; then
    srun --nodes=1 --ntasks=1 "$PYTHON" -m mutoscope encode "$RECIPE" "${fields[@]}" --out "$LATENTS" --workers "$GPUS"
    fields+=(--data.latents "$LATENTS")
fi

# 2. Train: one torchrun on each node, which meet on the first. It starts the processes of all GPUs.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
logs=$RUN.logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # what each process says, by node and rank
mkdir -p "$logs"
stopping=0
# To all processes of the job, and not by way of srun, which would kill them
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" --shutdown-timeout 240 \
    --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --log-dir "$logs" --tee 3 \
    -m mutoscope train "$RECIPE" "${fields[@]}" --parallel.strategy "$STRATEGY" --parallel.timeout 1800 \
    --out "$RUN" "$@" &
step=$!

# 3. `wait` ends when a signal comes, too
code=0
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done
if ((stopping && code)); then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
