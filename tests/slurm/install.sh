#!/usr/bin/env bash
# Debian's slurm and munge, unless they are here; nothing is started. Needs root.
set -euo pipefail
if command -v sbatch slurmctld slurmd munged > /dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ]; then echo "slurm-test: run as root, or install slurm-wlm and munge" >&2; exit 1; fi
if ! [ -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d  # packages must not start daemons of their own
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm /usr/sbin/policy-rc.d' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
