#!/bin/bash
# Trains on TPU VMs of a queued resource; by hand: fill in what stands in braces. `vit-jax launch
# tpu-vm` fills in this file and runs it; --dry_run prints it. Run it in the project's folder.
set -e
state() {{ gcloud compute tpus queued-resources describe {name} {place} --format="value(state.state)"; }}
# Asks for the TPU, waits until it is there, copies this folder to every worker and installs it.
take() {{
  gcloud compute tpus queued-resources create {name} --node-id={name}-node {place} --accelerator-type={accelerator} --runtime-version={runtime} {spot}
  # From here on, whatever happens, it is given back at the end.
  {delete}
  now=
  until [ "$now" = ACTIVE ]; do
    sleep {poll}
    now=$(state)
    case $now in FAILED | SUSPEND*) echo "{name} is $now" && exit 1 ;; esac
  done
  gcloud compute tpus tpu-vm scp /tmp/{name}.tar.gz {name}-node: {place} --worker=all
  gcloud compute tpus tpu-vm ssh {name}-node {place} --worker=all --command={install}
}}
tar --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data -czf /tmp/{name}.tar.gz .
take
# Run on all workers; what they print comes back here. After 75 (stopped after saving) and from 129
# on (a process died or was killed) the same again; on another TPU, where this one was taken away.
for attempt in $(seq 0 {max_restarts}); do
  code=0
  gcloud compute tpus tpu-vm ssh {name}-node {place} --worker=all --command={command} || code=$?
  case $code in
    75 | 129 | 1[3-9]?) ;;
    255) # ssh's own: nobody answers
      sleep {poll}
      now=$(state)
      if [ "$now" = ACTIVE ] || [ "$attempt" = {max_restarts} ]; then break; fi
      echo "{name} is $now: asking for another"
      {remove}
      take
      ;;
    *) break ;;
  esac
  echo "exit code $code of attempt $attempt"
done
exit "$code"
