#!/usr/bin/env bash
# A SLURM of one node on this machine, in a folder of its own: Debian's slurm-wlm and munge, started by root.
#
#   bash loopback_slurm.sh start DIR     writes DIR/slurm.conf: export SLURM_CONF=DIR/slurm.conf
#   bash loopback_slurm.sh stop DIR
#
# It claims more cores, memory and GPUs than there are, so that it accepts the jobs of the examples as they are.
set -euo pipefail
dir=${2:?folder}
host=$(hostname)
if [[ $1 == stop ]]; then
  for name in slurmd slurmctld munged; do
    if [[ -f $dir/run/$name.pid ]]; then kill "$(cat "$dir/run/$name.pid")" || true; fi
  done
  exit
fi
mkdir -p "$dir"/{state,spool,log,run}
chmod 755 "$dir" "$dir/run"
chown munge "$dir/run" "$dir/log"
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-6817}
SlurmdPort=${SLURMD_PORT:-6818}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=60
MpiDefault=none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=64 RealMemory=256000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
CONF
touch "$dir"/gpu{0..3} # in place of device files
echo "Name=gpu File=$dir/gpu[0-3]" >"$dir/gres.conf"
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 400 "$dir/munge.key"
chown munge "$dir/munge.key"
su -s /bin/bash munge -c "/usr/sbin/munged --key-file='$dir/munge.key' --socket='$dir/run/munge.sock' \
  --pid-file='$dir/run/munged.pid' --log-file='$dir/log/munged.log' --seed-file='$dir/run/munged.seed' -f"
export SLURM_CONF="$dir/slurm.conf"
slurmctld -f "$SLURM_CONF"
sleep 2
slurmd -f "$SLURM_CONF"
