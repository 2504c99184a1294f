#!/bin/sh
# The last step on the machine that an image is made of: resets what is not luks-kms-agent's, and has to be each instance's own.
#
#   cleanup.sh [FOLDER…]
#
# removes FOLDERs too: what was brought here for the bake.
set -eu

if command -v cloud-init >/dev/null; then
    # It makes new host keys at the next boot. Without it nothing would: then they stay.
    cloud-init clean --logs
    rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
    echo "cleaned: cloud-init, SSH host keys"
fi

# Empty, not absent: systemd writes a new one, and does not take the boot for one that has yet to choose what is enabled.
: >/etc/machine-id
rm -f /var/lib/systemd/random-seed
if [ -e /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
    rm -f /var/lib/dbus/machine-id
fi
echo "cleaned: machine-id, random seed"

# What is logged from here on stays in memory.
if journalctl --relinquish-var; then
    rm -rf /var/log/journal/*
    echo "cleaned: journal"
fi

rm -f /root/.bash_history /home/*/.bash_history
for folder in "$@"; do
    rm -rf "$folder"
    echo "cleaned: $folder"
done
sync
