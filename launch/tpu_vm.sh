#!/bin/bash
# Trains on TPU VMs of a queued resource; by hand: fill in what stands in braces. `vit-jax launch
# tpu-vm` fills in this file and runs it; --dry_run prints it. Run it in the project's folder.
set -e
# Ask for the TPU; whatever happens then, it is given back at the end. Wait until it is there.
gcloud compute tpus queued-resources create {name} --node-id={name}-node {place} --accelerator-type={accelerator} --runtime-version={runtime} {spot}
{delete}
until [ "${{state:=}}" = ACTIVE ]; do
  sleep {poll}
  state=$(gcloud compute tpus queued-resources describe {name} {place} --format="value(state.state)")
  case $state in FAILED | SUSPEND*) echo "{name} is $state" && exit 1 ;; esac
done
# Copy this folder to every worker, and install it there.
tar --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data -czf /tmp/{name}.tar.gz .
gcloud compute tpus tpu-vm scp /tmp/{name}.tar.gz {name}-node: {place} --worker=all
gcloud compute tpus tpu-vm ssh {name}-node {place} --worker=all --command={install}
# Run on all workers; what they print comes back here. After 75 (stopped after saving) and from 129
# on (a process died or was killed) the same again.
for attempt in $(seq 0 {max_restarts}); do
  code=0
  gcloud compute tpus tpu-vm ssh {name}-node {place} --worker=all --command={command} || code=$?
  case $code in 75 | 129 | 1[3-9]?) echo "exit code $code of attempt $attempt" ;; *) break ;; esac
done
exit "$code"
